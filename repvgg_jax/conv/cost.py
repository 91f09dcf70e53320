"""The shape of a layer, and what it costs by each algorithm on a CPU: a model that answers at once."""

import dataclasses
import math

from . import native
from .deploy import ALGORITHMS, NATIVE, TILE, XLA, Algorithm, supports


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
    multiplied = products(shape, algorithm) * portion
    fill = outer / (outer + HALF_RATE_ROWS)
    if algorithm == "direct":
        rate = CONVOLUTION_RATE * fill * (inner / (inner + 2)) / (1 if shape.groups == 1 else 2)
        if shape.out_pixels <= TINY_PIXELS:
            rate /= TINY_FACTOR
        return (multiplied / rate + OPERATION_SECONDS) / portion
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
    seconds = multiplied / rate + 4 * numbers / bandwidth + weights + OPERATION_SECONDS * operations
    return seconds / portion


def _native_seconds(shape: LayerShape, algorithm: Algorithm, portion: int) -> float:
    outer = shape.out_channels / shape.groups
    vain = math.ceil(outer / CHANNELS_IN_VECTOR) * CHANNELS_IN_VECTOR / outer
    seconds = products(shape, algorithm) * vain / NATIVE_RATE
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


def products(shape: LayerShape, algorithm: Algorithm) -> int:
    """Multiplications in matrix products, for one image."""
    if algorithm not in TILE:
        return shape.multiplications
    tile = TILE[algorithm]
    return _tiles(shape, tile) * (tile + 2) ** 2 * shape.in_channels * shape.out_channels // shape.groups
