"""Means and variances over a batch, of an image and of a pointwise convolution's output.

BN needs a branch's mean and variance before the branch can be added to a block's sum. Those of a 1x1 convolution follow
from its input's mean `m` and covariance `S`: `W^T m` and `diag(W^T S W)`. So the 1x1 and identity branches of a block
need not be computed, written to memory, reduced and read again: after normalisation they are one 1x1 convolution, whose
kernel is known in advance. On accelerators a training step is limited by memory traffic, and this saves a fifth of it.
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
    """Mean and (biased) variance of every channel, `[C]`, over `pixels` pixels."""

    mean: Array
    var: Array
    pixels: int


def moments_of(x: Array, running_mean: Array) -> Moments:
    """Return the moments of `x` `[N, H, W, C]` in the dtype of `running_mean` `[C]`, reading `x` once.

    The variance is `E[(x - s)^2] - E[x - s]^2` with `s` near the mean, to avoid cancellation: `s` is the mean over the
    centre pixel of every image. TPUs reduce a convolution's output while computing it, so there `s` must be known in
    advance and is the running mean.
    """

    def pixels_mean(x: Array, running_mean: Array) -> Array:
        return x[:, x.shape[1] // 2, x.shape[2] // 2].astype(running_mean.dtype).mean(0)

    running_mean = varying_over(varying_axes(x), running_mean)
    shift = lax.platform_dependent(
        lax.stop_gradient(x), running_mean, tpu=lambda x, running_mean: running_mean, default=pixels_mean
    )
    return moments_about(x, shift)


def moments_about(x: Array, shift: Array) -> Moments:
    """Return the moments of `x` `[N, H, W, C]`, reading it once; more exact the nearer `shift` `[C]` is to the mean."""
    shift = lax.stop_gradient(shift)
    above = x.astype(shift.dtype) - channelwise(shift, x.ndim)
    mean, square = above.mean((0, 1, 2)), jnp.square(above).mean((0, 1, 2))
    return Moments(shift + mean, jnp.maximum(square - jnp.square(mean), 0), x.size // x.shape[-1])


class ImageMoments(NamedTuple):
    """Moments of an image, from which those of any pointwise convolution of it follow.

    Attributes:
      mean: `[C]`.
      covariance: `[C, C]`.
      pixels: number of pixels.
    """

    mean: Array
    covariance: Array
    pixels: int

    def response(self, kernel: Array) -> Array:
        """Return the output `[C_out]` of the convolution with a kernel `[1, 1, C / groups, C_out]` for the mean."""
        return constant_response(kernel, self.mean, self.mean.shape[0] // kernel.shape[2])

    def response_variance(self, kernel: Array) -> Array:
        """Return the variance `[C_out]` of the output of the convolution with a kernel `[1, 1, C / groups, C_out]`."""
        per_group, outputs = kernel.shape[2:]
        groups = self.mean.shape[0] // per_group
        blocks = self.covariance.reshape(groups, per_group, groups, per_group)
        within = jnp.stack([blocks[group, :, group] for group in range(groups)])
        taps = kernel.reshape(per_group, groups, -1)
        product = jnp.einsum("gij,jgo->igo", within, taps, precision=EXACT)
        return jnp.maximum((taps * product).sum(0).reshape(outputs), 0)


def image_moments(x: Array, dtype: Any) -> ImageMoments:
    """Return the moments of `x` `[N, H, W, C]` in `dtype`, which is wider than that of `x`.

    Products of two elements of `x` are exact in `dtype`; the error from cancellation in the covariance is below the
    resolution of `x`. Differentiable in reverse mode.
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
    # For x - mean, with the rounded kernel.
    bias = to_mean - constant_response(kernel.astype(dtype), mean)
    return (xla_conv(x, kernel, stride=1, groups=1, dilation=1) + channelwise(bias.astype(x.dtype)),)


_mean_and_covariance.defvjp(_forward, _backward)
