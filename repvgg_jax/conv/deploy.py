"""How a deploy-form 3x3 convolution is computed: seven algorithms behind one signature.

Costs a layer with `P` output pixels (over the batch), in multiplications and in float32 numbers that pass through
memory besides input, kernel and output:

| algorithm | strides | multiplications | numbers written and read again |
|---|---|---|---|
| direct | 1, 2 | 9 `P` `C_in` `C_out` / groups | none (XLA's own convolution packs as it goes) |
| im2col | 1, 2 | the same, as one matrix product | 9 `P` `C_in` |
| winograd2 | 1 | 4 `P` `C_in` `C_out` / groups | 4 `P` (`C_in` + `C_out`), see `winograd` |
| winograd4 | 1 | 2.25 `P` `C_in` `C_out` / groups | about 4 `P` (`C_in` + `C_out`) |
| native | 1, 2 | as direct | input, once in the cache |
| native_winograd2, native_winograd4 | 1 | as winograd2, winograd4 | none: tiles stay in the cache |

The last three are C++ for CPUs, float32, where a compiler is found (`native`); the others are XLA's operations.
Which is fastest depends on layer, batch and machine: `planner` chooses.
"""

from typing import Literal, get_args

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

from ..broadcasting import channelwise
from . import native
from .winograd import transform_kernel, winograd

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")

Algorithm = Literal["direct", "im2col", "winograd2", "winograd4", "native", "native_winograd2", "native_winograd4"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
XLA: tuple[Algorithm, ...] = ("direct", "im2col", "winograd2", "winograd4")
NATIVE: tuple[Algorithm, ...] = ("native", "native_winograd2", "native_winograd4")
TILE: dict[Algorithm, int] = {"winograd2": 2, "winograd4": 4, "native_winograd2": 2, "native_winograd4": 4}
"""Winograd's m."""


def conv3x3(x: Array, kernel: Array, bias: Array, *, stride: int = 1, groups: int = 1, dilation: int = 1) -> Array:
    """3x3 convolution with `dilation` pixels of zero padding on every side, plus bias; XLA's own convolution.

    PyTorch's `Conv2d(kernel_size=3, padding=dilation)`: with stride 2 it pads before *and* after, which Flax's
    `"SAME"` does not.

    Args:
      x: `[N, H, W, C_in]`.
      kernel: `[3, 3, C_in // groups, C_out]`, same dtype as `x`.
      bias: `[C_out]`.
      stride: 1 or 2.
      groups: groups of the convolution.
      dilation: pixels between the kernel's taps.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), C_out]`.
    """
    out = lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((dilation, dilation), (dilation, dilation)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=DIMENSION_NUMBERS,
        feature_group_count=groups,
    )
    return out + channelwise(bias)


def supports(algorithm: Algorithm, stride: int, dilation: int = 1) -> bool:
    """Whether `algorithm` can compute a convolution of that stride and dilation."""
    return algorithm == "direct" or (dilation == 1 and (algorithm not in TILE or stride == 1))


def prepare_kernel(kernel: np.ndarray, algorithm: Algorithm, *, groups: int = 1) -> np.ndarray:
    """The kernel as `convolve` wants it for `algorithm`; done once, ahead of time.

    Args:
      kernel: `[3, 3, C_in // groups, C_out]`.
      algorithm: one of `ALGORITHMS`.
      groups: groups of the convolution.

    Returns:
      direct: the kernel; im2col: `[groups, 9 * C_in // groups, C_out // groups]`; Winograd with tile m:
      `[groups, (m + 2)^2, C_in // groups, C_out // groups]`; the native ones: as `native.pack_kernel` packs it.
    """
    if algorithm == "direct":
        return kernel
    parts = np.split(kernel, groups, axis=3)
    if algorithm == "im2col":
        return np.stack([part.reshape(-1, part.shape[3]) for part in parts])
    if algorithm == "native":
        return native.pack_kernel(np.stack([part.reshape(9, *part.shape[2:]) for part in parts]))
    transformed = np.stack([transform_kernel(part, TILE[algorithm]) for part in parts])
    return native.pack_kernel(transformed) if algorithm in NATIVE else transformed


def convolve(
    x: Array,
    prepared: Array,
    bias: Array,
    *,
    algorithm: Algorithm = "direct",
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    relu: bool = False,
) -> Array:
    """`conv3x3` by a chosen algorithm, on a kernel from `prepare_kernel`, followed by ReLU if asked for.

    Args:
      x: `[N, H, W, C_in]`, any height and width.
      prepared: the kernel, prepared for this algorithm and these groups.
      bias: `[C_out]`.
      algorithm: one of `ALGORITHMS`; the Winograd ones need stride 1, and only `direct` can be dilated.
      stride: 1 or 2.
      groups: groups of the convolution.
      dilation: pixels between the kernel's taps.
      relu: whether ReLU follows.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), C_out]`.

    Raises:
      ValueError: the algorithm cannot do that stride, dilation or dtype.
    """
    if not supports(algorithm, stride):
        raise ValueError(f"{algorithm} needs stride 1, not {stride}")
    if not supports(algorithm, stride, dilation):
        raise ValueError(f"{algorithm} needs dilation 1, not {dilation}")
    if algorithm in NATIVE:
        if x.dtype != jnp.float32:
            raise ValueError(f"{algorithm} computes in float32, not {x.dtype}")
        tile = TILE.get(algorithm, 0)
        return native.convolve(x, prepared, bias, tile=tile, stride=stride, groups=groups, relu=relu)
    if algorithm in TILE:
        return winograd(x, prepared, bias, tile=TILE[algorithm], groups=groups, relu=relu)
    if algorithm == "im2col":
        y = _im2col(x, prepared, stride) + channelwise(bias)
    else:
        y = conv3x3(x, prepared, bias, stride=stride, groups=groups, dilation=dilation)
    return jnp.maximum(y, 0) if relu else y


def _im2col(x: Array, kernel: Array, stride: int) -> Array:
    """One matrix product a group: `[N * H' * W', 9 * C_in / groups] @ [9 * C_in / groups, C_out / groups]`."""
    n, height, width, channels = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [
        x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
        for i in range(3)
        for j in range(3)
    ]
    inner = channels // kernel.shape[0]
    parts = []
    for group, matrix in enumerate(kernel):
        own = [tap[..., group * inner : (group + 1) * inner] for tap in taps]
        parts.append(jnp.concatenate(own, axis=3).reshape(n * rows * columns, -1) @ matrix)
    return jnp.concatenate(parts, axis=1).reshape(n, rows, columns, -1)
