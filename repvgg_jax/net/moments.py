"""Means and variances over a batch: of an image, and of what a pointwise convolution makes of it.

BN needs a branch's mean and variance before the branch can be added to a block's sum. Those of a 1x1 convolution follow
from its input's mean `m` and covariance `S`: `W^T m` and `diag(W^T S W)`. So the 1x1 and the identity branch of a block
need not be computed, written to memory, reduced and read again: normalised, they are one 1x1 convolution, known before
anything of them is computed. On accelerators a training step takes the time of its memory traffic, and that saves a
fifth of it.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..broadcasting import channelwise
from ..conv.sharding import varying_axes, varying_over
from ..conv.xla import xla_conv
from .kernel_algebra import EXACT, constant_response


class Moments(NamedTuple):
    """Mean and (biased) variance of every channel, `[C]`, over so many `pixels`."""

    mean: Array
    var: Array
    pixels: int


def moments_of(x: Array, running_mean: Array) -> Moments:
    """Return the moments of `x` `[N, H, W, C]`, which is read once, in the dtype of `running_mean` `[C]`.

    The variance is `E[(x - s)^2] - E[x - s]^2` with `s` near the mean, so that nothing of weight cancels: the mean of
    every image's pixel in the middle. On TPUs, which reduce a convolution's result while they compute it, `s` must be
    known before, and is the running mean.
    """

    def pixels_mean(x: Array, running_mean: Array) -> Array:
        return x[:, x.shape[1] // 2, x.shape[2] // 2].astype(running_mean.dtype).mean(0)

    running_mean = varying_over(varying_axes(x), running_mean)
    shift = lax.platform_dependent(
        lax.stop_gradient(x), running_mean, tpu=lambda x, running_mean: running_mean, default=pixels_mean
    )
    return moments_about(x, shift)


def moments_about(x: Array, shift: Array) -> Moments:
    """Return the moments of `x` `[N, H, W, C]`, read once; the nearer `shift` `[C]` is to the mean, the more exact."""
    shift = lax.stop_gradient(shift)
    above = x.astype(shift.dtype) - channelwise(shift, x.ndim)
    mean, square = above.mean((0, 1, 2)), jnp.square(above).mean((0, 1, 2))
    return Moments(shift + mean, jnp.maximum(square - jnp.square(mean), 0), x.size // x.shape[-1])


class ImageMoments(NamedTuple):
    """What the moments of every pointwise convolution of an image follow from.

    Attributes:
      mean: `[C]`.
      covariance: `[C, C]`.
      pixels: how many.
    """

    mean: Array
    covariance: Array
    pixels: int

    def response(self, kernel: Array) -> Array:
        """Return what the convolution with a kernel `[1, 1, C / groups, C_out]` makes of the mean, `[C_out]`."""
        return constant_response(kernel, self.mean, self.mean.shape[0] // kernel.shape[2])

    def response_variance(self, kernel: Array) -> Array:
        """Return the variance of the convolution with a kernel `[1, 1, C / groups, C_out]`, `[C_out]`."""
        per_group, outputs = kernel.shape[2:]
        groups = self.mean.shape[0] // per_group
        blocks = self.covariance.reshape(groups, per_group, groups, per_group)
        within = jnp.stack([blocks[group, :, group] for group in range(groups)])
        taps = kernel.reshape(per_group, groups, -1)
        product = jnp.einsum("gij,jgo->igo", within, taps, precision=EXACT)
        return jnp.maximum((taps * product).sum(0).reshape(outputs), 0)


def image_moments(x: Array, dtype: Any) -> ImageMoments:
    """Return the moments of `x` `[N, H, W, C]` in `dtype`, which is wider than that of `x`.

    Products of two numbers of `x` are exact in `dtype`; what cancels on the way to the covariance lies below the
    resolution of `x`. Reverse-mode differentiable.
    """
    mean, covariance = cast("tuple[Array, Array]", _mean_and_covariance(x, dtype))
    return ImageMoments(mean, covariance, x.size // x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _mean_and_covariance(x: Array, dtype: Any) -> tuple[Array, Array]:
    return _moments(x, dtype)


def _moments(x: Array, dtype: Any) -> tuple[Array, Array]:
    flat = x.reshape(-1, x.shape[-1])
    mean = flat.astype(dtype).mean(0)
    second = lax.dot_general(flat, flat, (((0,), (0,)), ((), ())), preferred_element_type=dtype) / len(flat)
    return mean, second - jnp.outer(mean, mean)


def _forward(x: Array, dtype: Any) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    mean, covariance = _moments(x, dtype)
    return (mean, covariance), (x, mean)


def _backward(dtype: Any, saved: tuple[Array, Array], gradients: tuple[Array, Array]) -> tuple[Array]:
    x, mean = saved
    to_mean, to_covariance = (gradient / (x.size // x.shape[-1]) for gradient in gradients)
    kernel = (to_covariance + to_covariance.T).astype(x.dtype)[None, None]
    # Of x - mean, with the kernel as it was rounded.
    bias = to_mean - constant_response(kernel.astype(dtype), mean)
    return (xla_conv(x, kernel, stride=1, groups=1, dilation=1) + channelwise(bias.astype(x.dtype)),)


_mean_and_covariance.defvjp(_forward, _backward)
