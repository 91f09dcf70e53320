"""The algebra of structural re-parameterisation: pure, differentiable functions on kernels and biases.

A convolution is a pair: kernel `[k, k, C_in / groups, C_out]` and bias `[C_out]`. Any affine, shift-invariant function
of a k x k neighbourhood can be written as such a pair, and pairs of the same shape, stride and dilation can be added.

Sources: RepVGG (arXiv 2101.03697, section 3.3); Diverse Branch Block (arXiv 2103.13425, transforms I to VI).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..broadcasting import channelwise

BN_EPSILON = 1e-5
EXACT = lax.Precision.HIGHEST
"""Without it, GPUs and TPUs round the factors of float32 products."""

Pair = tuple[Array, Array]
"""Kernel `[k, k, C_in / groups, C_out]` and bias `[C_out]` of one convolution."""


def fuse_conv_bn(
    kernel: Array,
    bn_params: Mapping[str, Array],
    bn_stats: Mapping[str, Array],
    epsilon: float = BN_EPSILON,
    bias: Array | None = None,
) -> Pair:
    """Return the convolution that equals a convolution followed by BN in inference.

    Args:
      kernel: `[k, k, C_in / groups, C_out]`.
      bn_params: `{"scale": [C_out], "bias": [C_out]}` (gamma, beta).
      bn_stats: `{"mean": [C_out], "var": [C_out]}`, the running statistics.
      epsilon: constant that the BN adds to the variance.
      bias: bias of the convolution, `[C_out]`; None if it has no bias.
    """
    factor = bn_params["scale"] / jnp.sqrt(bn_stats["var"] + epsilon)
    mean = bn_stats["mean"] if bias is None else bn_stats["mean"] - bias
    return kernel * channelwise(factor, kernel.ndim), bn_params["bias"] - mean * factor


def add_branches(pairs: Iterable[Pair]) -> Pair:
    """Return the convolution that equals the sum of several that read the same image."""
    kernels, biases = zip(*pairs, strict=True)
    kernel, bias = kernels[0], biases[0]
    for more_kernel, more_bias in zip(kernels[1:], biases[1:], strict=True):
        kernel, bias = kernel + more_kernel, bias + more_bias
    return kernel, bias


def embed(kernel: Array, size: int = 3) -> Array:
    """Return a kernel `[h, w, I, O]` zero-padded to `[size, size, I, O]`, centred; all sizes are odd."""
    rows, columns = ((size - length) // 2 for length in kernel.shape[:2])
    return jnp.pad(kernel, ((rows, rows), (columns, columns), (0, 0), (0, 0)))


def average_1x1(kernel: Array, size: int = 3) -> Array:
    """Return a 1x1 convolution `[1, 1, I, O]` followed by average pooling of `size` x `size` pixels, as one kernel.

    For an identity kernel, the result is average pooling itself. A bias passes through unchanged, because the average
    includes the padding, which must hold the bias, as in `chain_1x1`.
    """
    return jnp.broadcast_to(kernel / size**2, (size, size, *kernel.shape[2:]))


def chain_1x1(first: Pair, second: Pair, groups: int = 1) -> Pair:
    """Return the k x k convolution that equals a 1x1 convolution followed by a k x k one with the same groups.

    This holds at the image's edges only if the second convolution pads with the first one's output for zero input,
    which is its bias, instead of zero.

    Args:
      first: `[1, 1, C_in / groups, C_mid]` and `[C_mid]`.
      second: `[k, k, C_mid / groups, C_out]` and `[C_out]`.
      groups: groups of both convolutions.

    Returns:
      `[k, k, C_in / groups, C_out]` and `[C_out]`.
    """
    (point, point_bias), (kernel, bias) = first, second
    size, _, middle, _ = kernel.shape
    point = point.reshape(point.shape[2], groups, middle)
    kernel = kernel.reshape(size, size, middle, groups, -1)
    chained = jnp.einsum("igm,hwmgo->hwigo", point, kernel, precision=EXACT)
    chained = chained.reshape(size, size, point.shape[0], -1)
    return chained, bias + constant_response(second[0], point_bias, groups)


def constant_response(kernel: Array, value: Array, groups: int = 1) -> Array:
    """Return a convolution's output `[C_out]` for an image that is `value` `[C_in]` everywhere, padding included."""
    taps = kernel.sum((0, 1)).reshape(kernel.shape[2], groups, -1)
    return jnp.einsum("gi,igo->go", value.reshape(groups, -1), taps, precision=EXACT).reshape(-1)


def identity_kernel(channels: int, groups: int, dtype: Any = jnp.float32) -> Array:
    """Return the 3x3 kernel `[3, 3, channels / groups, channels]` whose (grouped) convolution returns its input.

    Output channel `i` reads input channel `i mod (channels / groups)` of its group.
    """
    per_group = channels // groups
    outputs = jnp.arange(channels)
    return jnp.zeros((3, 3, per_group, channels), dtype).at[1, 1, outputs % per_group, outputs].set(1)
