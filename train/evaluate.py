"""Evaluate a weight file: `python -m train.evaluate DATA {train,deploy} WEIGHTS -a NAME`."""

if __name__ == "__main__":  # before the slow imports: see `run_module`
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
from repvgg_jax.command_errors import one_line_errors
from repvgg_jax.command_help import plain_help
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
    """Accuracy over a data set.

    Attributes:
      top1, top5: accuracies as shares in 0..1.
      loss: mean cross-entropy.
      images: number of images that were evaluated, over all processes.
      skipped: number of images that this process could not read.
      predictions: predicted class of each image that this process has evaluated, in the source's order.
      probabilities: probability of that class.
      indices: index of the image among those that this process reads.
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
    """Evaluation of one model on a source, compiled once and called repeatedly during training.

    An unreadable image is reported once, however often the source is evaluated, by all evaluators that share
    `bad_images`.

    Args:
      model: training or deploy form, or a quantised net; or, on one device, a predictor, which holds its variables.
      source: the images to evaluate on.
      preprocessing: preparation of the images.
      batch_size: images per batch over all devices; rounded up to a multiple of their number.
      workers: number of decoding threads; None for one per core.
      strict: raise on unreadable images instead of skipping them.
      bad_images: record of unreadable images; None makes a new one.
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
        """Evaluate variables with a leading axis of devices; an empty mapping for a predictor.

        Raises:
          DataError: no image of the source can be read, or, with `strict`, one cannot.
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

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Data set: the name of a TFDS data set, a folder with train/CLASS/* and val/CLASS/*, digits (the scanned digits
    of scikit-learn) or synthetic (random pixels)."""
    form: tyro.conf.Positional[Literal["train", "deploy"]]
    """Form to evaluate. For deploy, a weight file in training form is fused first."""
    weights: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WEIGHTS")]
    """Weight file: a local path, an address in a bucket (gs://, s3://) or on the hub (hf://), or the name of a variant,
    such as RepVGG-A0, to use its ImageNet weights. A file of that name takes precedence."""
    arch: Annotated[str | None, tyro.conf.arg(aliases=["-a"])] = None
    """Architecture expected in WEIGHTS: the name of a variant, a JSON file with its fields, or another weight file. If
    WEIGHTS contains another architecture, it is an error."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 100
    """Number of images per batch, on all devices together."""
    resolution: Annotated[int | None, tyro.conf.arg(aliases=["-r"])] = None
    """Height and width of the evaluation crops in pixels. Default: the value in the weight file.
    Without --crop-fraction, the shorter side is resized as in the authors' code:
    to this size if it is 320 or more, and to 8/7 of it otherwise (256 for 224)."""
    data_dir: str | None = None
    """Folder of the TFDS data sets. Default: $TFDS_DATA_DIR, or ~/tensorflow_datasets if that is not set."""
    test_split: str | None = None
    """Split of a TFDS data set, or a slice of a split, such as train[90%:]. Default: validation, or test if there is
    none."""
    workers: int | None = None
    """Number of decoding threads. Default: one per core."""
    strict: bool = False
    """Stop at the first unreadable image instead of skipping and counting it."""
    ignore_class_names: bool = False
    """Match classes by index even if the weight file and the data name them differently."""
    report: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Write a report to this folder: accuracy per class, confusion matrix, all predictions, the most confident
    mistakes."""
    options: Annotated[tyro.conf.OmitArgPrefixes[WeightsOptions], tyro.conf.arg(name="weight-file")] = (
        dataclasses.field(default_factory=WeightsOptions)
    )


def evaluate_file(arguments: Arguments) -> Evaluation:
    """Load a weight file, fuse it if the deploy form is requested, and evaluate it.

    Raises:
      ConfigError: a size is not positive, or a crop fraction is not in 0 to 1.
      WeightsError: the weights cannot be read or do not fit, or the training form of a deploy file is requested.
      DataError: the data cannot be read, or have other classes.
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
    expected = expected_variant("--arch", arguments.arch)
    described = inspect_weights(arguments.weights, expected, **arguments.options.reading)
    info = arguments.options.apply(described)
    if info.in_channels != info.preprocessing.channels:
        raise WeightsError(f"{arguments.weights} takes {info.in_channels} channels; image files have 1 or 3")
    if arguments.form == "train" and info.deploy:
        raise WeightsError(f"{arguments.weights} is in deploy form, which has no training form: evaluate it as deploy")
    preprocessing = info.preprocessing
    if arguments.resolution is not None:
        preprocessing = preprocessing.at_size(arguments.resolution)
    if arguments.options.crop_fraction is not None:
        preprocessing = dataclasses.replace(preprocessing, crop_fraction=arguments.options.crop_fraction)
    dataset = data.open_dataset(
        arguments.data,
        image_size=preprocessing.image_size,
        data_dir=arguments.data_dir,
        evaluation_only=True,
        test_split=arguments.test_split,
    )
    if dataset.num_classes != info.num_classes:
        raise WeightsError(
            f"{arguments.weights} has {info.num_classes} classes, but {arguments.data} has {dataset.num_classes}"
        )
    source, note = matched_source(dataset, info, arguments.weights, ignore=arguments.ignore_class_names)
    model, variables = _load(arguments, info, expected)
    if preprocessing != described.preprocessing:
        print(
            f"evaluating at {preprocessing.image_size} pixels, cropped from images resized to "
            f"{preprocessing.resize_size} on the shorter side",
            file=sys.stderr,
        )
    for line in dataset.notes:
        print(line, file=sys.stderr)
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
    """Return the compiled predictor of a deploy form, which normalises its images itself."""
    size = preprocessing.image_size
    if isinstance(model, rv.QuantizedNet):
        return rv.make_predictor(None, None, batch_size, size, quantized=model, preprocessing=preprocessing)
    return rv.make_predictor(model, variables, batch_size, size, preprocessing=preprocessing)


def _load(
    arguments: Arguments, info: rv.WeightsInfo, expected: str | rv.Variant | None
) -> tuple[rv.RepVGG | rv.QuantizedNet, Mapping[str, Any]]:
    """Return the net and its variables in the requested form."""
    if info.quantized:
        net = rv.load_quantized(arguments.weights, expected)
        return net, net.variables
    model, variables = rv.load_weights(arguments.weights, expected, **arguments.options.reading)
    if arguments.form == "deploy" and not model.deploy:
        return rv.to_deploy(model, variables)
    return model, variables


def skipped_line(count: int) -> str:
    """Return a line with the number of images that could not be read."""
    return f"{count} image{'s' if count > 1 else ''} could not be read and {'were' if count > 1 else 'was'} skipped"


def main() -> None:
    """Run the command; the last line on stdout is one JSON object."""
    with one_line_errors():
        arguments = tyro.cli(Arguments, prog="python -m train.evaluate", registry=plain_help())
    result = evaluate_file(arguments)
    if result.skipped:
        print(skipped_line(result.skipped), file=sys.stderr)
    print(json.dumps({"top1": result.top1, "top5": result.top5, "images": result.images}))
