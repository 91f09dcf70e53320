"""Computation of the facts on a page, from a weight file and images."""

import dataclasses
import io
import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import Image

from ..inference.planned_net import Output
from ..inference.predictor import Predictor, make_predictor
from ..net.fusion import to_deploy
from ..net.model import RepVGG
from ..net.summary import block_costs, summarize
from ..predict import ImageReader, softmax
from ..prediction_files import Guess
from ..preprocess import normalize
from ..quantization import QuantizedNet, load_quantized
from ..quantization.stack import LINEAR, layers_of
from ..weights import WeightsInfo, WeightsWarning, load_weights
from ..weights.imagenet_classes import class_names_to_show
from .comparison import difference, training_form_outputs
from .facts import Difference, Facts, Photo, StageCost
from .ranges import Recorder, record, record_quantized, weight_ranges
from .timing import plan_facts

PSEUDO_RANDOM_IMAGES = 8

PHOTO_PIXELS = 224
"""Longer side of a photograph on the page, in pixels."""

TRAINING = "training form"
DIRECT, PLANNED = "deploy form with direct convolutions", "deploy form with planned algorithms"
INTEGERS, PREDICTOR = "INT8 in XLA", "INT8 in the predictor"


@dataclasses.dataclass(frozen=True)
class Request:
    """Settings of a page.

    Attributes:
      file: the weight file.
      info: its description, with the user's options applied.
      reading: arguments of `load_weights`.
      top: number of classes to show per image.
      batch_size: largest batch size of the predictor.
      measure: measure times instead of using the cost model.
    """

    file: str
    info: WeightsInfo
    reading: Mapping[str, Any]
    top: int
    batch_size: int
    measure: bool


def collect(request: Request, reader: ImageReader | None) -> Facts:
    """Compute the facts of a page.

    Args:
      request: settings of the page.
      reader: reader of the images; None to use pseudo-random images.

    Raises:
      WeightsError: the weight file cannot be read or used.
      DataError: no image can be read.
    """
    info = request.info
    size = info.preprocessing.image_size
    names: list[str] = []
    listed = 0
    if reader is None:
        images = pseudo_random_images(PSEUDO_RANDOM_IMAGES, size, info.in_channels)
        pixels = np.zeros((0, size, size, info.in_channels), np.uint8)
    else:
        batches = list(reader.batches(request.batch_size))
        names = [name for batch, _ in batches for name in batch]
        pixels = np.concatenate([batch for _, batch in batches])
        images = normalize(pixels, info.preprocessing)
        listed = reader.listed if reader.listed > len(names) + reader.failures else 0
    computed = _compute(request, images)
    if reader is not None:
        for index in np.flatnonzero(~np.isfinite(computed.outputs).all(1)).tolist():
            reader.fail(f"{names[index]}: the net's outputs are not finite numbers")
    return Facts(
        file=request.file,
        info=info,
        stages=stage_costs(info),
        photos=_photos(request, names, pixels, computed.outputs),
        images=len(images),
        pseudo_random=reader is None,
        listed=listed,
        unusable=reader.failures if reader else 0,
        differences=_differences(computed),
        weights=weight_ranges(info.variant, computed.layers),
        inputs=computed.recorder.facts(() if info.num_classes else (LINEAR,)),
        plan=plan_facts(computed.predictor, images, measure=request.measure),
    )


def stage_costs(info: WeightsInfo) -> tuple[StageCost, ...]:
    """Return the costs of each stage and of the head, which add up to the costs of the net in `summarize`."""
    variant, size, classes = info.variant, info.preprocessing.image_size, info.num_classes
    stages = []
    for name, group in itertools.groupby(block_costs(variant, size, info.in_channels), lambda cost: cost.block.stage):
        costs = list(group)
        stages.append(
            StageCost(
                name=name,
                blocks=tuple(cost.block.name for cost in costs),
                in_size=costs[0].in_size,
                out_size=costs[-1].out_size,
                channels=costs[-1].block.out_channels,
                groups=max(cost.block.groups for cost in costs),
                params=sum(cost.params for cost in costs),
                train_params=sum(cost.train_params for cost in costs),
                flops=sum(cost.flops for cost in costs),
                train_flops=sum(cost.train_flops for cost in costs),
                winograd_muls=sum(cost.winograd_muls for cost in costs),
            )
        )
    if not classes:
        return tuple(stages)
    products = variant.widths[-1] * classes
    params = products + classes
    stages.append(StageCost(LINEAR, (), 0, 0, classes, 1, params, params, products, products, products))
    if variant.auxiliary_heads:
        whole = summarize(variant, image_size=size, num_classes=classes, in_channels=info.in_channels)
        others = whole.train_params - sum(stage.train_params for stage in stages)
        stages.append(StageCost("auxiliary heads", (), 0, 0, classes, 1, 0, others, 0, 0, 0))
    return tuple(stages)


def pseudo_random_images(count: int, size: int, channels: int) -> np.ndarray:
    """Return fixed noise of unit variance, float32 `[count, size, size, channels]`.

    Neighbouring pixels are correlated, as in photographs. White noise would almost vanish after a few layers that
    average it.
    """
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(count, -(-size // 8), -(-size // 8), channels))
    noise = coarse.repeat(8, 1).repeat(8, 2)[:, :size, :size] + 0.5 * rng.normal(size=(count, size, size, channels))
    return (noise / np.sqrt(1.25)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Computed:
    """Results of computing the images.

    Attributes:
      outputs: outputs of the predictor: logits `[N, classes]` or pooled features `[N, C]`, depending on `output`.
      layers: layers of the deploy form, float or INT8; without the classifier if the file has none.
      others: the same outputs from other computations, by description; the most exact computation comes first.
      name: description of the predictor's computation.
    """

    predictor: Predictor
    outputs: np.ndarray
    output: Output
    layers: Mapping[str, Mapping[str, Any]]
    recorder: Recorder
    others: Mapping[str, np.ndarray]
    name: str


def _compute(request: Request, images: np.ndarray) -> _Computed:
    batch_size, size = min(request.batch_size, len(images)), request.info.preprocessing.image_size
    recorder = Recorder()
    if request.info.quantized:
        net: QuantizedNet = load_quantized(request.file)
        predictor = make_predictor(net, None, batch_size, size)
        others = {INTEGERS: record_quantized(net, images, recorder)}
        layers = {name: layer for name, layer in net.params.items() if "kernel" in layer}
        return _Computed(predictor, predictor(images), "logits", layers, recorder, others, PREDICTOR)
    headless = not request.info.num_classes
    output: Output = "embedding" if headless else "logits"
    model, variables = _load(request, headless=headless)
    others = {}
    if not model.deploy:
        others[TRAINING] = training_form_outputs(model, variables, images, batch_size, output)
        model, variables = to_deploy(model, variables)
    layers = layers_of(variables["params"])
    predictor = make_predictor(model, variables, batch_size, size, output=output)
    logits, embeddings = record(model.variant, layers, images, recorder)
    others[DIRECT] = embeddings if headless else logits
    if headless:
        del layers[LINEAR]
    return _Computed(predictor, predictor(images), output, layers, recorder, others, PLANNED)


def _load(request: Request, *, headless: bool) -> tuple[RepVGG, dict[str, Any]]:
    with warnings.catch_warnings():
        if headless:  # the classifier is not used: do not warn that it is newly initialised
            warnings.simplefilter("ignore", WeightsWarning)
        return load_weights(request.file, num_classes=1 if headless else None, **request.reading)


def _differences(computed: _Computed) -> tuple[Difference, ...]:
    """Compare each computation with the most exact one, on the images for which all outputs are finite."""
    ways = dict(computed.others) | {computed.name: computed.outputs}
    finite = np.all([np.isfinite(outputs).all(1) for outputs in ways.values()], axis=0)
    if not finite.any():
        return ()
    (first, expected), *rest = ways.items()
    return tuple(difference((first, name), expected[finite], y[finite], computed.output) for name, y in rest)


def _photos(request: Request, names: Sequence[str], pixels: np.ndarray, outputs: np.ndarray) -> tuple[Photo, ...]:
    class_names = class_names_to_show(request.info)

    def guesses(logits: np.ndarray) -> tuple[Guess, ...]:
        if not request.info.num_classes or not np.isfinite(logits).all():
            return ()
        shares = softmax(logits)
        best = np.argsort(-shares, kind="stable")[: request.top].tolist()
        return tuple(Guess(i, class_names[i] if class_names else None, float(shares[i])) for i in best)

    shown = (_jpeg(image) for image in pixels)
    return tuple(Photo(*facts) for facts in zip(short_names(names), shown, map(guesses, outputs), strict=False))


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the paths without the parent folders that all of them share."""
    parts = [PurePath(path).parts for path in paths]
    folders = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*(one[:-1] for one in parts), strict=False))
    shared = len(list(folders))
    return [str(PurePath(*names[shared:])) for names in parts]


def _jpeg(pixels: np.ndarray) -> bytes:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((PHOTO_PIXELS, PHOTO_PIXELS), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82, optimize=True)
    return file.getvalue()
