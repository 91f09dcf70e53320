"""Flax layers of branches and heads, with PyTorch's statistics, padding and initial values."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from ..broadcasting import channelwise
from ..conv.deploy import deploy_conv
from ..conv.training import training_conv
from .kernel_algebra import BN_EPSILON, constant_response, embed
from .moments import Moments, moments_of

Dtype = Any

BN_MOMENTUM = 0.9  # PyTorch's momentum is 0.1: it is the weight of the new value, Flax's that of the old one

# PyTorch's kaiming_uniform(a=sqrt(5)): uniform with bound 1 / sqrt(fan_in).
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int) -> nn.initializers.Initializer:
    """Return PyTorch's default bias initialiser: uniform with bound 1 / sqrt(fan_in), the kernel's fan-in."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return (2 * bound) * nn.initializers.uniform(1.0)(key, shape, dtype) - bound

    return init


class BatchNorm(nn.Module):
    """Batch normalisation over `[N, H, W, C]` with PyTorch's running statistics (`torch.nn.BatchNorm2d`).

    Batches are normalised with the biased variance; the *running* variance is the unbiased one (times n / (n - 1)),
    unlike in `flax.linen.BatchNorm`. Statistics are in `param_dtype`, whatever `dtype` is.
    """

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    epsilon: float = BN_EPSILON

    def __call__(self, x: Array, train: bool = False) -> Array:
        mean, factor, bias = (channelwise(term, x.ndim) for term in self._terms_of(x, train))
        return ((x.astype(self.param_dtype) - mean) * factor + bias).astype(self.dtype)

    def above_zero(self, x: Array, train: bool = False) -> tuple[Array, Array]:
        """Return the output as two summands: the part that depends on `x`, and the output `[C]` for zero input."""
        mean, factor, bias = self._terms_of(x, train)
        from_x = x.astype(self.param_dtype) * channelwise(factor, x.ndim)
        return from_x.astype(self.dtype), (bias - mean * factor).astype(self.dtype)

    def terms_for(self, moments: Moments) -> tuple[Array, Array]:
        """Return `factor` and `bias` `[C]` for a training batch with these moments: `(x - mean) * factor + bias`."""
        _, factor, bias = self._terms(moments.mean.shape, lambda _: moments)
        return factor, bias

    def _terms_of(self, x: Array, train: bool) -> tuple[Array, Array, Array]:
        return self._terms(x.shape[-1:], functools.partial(moments_of, x) if train else None)

    @nn.compact
    def _terms(
        self, channels: tuple[int, ...], batch_moments: Callable[[Array], Moments] | None
    ) -> tuple[Array, Array, Array]:
        """Return `mean`, `factor` and `bias` `[C]`: the output is `(x - mean) * factor + bias`."""
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)

        if batch_moments is not None:
            mean, var, count = batch_moments(running_mean.value)
            if not self.is_initializing():
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value = BN_MOMENTUM * running_mean.value + (1 - BN_MOMENTUM) * mean
                running_var.value = BN_MOMENTUM * running_var.value + (1 - BN_MOMENTUM) * unbiased
        else:
            mean, var = running_mean.value, running_var.value

        return mean, scale * lax.rsqrt(var + self.epsilon), bias


class Conv(nn.Module):
    """Convolution without bias, with PyTorch's padding: leaf `kernel [h, w, C_in / groups, C_out]`.

    A 1x3 or 3x1 kernel is computed as a 3x3 kernel padded with zeros.
    `pedestal` `[C_in]` is a value added to `x` everywhere, including the padding.
    """

    features: int
    kernel_size: tuple[int, int]
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def weights(self, in_channels: int) -> Array:
        """Return the leaf `kernel`."""
        shape = (*self.kernel_size, in_channels // self.groups, self.features)
        return self.param("kernel", torch_kernel_init, shape, self.param_dtype)

    def __call__(self, x: Array, train: bool = False, pedestal: Array | None = None) -> Array:
        kernel = self.weights(x.shape[-1])
        compute = training_conv if train else deploy_conv  # training_conv supports only reverse mode
        kernel = (kernel if len(set(self.kernel_size)) == 1 else embed(kernel)).astype(self.dtype)
        y = compute(x.astype(self.dtype), kernel, self.stride, self.groups, self.dilation)
        return y if pedestal is None else y + channelwise(constant_response(kernel, pedestal, self.groups))


class ConvBN(nn.Module):
    """Convolution without bias, with PyTorch's padding, then BatchNorm (the authors' `conv_bn`)."""

    features: int
    kernel_size: int
    stride: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    epsilon: float = BN_EPSILON

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Conv(self.features, (self.kernel_size, self.kernel_size), self.stride, **dtypes, name="conv")(x, train)
        return BatchNorm(**dtypes, epsilon=self.epsilon, name="bn")(x, train)


class Constant(nn.Module):
    """Multiplication of `x` by the constant leaf `scale []` in `batch_stats`, which is 1."""

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        del train
        scale = self.variable("batch_stats", "scale", jnp.ones, (), self.param_dtype)
        return x * scale.value.astype(self.dtype)


def average_pool(x: Array, stride: int = 1, dilation: int = 1) -> Array:
    """Average over 3x3 pixels `dilation` apart, zero padding included (`torch.nn.AvgPool2d(3, stride, 1)`).

    `[N, H, W, C] -> [N, ceil(H / stride), ceil(W / stride), C]`.
    """
    pad = (dilation, dilation)
    total = lax.reduce_window(
        x,
        0.0,
        lax.add,
        window_dimensions=(1, 3, 3, 1),
        window_strides=(1, stride, stride, 1),
        padding=((0, 0), pad, pad, (0, 0)),
        window_dilation=(1, dilation, dilation, 1),
    )
    return total / 9
