"""The shape of a layer, and a fast cost model for each algorithm on a CPU.

Unless stated otherwise, functions that return seconds estimate one layer on one image, when `portion` images are
computed at a time: products, memory traffic and dispatch. `tile` is Winograd's m; 0 stands for the direct sum.
"""

import dataclasses
import math

# Fitted on two cores of a 2.3 GHz AVX-512 server. Only the ratios matter.
PRODUCT_RATE = 100e9  # multiplications per second of a large float32 matrix product
CONVOLUTION_RATE = 72e9  # multiplications per second of XLA's convolution, if channels fill vectors
HALF_RATE_ROWS = 24.0  # rows (or columns, or depth) at which a matrix product reaches half of PRODUCT_RATE
CACHE_BYTES = 4e6  # larger intermediate results are read from memory
CACHE_BANDWIDTH = 30e9
MEMORY_BANDWIDTH = 12e9
OPERATION_SECONDS = 6e-6  # overhead of one XLA operation
TINY_PIXELS = 4  # up to this many output pixels per image, XLA's convolution is TINY_FACTOR times slower
TINY_FACTOR = 20.0
NATIVE_RATE = 95e9  # multiplications per second of the native convolutions, without a tile's transforms
NATIVE_TRANSFORM_RATE = 12e9  # numbers per second that their transforms read or write
NATIVE_SECONDS = 5e-6  # overhead of one native convolution
CHANNELS_IN_VECTOR = 16  # output channels are padded to whole vectors, and the padding is computed too


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Shape of one convolution on one image: input height and width, channels, stride, groups, dilation."""

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
        """Return the number of Winograd tiles that cover one image."""
        return math.ceil(self.height / tile) * math.ceil(self.width / tile)

    def multiplications(self, tile: int = 0) -> int:
        """Return the multiplications in matrix products, for one image."""
        places = self.tiles(tile) if tile else self.out_pixels
        return places * positions(tile) * self.in_channels * self.out_channels // self.groups


def positions(tile: int) -> int:
    """Return the number of matrices in a kernel: Winograd's positions, or the 9 taps."""
    return (tile + 2) ** 2 if tile else 9


def xla_seconds(shape: LayerShape, portion: int) -> float:
    """Estimate the seconds per image of XLA's convolution."""
    inner, outer = shape.in_channels / shape.groups, shape.out_channels / shape.groups
    rate = CONVOLUTION_RATE * _fill(outer) * (inner / (inner + 2)) / (1 if shape.groups == 1 else 2)
    if shape.out_pixels <= TINY_PIXELS:
        rate /= TINY_FACTOR
    return (shape.multiplications() * portion / rate + OPERATION_SECONDS) / portion


def im2col_seconds(shape: LayerShape, portion: int) -> float:
    """Estimate the seconds per image of one matrix product per group, over gathered columns."""
    rows, depth = shape.out_pixels * portion, 9 * (shape.in_channels / shape.groups)
    numbers = 18 * rows * shape.in_channels
    return _product_seconds(shape, portion, 1, rows, depth, numbers, operations=12)


def winograd_seconds(shape: LayerShape, tile: int, portion: int) -> float:
    """Estimate the seconds per image of Winograd's algorithm in XLA operations."""
    matrices, rows = positions(tile), shape.tiles(tile) * portion
    passes = 2 if tile == 2 else 3.5
    numbers = passes * matrices * rows * (shape.in_channels + shape.out_channels)
    depth = shape.in_channels / shape.groups
    return _product_seconds(shape, portion, matrices, rows, depth, numbers, operations=2 * matrices + 8)


def native_seconds(shape: LayerShape, tile: int, portion: int) -> float:
    """Estimate the seconds per image of the C++ convolutions."""
    outer = shape.out_channels / shape.groups
    padding = math.ceil(outer / CHANNELS_IN_VECTOR) * CHANNELS_IN_VECTOR / outer
    seconds = shape.multiplications(tile) * padding / NATIVE_RATE
    if tile:
        numbers = shape.tiles(tile) * (2 * positions(tile) + tile**2) * (shape.in_channels + shape.out_channels)
        seconds += numbers / NATIVE_TRANSFORM_RATE
    # The kernel is fetched while the products run.
    weights = 4 * positions(tile) * shape.in_channels * shape.out_channels / shape.groups / MEMORY_BANDWIDTH
    return max(seconds, weights / portion) + NATIVE_SECONDS / portion


def native_training_seconds(shape: LayerShape, tile: int, images: int) -> float:
    """Estimate the seconds of a C++ convolution and both its gradients for a whole batch.

    In training, the transformed kernels pass through memory at every step: those of the convolution and of the input
    gradient are written and read; the sums that form the kernel gradient are cleared, added to and read.
    """
    transforms = 8 * 4 * positions(tile) * shape.in_channels * shape.out_channels / shape.groups
    return 3 * images * native_seconds(shape, tile, images) + transforms / MEMORY_BANDWIDTH


def _product_seconds(
    shape: LayerShape, portion: int, matrices: int, rows: int, depth: float, numbers: float, *, operations: int
) -> float:
    """Estimate `matrices` products `[rows, depth] @ [depth, C_out]` with `numbers` written and read around them."""
    fill = _fill(shape.out_channels / shape.groups)
    rate = PRODUCT_RATE * fill * rows / (rows + HALF_RATE_ROWS) * depth / (depth + HALF_RATE_ROWS)
    working = 4 * numbers / 2
    bandwidth = CACHE_BANDWIDTH if working <= CACHE_BYTES else MEMORY_BANDWIDTH
    multiplied = matrices * rows * depth * shape.out_channels
    weights = 4 * matrices * depth * shape.out_channels / MEMORY_BANDWIDTH
    return (multiplied / rate + 4 * numbers / bandwidth + weights + OPERATION_SECONDS * operations) / portion


def _fill(outer: float) -> float:
    """Return the fraction of its peak rate that a matrix product with `outer` columns reaches."""
    return outer / (outer + HALF_RATE_ROWS)
