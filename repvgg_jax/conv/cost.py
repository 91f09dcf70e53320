"""The shape of a layer, and what it costs on a CPU in each manner of computing it: a model that answers at once.

Every function of seconds is of one layer on one image, in portions of so many images: products, traffic and dispatch.
`tile` is Winograd's m; 0 stands for the direct sum.
"""

import dataclasses
import math

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

    def tiles(self, tile: int) -> int:
        """Return how many Winograd tiles cover one image."""
        return math.ceil(self.height / tile) * math.ceil(self.width / tile)

    def multiplications(self, tile: int = 0) -> int:
        """Return those in matrix products, for one image."""
        places = self.tiles(tile) if tile else self.out_pixels
        return places * positions(tile) * self.in_channels * self.out_channels // self.groups


def positions(tile: int) -> int:
    """Return how many matrices a kernel consists of: Winograd's positions, or the 9 taps."""
    return (tile + 2) ** 2 if tile else 9


def xla_seconds(shape: LayerShape, portion: int) -> float:
    """Estimate XLA's own convolution."""
    inner, outer = shape.in_channels / shape.groups, shape.out_channels / shape.groups
    rate = CONVOLUTION_RATE * _fill(outer) * (inner / (inner + 2)) / (1 if shape.groups == 1 else 2)
    if shape.out_pixels <= TINY_PIXELS:
        rate /= TINY_FACTOR
    return (shape.multiplications() * portion / rate + OPERATION_SECONDS) / portion


def im2col_seconds(shape: LayerShape, portion: int) -> float:
    """Estimate one matrix product for each group, over gathered columns."""
    rows, depth = shape.out_pixels * portion, 9 * (shape.in_channels / shape.groups)
    numbers = 18 * rows * shape.in_channels
    return _product_seconds(shape, portion, 1, rows, depth, numbers, operations=12)


def winograd_seconds(shape: LayerShape, tile: int, portion: int) -> float:
    """Estimate Winograd's algorithm in XLA's operations."""
    matrices, rows = positions(tile), shape.tiles(tile) * portion
    passes = 2 if tile == 2 else 3.5
    numbers = passes * matrices * rows * (shape.in_channels + shape.out_channels)
    depth = shape.in_channels / shape.groups
    return _product_seconds(shape, portion, matrices, rows, depth, numbers, operations=2 * matrices + 8)


def native_seconds(shape: LayerShape, tile: int, portion: int) -> float:
    """Estimate the convolutions in C++."""
    outer = shape.out_channels / shape.groups
    vain = math.ceil(outer / CHANNELS_IN_VECTOR) * CHANNELS_IN_VECTOR / outer
    seconds = shape.multiplications(tile) * vain / NATIVE_RATE
    if tile:
        numbers = shape.tiles(tile) * (2 * positions(tile) + tile**2) * (shape.in_channels + shape.out_channels)
        seconds += numbers / NATIVE_TRANSFORM_RATE
    # The kernel is fetched while products run.
    weights = 4 * positions(tile) * shape.in_channels * shape.out_channels / shape.groups / MEMORY_BANDWIDTH
    return max(seconds, weights / portion) + NATIVE_SECONDS / portion


def native_training_seconds(shape: LayerShape, tile: int, images: int) -> float:
    """Estimate a whole batch of the convolutions in C++ with both gradients.

    There the kernel's transforms come and go at every step: those of the convolution and of the input's gradient are
    written and read, the sums that become the kernel's gradient are cleared, added to and read.
    """
    transforms = 8 * 4 * positions(tile) * shape.in_channels * shape.out_channels / shape.groups
    return 3 * images * native_seconds(shape, tile, images) + transforms / MEMORY_BANDWIDTH


def _product_seconds(
    shape: LayerShape, portion: int, matrices: int, rows: int, depth: float, numbers: float, *, operations: int
) -> float:
    """So many matrix products `[rows, depth] @ [depth, C_out]`, around which `numbers` are written and read again."""
    fill = _fill(shape.out_channels / shape.groups)
    rate = PRODUCT_RATE * fill * rows / (rows + HALF_RATE_ROWS) * depth / (depth + HALF_RATE_ROWS)
    working = 4 * numbers / 2
    bandwidth = CACHE_BANDWIDTH if working <= CACHE_BYTES else MEMORY_BANDWIDTH
    multiplied = matrices * rows * depth * shape.out_channels
    weights = 4 * matrices * depth * shape.out_channels / MEMORY_BANDWIDTH
    return (multiplied / rate + 4 * numbers / bandwidth + weights + OPERATION_SECONDS * operations) / portion


def _fill(outer: float) -> float:
    """The share of its rate that a matrix product of so many columns reaches."""
    return outer / (outer + HALF_RATE_ROWS)
