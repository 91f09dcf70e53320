"""The RepVGG block in its training and its deploy form, and the layers they are made of (paper section 3)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from .training_conv import materialize, plain_conv, training_conv
from .variants import SqueezeExcitePlace

Dtype = Any

BN_EPSILON = 1e-5
BN_MOMENTUM = 0.9  # PyTorch's momentum 0.1: it weighs the new value, Flax's the old

# PyTorch's kaiming_uniform(a=sqrt(5)): uniform with bound 1 / sqrt(fan_in).
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default bias initialiser: uniform with bound 1 / sqrt(fan_in), the kernel's fan-in."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return (2 * bound) * nn.initializers.uniform(1.0)(key, shape, dtype) - bound

    return init


class BatchNorm(nn.Module):
    """Batch normalisation over `[N, H, W, C]` with PyTorch's running statistics (`torch.nn.BatchNorm2d`).

    Batches are normalised with the biased variance; the *running* variance is the unbiased one, n / (n - 1),
    which `flax.linen.BatchNorm` does not keep. Statistics are float32 (or wider) whatever `dtype` is.
    """

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)

        if train:
            wide = x.astype(self.param_dtype)
            mean = wide.mean((0, 1, 2))
            var = jnp.square(wide - mean).mean((0, 1, 2))
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value = BN_MOMENTUM * running_mean.value + (1 - BN_MOMENTUM) * mean
                running_var.value = BN_MOMENTUM * running_var.value + (1 - BN_MOMENTUM) * unbiased
        else:
            mean, var = running_mean.value, running_var.value

        factor = scale * lax.rsqrt(var + BN_EPSILON)
        return ((x.astype(self.param_dtype) - mean) * factor + bias).astype(self.dtype)


class Conv(nn.Module):
    """Convolution without bias, padded as PyTorch pads: leaf `kernel [k, k, C_in / groups, C_out]`."""

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", torch_kernel_init, shape, self.param_dtype)
        compute = training_conv if train else plain_conv  # the first knows only reverse-mode gradients
        return compute(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.groups)


class ConvBN(nn.Module):
    """Convolution without bias, padded as PyTorch pads, then BatchNorm (the authors' `conv_bn`)."""

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        conv = Conv(
            self.features, self.kernel_size, self.stride, self.groups, self.dtype, self.param_dtype, name="conv"
        )
        x = conv(x, train)
        return BatchNorm(self.dtype, self.param_dtype, name="bn")(x, train)


class SqueezeExcite(nn.Module):
    """Channel gate: spatial mean, 1x1 conv `down`, ReLU, 1x1 conv `up`, sigmoid, multiply (`[N, H, W, C]`)."""

    squeeze_width: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def conv1x1(features: int, fan_in: int, name: str) -> nn.Conv:
            return nn.Conv(
                features,
                (1, 1),
                kernel_init=torch_kernel_init,
                bias_init=torch_bias_init(fan_in),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )

        channels = x.shape[-1]
        gate = x.mean((1, 2), keepdims=True)
        gate = nn.relu(conv1x1(self.squeeze_width, channels, "down")(gate))
        gate = nn.sigmoid(conv1x1(channels, self.squeeze_width, "up")(gate))
        return x * gate


class ReparamConv(nn.Module):
    """The fused block's 3x3 convolution with bias: leaves `kernel [3, 3, C_in / groups, C_out]` and `bias [C_out]`."""

    features: int
    stride: int = 1
    groups: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        in_channels = x.shape[-1] // self.groups
        kernel = self.param("kernel", torch_kernel_init, (3, 3, in_channels, self.features), self.param_dtype)
        bias = self.param("bias", torch_bias_init(9 * in_channels), (self.features,), self.param_dtype)
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        return plain_conv(x, kernel, self.stride, self.groups) + bias


class _Block(nn.Module):
    """What both forms share: their fields, and what follows the (summed or single) convolution."""

    features: int
    stride: int = 1
    groups: int = 1
    squeeze_excite: SqueezeExcitePlace | None = None
    squeeze_width: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def _activate(self, x: Array) -> Array:
        """(SE,) ReLU (, SE): D2se gates before the ReLU, RepVGGplus after it."""
        if self.squeeze_excite == "before_relu":
            x = SqueezeExcite(self.squeeze_width, self.dtype, self.param_dtype, name="se")(x)
        x = nn.relu(x)
        if self.squeeze_excite == "after_relu":
            x = SqueezeExcite(self.squeeze_width, self.dtype, self.param_dtype, name="post_se")(x)
        return x


class RepVGGBlock(_Block):
    """Training form: 3x3 conv+BN, 1x1 conv+BN and, where shapes allow, identity BN; summed; then ReLU.

    `[N, H, W, C_in] -> [N, ceil(H / stride), ceil(W / stride), features]`. With `train=True` the batch's
    own statistics are used and the running ones in `batch_stats` updated.
    """

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = x.astype(self.dtype)
        shared: dict[str, Any] = dict(
            stride=self.stride, groups=self.groups, dtype=self.dtype, param_dtype=self.param_dtype
        )
        y = ConvBN(self.features, 3, **shared, name="rbr_dense")(x, train)
        y = y + ConvBN(self.features, 1, **shared, name="rbr_1x1")(x, train)
        if self.stride == 1 and x.shape[-1] == self.features:
            y = y + BatchNorm(self.dtype, self.param_dtype, name="rbr_identity")(x, train)
        return materialize(self._activate(y))


class DeployBlock(_Block):
    """Fused form: one 3x3 convolution with bias, then ReLU. Shapes as `RepVGGBlock`; `train` changes nothing."""

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        del train
        reparam = ReparamConv(self.features, self.stride, self.groups, self.dtype, self.param_dtype, name="rbr_reparam")
        return self._activate(reparam(x))
