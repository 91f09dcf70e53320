"""Evaluation: `python -m train.evaluate DATA {train,deploy} WEIGHTS -a NAME`."""

if __name__ == "__main__":  # before the imports that take long: see `run_module`
    from repvgg_jax.cli import run_module

    run_module("train.evaluate")

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

import repvgg_jax as rv
from repvgg_jax.errors import ConfigError, WeightsError
from repvgg_jax.inference.predictor import Predictor
from repvgg_jax.paths import option_place
from repvgg_jax.preprocess import Preprocessing
from repvgg_jax.weights import inspect_weights
from repvgg_jax.weights.architecture import expected_variant
from repvgg_jax.weights.argument import weights_path
from repvgg_jax.weights.info import MAX_IMAGE_SIZE
from repvgg_jax.weights.options import WeightsOptions

from . import data
from .class_names import matched_source
from .data import BadImages, Source, eval_batches
from .parallel import AXIS, parallel, replicate
from .report import NamedSource, check_report_folder, write_report
from .step import make_eval_step, predictor_step


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Accuracy over a data set: `top1` and `top5` as shares, `loss` the mean cross-entropy.

    `predictions` holds the predicted class of each image that this process has counted, in the source's order,
    `probabilities` that class's probability, and `indices` the image's place among those that this process reads;
    `skipped` counts those that it could not read.
    """

    top1: float
    top5: float
    loss: float
    images: int
    skipped: int
    predictions: np.ndarray
    probabilities: np.ndarray
    indices: np.ndarray


class Evaluator:
    """Compiles one model's evaluation over a source once, to be called with variables as they train.

    Unreadable images are named once, however often the source is evaluated: once for all evaluators that share
    `bad_images`.

    Args:
      model: training or deploy form, or a quantised net; or a predictor, on one device, which has its variables.
      source: what to evaluate on.
      preprocessing: how its images are prepared.
      batch_size: images in a batch over all devices; rounded up to their multiple.
      workers: decoding threads, None for one each core.
      strict: raise on unreadable images instead of skipping them.
      bad_images: where unreadable images are recorded; None makes a new record.
    """

    def __init__(
        self,
        model: rv.RepVGG | rv.QuantizedNet | Predictor,
        source: Source,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        workers: int | None = None,
        strict: bool = False,
        bad_images: BadImages | None = None,
    ):
        devices = jax.device_count()
        self._step: Callable[[Any, Any], Mapping[str, Any]]
        if isinstance(model, Predictor):
            assert devices == 1
            self._step = predictor_step(model)
        else:
            self._step = parallel(make_eval_step(model, preprocessing, axis_name=AXIS))
        self._source = source
        self._options: dict[str, Any] = dict(
            batch_size=-(-batch_size // devices) * devices,
            local_device_count=jax.local_device_count(),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            preprocessing=preprocessing,
            num_workers=workers,
            strict=strict,
            bad_images=BadImages() if bad_images is None else bad_images,
        )

    def __call__(self, replicated_variables: Mapping[str, Any]) -> Evaluation:
        """Evaluate variables with a leading axis of devices; none for a predictor.

        Raises:
          DataError: no image of the source can be read, or with `strict` any cannot.
        """
        totals: dict[str, float] = dict.fromkeys(("loss", "top1", "top5", "images"), 0.0)
        predictions, probabilities, masks = [], [], []
        with eval_batches(self._source, **self._options) as batches:
            for batch in batches:
                sums: dict[str, Any] = dict(self._step(replicated_variables, batch))
                counted = batch["mask"] > 0
                predictions.append(np.asarray(sums.pop("prediction"))[counted])
                probabilities.append(np.asarray(sums.pop("probability"))[counted])
                masks.append(counted.ravel())
                for name, value in sums.items():
                    totals[name] += float(np.asarray(value.addressable_data(0)).reshape(-1)[0])
        images = round(totals.pop("images"))
        return Evaluation(
            **{name: total / images for name, total in totals.items()},
            images=images,
            skipped=batches.skipped,
            predictions=np.concatenate(predictions),
            probabilities=np.concatenate(probabilities),
            indices=np.flatnonzero(np.concatenate(masks)),
        )


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Evaluate a weight file on a data set's evaluation split."""

    data: tyro.conf.Positional[str]
    """A TFDS name, a folder with train/CLASS/* and val/CLASS/*, `digits`, or `synthetic`."""
    form: tyro.conf.Positional[Literal["train", "deploy"]]
    """Form to evaluate; a training-form file is fused for `deploy`."""
    weights: tyro.conf.Positional[str]
    """The weight file, here, in a bucket (gs://, s3://) or on the hub (hf://). Or the name of a variant, for its
    ImageNet weights, unless a file has that name."""
    arch: Annotated[str | None, tyro.conf.arg(aliases=["-a"])] = None
    """Variant the file must hold: one of `rv.list_models()`, or NET.json or a weight file for its architecture."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 100
    resolution: Annotated[int | None, tyro.conf.arg(aliases=["-r"])] = None
    """Side of the evaluation crops, pixels; the weight file's own if not given. As the authors do, the shorter side is
    resized to this size itself from 320 on, and to 8/7 of it below (256 for 224), unless --crop-fraction says."""
    data_dir: str | None = None
    """Where TFDS keeps its data sets."""
    test_split: str | None = None
    """Split of a TFDS data set, or a slice of one, such as train[90%:]; `validation`, or else `test`, if not given."""
    workers: int | None = None
    """Decoding threads; one for each core if not given."""
    strict: bool = False
    """Stop at an unreadable image instead of skipping it."""
    ignore_class_names: bool = False
    """Evaluate by index although the weight file names other classes than the data."""
    report: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Write a report into this folder: per-class accuracy, confusion matrix, every prediction, the worst mistakes."""
    options: tyro.conf.OmitArgPrefixes[WeightsOptions] = dataclasses.field(default_factory=WeightsOptions)


def evaluate_file(arguments: Arguments) -> Evaluation:
    """Load, fuse if asked to, and evaluate.

    Raises:
      ConfigError: a size that is not positive, a crop fraction outside of 0 to 1.
      WeightsError: unreadable or unfitting weights, or deploy weights asked for in training form.
      DataError: unreadable data, or data of other classes.
      RepVGGError: the report cannot be written.
    """
    for option, value in (
        ("--batch-size", arguments.batch_size),
        ("--resolution", arguments.resolution),
        ("--workers", arguments.workers),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{option} must be at least 1, not {value}")
    if arguments.resolution is not None and arguments.resolution > MAX_IMAGE_SIZE:
        raise ConfigError(f"--resolution must be at most {MAX_IMAGE_SIZE}, not {arguments.resolution}")
    report = None if arguments.report is None else option_place("--report", arguments.report)
    if report is not None:
        check_report_folder(report)
    arguments = dataclasses.replace(arguments, weights=weights_path("WEIGHTS", arguments.weights))
    described = inspect_weights(arguments.weights, **arguments.options.reading)
    info = arguments.options.apply(described)
    if info.in_channels != info.preprocessing.channels:
        raise WeightsError(f"{arguments.weights} takes {info.in_channels} channels; image files have 1 or 3")
    model, variables = _load(arguments, info)
    preprocessing = info.preprocessing
    if arguments.resolution is not None:
        preprocessing = preprocessing.at_size(arguments.resolution)
    if arguments.options.crop_fraction is not None:
        preprocessing = dataclasses.replace(preprocessing, crop_fraction=arguments.options.crop_fraction)
    if preprocessing != described.preprocessing:
        print(
            f"evaluating at {preprocessing.image_size} pixels, cropped from images resized to "
            f"{preprocessing.resize_size} on the shorter side",
            file=sys.stderr,
        )
    dataset = data.open_dataset(
        arguments.data,
        image_size=preprocessing.image_size,
        data_dir=arguments.data_dir,
        evaluation_only=True,
        test_split=arguments.test_split,
    )
    if dataset.num_classes != model.num_classes:
        raise WeightsError(
            f"{arguments.weights} has {model.num_classes} classes, but {arguments.data} has {dataset.num_classes}"
        )
    for note in dataset.notes:
        print(note, file=sys.stderr)
    source, note = matched_source(dataset, info, arguments.weights, ignore=arguments.ignore_class_names)
    if note:
        print(note, file=sys.stderr)
    evaluated, placed = model, {}
    if arguments.form == "deploy" and jax.device_count() == 1:
        evaluated = _predictor(model, variables, arguments.batch_size, preprocessing)
    else:
        placed = replicate(variables)
    source = NamedSource(source)
    evaluator = Evaluator(
        evaluated,
        source,
        preprocessing,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        strict=arguments.strict,
    )
    result = evaluator(placed)
    if report is not None:
        about = {"weights": arguments.weights, "form": arguments.form, "data": arguments.data}
        write_report(report, result, source, preprocessing, about)
    return result


def _predictor(
    model: rv.RepVGG | rv.QuantizedNet, variables: Mapping[str, Any], batch_size: int, preprocessing: Preprocessing
) -> Predictor:
    """What is deployed: planned, compiled, normalising its images itself."""
    size = preprocessing.image_size
    if isinstance(model, rv.QuantizedNet):
        return rv.make_predictor(None, None, batch_size, size, quantized=model, preprocessing=preprocessing)
    return rv.make_predictor(model, variables, batch_size, size, preprocessing=preprocessing)


def _load(arguments: Arguments, info: rv.WeightsInfo) -> tuple[rv.RepVGG | rv.QuantizedNet, Mapping[str, Any]]:
    """What to evaluate, in the form asked for."""
    if arguments.form == "train" and info.deploy:
        raise WeightsError(f"{arguments.weights} is in deploy form, which has no training form: evaluate it as deploy")
    expected = expected_variant("--arch", arguments.arch)
    if info.quantized:
        net = rv.load_quantized(arguments.weights, expected)
        return net, net.variables
    model, variables = rv.load_weights(arguments.weights, expected, **arguments.options.reading)
    if arguments.form == "deploy" and not model.deploy:
        return rv.to_deploy(model, variables)
    return model, variables


def skipped_line(count: int) -> str:
    """Say how many images could not be read."""
    return f"{count} image{'s' if count > 1 else ''} could not be read and {'were' if count > 1 else 'was'} skipped"


def main() -> None:
    """The command; its last line on stdout is one JSON object."""
    arguments = tyro.cli(Arguments, prog="python -m train.evaluate")
    result = evaluate_file(arguments)
    if result.skipped:
        print(skipped_line(result.skipped), file=sys.stderr)
    print(json.dumps({"top1": result.top1, "top5": result.top5, "images": result.images}))
