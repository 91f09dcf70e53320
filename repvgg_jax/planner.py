"""Which algorithm computes each layer of a deploy-form net, and in what portions the batch is walked.

A small cost model answers at once (`default_plan`); `tuning` measures instead. On accelerators the plan is XLA's own
convolution throughout.

Portions matter on CPUs for two reasons. Intermediate results that stay in a core's cache are cheap to read again; and
memory that a call allocates afresh costs a page fault every 4 KiB, which outweighs the arithmetic of the first
layers. So a batch is walked `outer` images at a time through the whole net, and within that, each stage walks its own
`portion` of images at a time.
"""

import dataclasses
import math
from collections.abc import Sequence

from . import native
from .conv3x3 import ALGORITHMS, NATIVE, TILE, XLA, Algorithm, supports
from .variants import Variant

OUTER = 16
"""Images that go through the whole net together: enough rows for the late stages' matrix products."""


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One convolution on one image: input height and width, channels, stride, groups, dilation."""

    height: int
    width: int
    in_channels: int
    out_channels: int
    stride: int = 1
    groups: int = 1
    dilation: int = 1

    @property
    def out_pixels(self) -> int:
        """Output pixels of one image."""
        return math.ceil(self.height / self.stride) * math.ceil(self.width / self.stride)

    @property
    def multiplications(self) -> int:
        """Of the direct sum, for one image."""
        return 9 * self.out_pixels * self.in_channels * self.out_channels // self.groups


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What computes the block called `name`."""

    name: str
    shape: LayerShape
    algorithm: Algorithm


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """Consecutive layers, walked `portion` images at a time."""

    portion: int
    layers: tuple[LayerPlan, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one net computes one batch; `str` of it is a table.

    Attributes:
      batch_size: images a call.
      outer: images that go through all stages together; the last ones of a call may be blank.
      stages: in order; each portion divides `outer`.
      source: who chose: "cost model", "measured", "cached measurement", or the platform's name.
    """

    batch_size: int
    outer: int
    stages: tuple[StagePlan, ...]
    source: str

    def algorithms(self) -> dict[str, Algorithm]:
        """Algorithm of every block, by name."""
        return {layer.name: layer.algorithm for stage in self.stages for layer in stage.layers}

    def __str__(self) -> str:
        rows = [("block", "input", "channels", "stride", "groups", "algorithm", "images", "G multiplications")]
        for stage in self.stages:
            for layer in stage.layers:
                shape = layer.shape
                rows.append(
                    (
                        layer.name,
                        f"{shape.height}x{shape.width}",
                        f"{shape.in_channels} -> {shape.out_channels}",
                        str(shape.stride),
                        str(shape.groups),
                        layer.algorithm,
                        str(stage.portion),
                        f"{self._multiplications(layer):.3f}",
                    )
                )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        direct = sum(layer.shape.multiplications for stage in self.stages for layer in stage.layers) / 1e9
        planned = sum(self._multiplications(layer) for stage in self.stages for layer in stage.layers)
        total = f"batch {self.batch_size}, {self.outer} at a time; {planned:.2f} G multiplications an image"
        return "\n".join([*lines, "", f"{total} (direct: {direct:.2f}); chosen by {self.source}"])

    @staticmethod
    def _multiplications(layer: LayerPlan) -> float:
        return _products(layer.shape, layer.algorithm) / 1e9


def stage_layers(variant: Variant, image_size: tuple[int, int], in_channels: int = 3) -> list[list[LayerPlan]]:
    """The net's convolutions with their shapes, stage by stage, all direct."""
    height, width = image_size
    stages: dict[str, list[LayerPlan]] = {}
    for block in variant.blocks(in_channels):
        channels = (block.in_channels, block.out_channels)
        shape = LayerShape(height, width, *channels, block.stride, block.groups, block.dilation)
        stages.setdefault(block.stage, []).append(LayerPlan(block.name, shape, "direct"))
        height, width = math.ceil(height / block.stride), math.ceil(width / block.stride)
    return list(stages.values())


def xla_plan(variant: Variant, batch_size: int, image_size: tuple[int, int], in_channels: int, source: str) -> Plan:
    """XLA's own convolution for every layer, the batch in one piece: right for GPU, TPU and 16-bit floats."""
    stages = (StagePlan(batch_size, tuple(layers)) for layers in stage_layers(variant, image_size, in_channels))
    return Plan(batch_size, batch_size, tuple(stages), source)


def default_plan(
    variant: Variant, batch_size: int, image_size: tuple[int, int], in_channels: int = 3, *, dtype: str = "float32"
) -> Plan:
    """The cost model's choice for a CPU: by stage, the portion and the algorithms of least estimated time."""
    outer = outer_portion(batch_size)

    def best(shape: LayerShape, portion: int) -> tuple[Algorithm, float]:
        costs: list[tuple[Algorithm, float]] = [
            (algorithm, estimated_seconds(shape, algorithm, portion)) for algorithm in candidates(shape, dtype)
        ]
        return min(costs, key=lambda pair: pair[1])

    stages = []
    for layers in stage_layers(variant, image_size, in_channels):
        portions = {p: sum(best(layer.shape, p)[1] for layer in layers) for p in divisors(outer)}
        portion = min(portions, key=lambda p: portions[p])
        chosen = (dataclasses.replace(layer, algorithm=best(layer.shape, portion)[0]) for layer in layers)
        stages.append(StagePlan(portion, tuple(chosen)))
    return Plan(batch_size, outer, tuple(stages), "cost model")


def candidates(shape: LayerShape, dtype: str = "float32") -> list[Algorithm]:
    """Algorithms that can compute this layer on this machine's CPU."""
    usable = ALGORITHMS if dtype == "float32" and native.available() else XLA
    return [algorithm for algorithm in usable if supports(algorithm, shape.stride, shape.dilation)]


def training_algorithm(shape: LayerShape, images: int) -> Algorithm:
    """The native algorithm of least estimated time for a convolution in training, with both its gradients.

    There the kernel's transforms come and go at every step: those of the convolution and of the input's gradient are
    written and read, the sums that become the kernel's gradient are cleared, added to and read.
    """
    usable: list[Algorithm] = [a for a in NATIVE if supports(a, shape.stride, shape.dilation)]

    def seconds(algorithm: Algorithm) -> float:
        positions = (TILE[algorithm] + 2) ** 2 if algorithm in TILE else 9
        transforms = 8 * 4 * positions * shape.in_channels * shape.out_channels / shape.groups
        return 3 * images * estimated_seconds(shape, algorithm, images) + transforms / MEMORY_BANDWIDTH

    return min(usable, key=seconds)


# Fitted on two cores of a 2.3 GHz AVX-512 server. Only their ratios decide.
PRODUCT_RATE = 100e9  # multiplications a second of a large float32 matrix product
CONVOLUTION_RATE = 72e9  # of XLA's own convolution, where channels fill vectors
HALF_RATE_ROWS = 24.0  # rows (and columns, and depth) at which a matrix product reaches half that rate
CACHE_BYTES = 4e6  # intermediate results beyond this come from memory
CACHE_BANDWIDTH = 30e9
MEMORY_BANDWIDTH = 12e9
OPERATION_SECONDS = 6e-6  # starting one XLA operation
TINY_PIXELS = 4  # images of at most so many output pixels, for which XLA's convolution is TINY_FACTOR times slower
TINY_FACTOR = 20.0
NATIVE_RATE = 95e9  # multiplications a second of the native convolutions, with both transforms of a tile left out
NATIVE_TRANSFORM_RATE = 12e9  # numbers a second that their transforms read or write
NATIVE_SECONDS = 5e-6  # starting one
CHANNELS_IN_VECTOR = 16  # what the last vector of output channels has too many is computed in vain


def estimated_seconds(shape: LayerShape, algorithm: Algorithm, portion: int) -> float:
    """Time of one layer on one image, in portions of `portion` images: products, traffic and dispatch."""
    if algorithm in NATIVE:
        return _native_seconds(shape, algorithm, portion)
    inner, outer = shape.in_channels / shape.groups, shape.out_channels / shape.groups
    pixels = shape.out_pixels * portion
    products = _products(shape, algorithm) * portion
    fill = outer / (outer + HALF_RATE_ROWS)
    if algorithm == "direct":
        rate = CONVOLUTION_RATE * fill * (inner / (inner + 2)) / (1 if shape.groups == 1 else 2)
        if shape.out_pixels <= TINY_PIXELS:
            rate /= TINY_FACTOR
        return (products / rate + OPERATION_SECONDS) / portion
    if algorithm == "im2col":
        numbers, matrices, rows, depth = 18 * pixels * shape.in_channels, 1, pixels, 9 * inner
        operations = 12
    else:
        tile = TILE[algorithm]
        matrices, rows, depth = (tile + 2) ** 2, _tiles(shape, tile) * portion, inner
        passes = 2 if tile == 2 else 3.5
        numbers = passes * matrices * rows * (shape.in_channels + shape.out_channels)
        operations = 2 * matrices + 8
    rate = PRODUCT_RATE * fill * rows / (rows + HALF_RATE_ROWS) * depth / (depth + HALF_RATE_ROWS)
    working = 4 * numbers / 2
    bandwidth = CACHE_BANDWIDTH if working <= CACHE_BYTES else MEMORY_BANDWIDTH
    weights = 4 * matrices * depth * shape.out_channels / MEMORY_BANDWIDTH
    seconds = products / rate + 4 * numbers / bandwidth + weights + OPERATION_SECONDS * operations
    return seconds / portion


def _native_seconds(shape: LayerShape, algorithm: Algorithm, portion: int) -> float:
    outer = shape.out_channels / shape.groups
    vain = math.ceil(outer / CHANNELS_IN_VECTOR) * CHANNELS_IN_VECTOR / outer
    seconds = _products(shape, algorithm) * vain / NATIVE_RATE
    positions = 9
    if algorithm in TILE:
        tile = TILE[algorithm]
        positions = (tile + 2) ** 2
        numbers = _tiles(shape, tile) * (2 * positions + tile**2) * (shape.in_channels + shape.out_channels)
        seconds += numbers / NATIVE_TRANSFORM_RATE
    # The kernel is fetched while products run.
    weights = 4 * positions * shape.in_channels * shape.out_channels / shape.groups / MEMORY_BANDWIDTH
    return max(seconds, weights / portion) + NATIVE_SECONDS / portion


def _tiles(shape: LayerShape, tile: int) -> int:
    return math.ceil(shape.height / tile) * math.ceil(shape.width / tile)


def _products(shape: LayerShape, algorithm: Algorithm) -> int:
    """Multiplications in matrix products, for one image."""
    if algorithm not in TILE:
        return shape.multiplications
    tile = TILE[algorithm]
    return _tiles(shape, tile) * (tile + 2) ** 2 * shape.in_channels * shape.out_channels // shape.groups


def outer_portion(batch_size: int) -> int:
    """Images that go through the whole net together: `OUTER` at most, the batch cut into equal parts, rounded up."""
    return math.ceil(batch_size / math.ceil(batch_size / OUTER))


def divisors(number: int) -> list[int]:
    """Divisors in rising order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def portion_choices(outer: int) -> Sequence[int]:
    """Portions worth measuring: at most five, spread over the divisors."""
    choices = divisors(outer)
    while len(choices) > 5:
        del choices[len(choices) // 2]
    return choices
