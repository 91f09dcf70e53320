"""XLA's convolution, the same convolution as matrix products, and helpers for both."""

from collections.abc import Callable

from jax import Array, lax
from jax import numpy as jnp

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")
TPU_LANES = 128
"""Channels in a TPU's vector."""


def xla_conv(x: Array, kernel: Array, *, stride: int, groups: int, dilation: int) -> Array:
    """Convolve with XLA's operation, without bias, padded so that the output size depends only on the stride.

    Equal to `torch.nn.Conv2d(…, padding=dilation * (k // 2), bias=False)`: with stride 2 it pads before *and* after,
    unlike Flax's `"SAME"`.

    Args:
      x: `[N, H, W, C_in]`.
      kernel: `[k, k, C_in // groups, C_out]`, k 1 or 3, same dtype as `x`.
      stride: 1 or 2.
      groups: groups of the convolution.
      dilation: distance between the kernel's taps in pixels.

    Returns:
      `[N, ceil(H / stride), ceil(W / stride), C_out]`.
    """
    pad = dilation * (kernel.shape[0] // 2)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=DIMENSION_NUMBERS,
        feature_group_count=groups,
    )


def groups_per_vector(groups: int, inputs: int) -> int:
    """Return how many groups of `inputs` channels fit in one of a TPU's vectors, as a divisor of `groups`."""
    fitting = (count for count in range(2, groups + 1) if groups % count == 0 and count * inputs <= TPU_LANES)
    return max(fitting, default=1)


def merged_groups(kernel: Array, groups: int, together: int) -> Array:
    """Return the kernel of the same convolution with `together` groups as one, and zeros between them.

    Args:
      kernel: `[k, k, C_in // groups, C_out]`.
      groups: groups of the convolution.
      together: a divisor of `groups`.

    Returns:
      `[k, k, together * C_in // groups, C_out]`, for a convolution with `groups // together` groups.
    """
    size, _, inputs, outputs = kernel.shape
    parts = kernel.reshape(size, size, 1, inputs, groups // together, together, outputs // groups)
    own = jnp.eye(together, dtype=kernel.dtype).reshape(1, 1, together, 1, 1, together, 1)
    return (parts * own).reshape(size, size, together * inputs, outputs)


def product_conv(x: Array, kernel: Array, *, stride: int, groups: int, dilation: int) -> Array:
    """Compute the same as `xla_conv`, as one matrix product per group over gathered columns (im2col)."""

    def product(x: Array, kernel: Array) -> Array:
        columns = jnp.concatenate(taps(x, kernel.shape[0], stride, dilation), axis=3)
        return columns @ kernel.reshape(-1, kernel.shape[3])

    return by_group(product, groups, x, kernel)


def taps(x: Array, size: int, stride: int, dilation: int) -> list[Array]:
    """Return the input pixels under each of the kernel's positions: `size * size` arrays `[N, H', W', C]`."""
    pad = dilation * (size // 2)
    rows, columns = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return [
        x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
        for i in range(0, size * dilation, dilation)
        for j in range(0, size * dilation, dilation)
    ]


def by_group(function: Callable[[Array, Array], Array], groups: int, x: Array, other: Array) -> Array:
    """Apply `function` to each group of channels and concatenate the results."""
    pairs = zip(jnp.split(x, groups, axis=3), jnp.split(other, groups, axis=3), strict=True)
    return jnp.concatenate([function(a, b) for a, b in pairs], axis=3)


def out_pixels(x: Array, stride: int) -> int:
    """Return the number of output pixels per image of a convolution with stride `stride`."""
    return -(-x.shape[1] // stride) * -(-x.shape[2] // stride)


def on_cpu(cpu: Callable, default: Callable, *arguments: Array):
    """Return `cpu(*arguments)` if compiled for a CPU, else `default(*arguments)`."""
    return lax.platform_dependent(*arguments, cpu=cpu, default=default)
