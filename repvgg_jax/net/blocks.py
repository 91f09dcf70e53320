"""The RepVGG block in its training and its deploy form, and the layers they are made of (paper section 3)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from ..broadcasting import channelwise
from ..conv.deploy import deploy_conv
from ..conv.training import materialize, training_conv
from .activations import Activation, activation_function
from .kernel_algebra import BN_EPSILON, constant_response
from .variants import BlockKind, Branches, SqueezeExcitePlace

Dtype = Any

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
    epsilon: float = BN_EPSILON

    def __call__(self, x: Array, train: bool = False) -> Array:
        mean, factor, bias = (channelwise(term, x.ndim) for term in self._terms(x, train))
        return ((x.astype(self.param_dtype) - mean) * factor + bias).astype(self.dtype)

    def above_zero(self, x: Array, train: bool = False) -> tuple[Array, Array]:
        """The result in two parts that add up: what `x` adds to zero's own result, and that result `[C]`."""
        mean, factor, bias = self._terms(x, train)
        from_x = x.astype(self.param_dtype) * channelwise(factor, x.ndim)
        return from_x.astype(self.dtype), (bias - mean * factor).astype(self.dtype)

    @nn.compact
    def _terms(self, x: Array, train: bool) -> tuple[Array, Array, Array]:
        """`mean`, `factor` and `bias` `[C]`: the result is `(x - mean) * factor + bias`."""
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)

        if train:
            wide = x.astype(self.param_dtype)
            mean = wide.mean((0, 1, 2))
            var = jnp.square(wide - channelwise(mean, x.ndim)).mean((0, 1, 2))
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value = BN_MOMENTUM * running_mean.value + (1 - BN_MOMENTUM) * mean
                running_var.value = BN_MOMENTUM * running_var.value + (1 - BN_MOMENTUM) * unbiased
        else:
            mean, var = running_mean.value, running_var.value

        return mean, scale * lax.rsqrt(var + self.epsilon), bias


class Conv(nn.Module):
    """Convolution without bias, padded as PyTorch pads: leaf `kernel [k, k, C_in / groups, C_out]`.

    `pedestal` `[C_in]` is a value that is everywhere added to `x`, in the padding too.
    """

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False, pedestal: Array | None = None) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", torch_kernel_init, shape, self.param_dtype)
        compute = training_conv if train else deploy_conv  # the first knows only reverse-mode gradients
        kernel = kernel.astype(self.dtype)
        y = compute(x.astype(self.dtype), kernel, self.stride, self.groups, self.dilation)
        return y if pedestal is None else y + channelwise(constant_response(kernel, pedestal, self.groups))


class ConvBN(nn.Module):
    """Convolution without bias, padded as PyTorch pads, then BatchNorm (the authors' `conv_bn`)."""

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    epsilon: float = BN_EPSILON

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        geometry = (self.kernel_size, self.stride, self.groups, self.dilation)
        x = Conv(self.features, *geometry, self.dtype, self.param_dtype, name="conv")(x, train)
        return BatchNorm(self.dtype, self.param_dtype, self.epsilon, name="bn")(x, train)


class PointThen3x3(nn.Module):
    """Diverse Branch Block's 1x1 convolution, BN, 3x3 convolution or average pooling, BN (`dbb_1x1_kxk`, `dbb_avg`).

    Between the two, the image is padded with what the first BN gives for zero, so that the whole is one convolution
    (arXiv 2103.13425, transform III). In training that is the BN of the batch; the authors take the running one.

    Leaves: `conv1`, `bn1`, (`conv2`,) `bn2`.
    """

    features: int
    pool: bool
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    epsilon: float = BN_EPSILON

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        dtypes = (self.dtype, self.param_dtype)
        middle = self.features if self.pool else x.shape[-1]
        x = Conv(middle, 1, 1, self.groups, 1, *dtypes, name="conv1")(x, train)
        x, zero = BatchNorm(*dtypes, self.epsilon, name="bn1").above_zero(x, train)
        if self.pool:
            x = average_pool(x, self.stride, self.dilation) + channelwise(zero)
        else:
            conv = Conv(self.features, 3, self.stride, self.groups, self.dilation, *dtypes, name="conv2")
            x = conv(x, train, zero)
        return BatchNorm(*dtypes, self.epsilon, name="bn2")(x, train)


def average_pool(x: Array, stride: int = 1, dilation: int = 1) -> Array:
    """3x3 average pooling that counts its zero padding (`torch.nn.AvgPool2d(3, stride, 1)`), pixels `dilation` apart.

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
    dilation: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        in_channels = x.shape[-1] // self.groups
        kernel = self.param("kernel", torch_kernel_init, (3, 3, in_channels, self.features), self.param_dtype)
        bias = self.param("bias", torch_bias_init(9 * in_channels), (self.features,), self.param_dtype)
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        return deploy_conv(x, kernel, self.stride, self.groups, self.dilation) + channelwise(bias)


class _Block(nn.Module):
    """What both forms share: their fields, and what follows the (summed or single) convolution."""

    features: int
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    activation: Activation = "relu"
    squeeze_excite: SqueezeExcitePlace | None = None
    squeeze_width: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def _activate(self, x: Array) -> Array:
        """(SE,) ReLU (, SE): D2se gates before the ReLU, RepVGGplus after it."""
        if self.squeeze_excite == "before_relu":
            x = SqueezeExcite(self.squeeze_width, self.dtype, self.param_dtype, name="se")(x)
        x = activation_function(self.activation)(x)
        if self.squeeze_excite == "after_relu":
            x = SqueezeExcite(self.squeeze_width, self.dtype, self.param_dtype, name="post_se")(x)
        return x


class RepVGGBlock(_Block):
    """Training form: 3x3 conv+BN, 1x1 conv+BN and, where shapes allow, identity BN; summed; then ReLU.

    `[N, H, W, C_in] -> [N, ceil(H / stride), ceil(W / stride), features]`. With `train=True` the batch's
    own statistics are used and the running ones in `batch_stats` updated.

    QARepVGG's block has BN in the 3x3 branch alone, and one more BN on the sum. Its identity branch has nothing to
    learn; `batch_stats` holds the constant 1 that it is scaled with, so that the tree tells that it is there.

    Attributes:
      identity: whether there is an identity branch where stride and channels allow one.
      block: RepVGG's or QARepVGG's.
      branches: more summands.
      epsilon: of every BN.
    """

    identity: bool = True
    block: BlockKind = "repvgg"
    branches: Branches = Branches()
    epsilon: float = BN_EPSILON

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = x.astype(self.dtype)
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm: dict[str, Any] = dtypes | dict(epsilon=self.epsilon)
        geometry: dict[str, Any] = dict(stride=self.stride, groups=self.groups)
        wide: dict[str, Any] = geometry | norm | dict(dilation=self.dilation)
        bare = self.block == "qarepvgg"
        y = sum(ConvBN(self.features, 3, **wide, name=name)(x, train) for name in self.branches.dense_names())
        if bare:
            y = y + Conv(self.features, 1, **geometry, **dtypes, name="rbr_1x1")(x, train)
        else:
            y = y + ConvBN(self.features, 1, **geometry, **norm, name="rbr_1x1")(x, train)
        if self.branches.dbb_1x1_3x3:
            y = y + PointThen3x3(self.features, pool=False, **wide, name="dbb_1x1_3x3")(x, train)
        if self.branches.dbb_1x1_avg:
            y = y + PointThen3x3(self.features, pool=True, **wide, name="dbb_1x1_avg")(x, train)
        if self.identity and self.stride == 1 and x.shape[-1] == self.features:
            branch = Identity(**dtypes, name="rbr_identity") if bare else BatchNorm(**norm, name="rbr_identity")
            y = y + branch(x, train)
        if bare:
            y = BatchNorm(**norm, name="bn")(y, train)
        return materialize(self._activate(y))


class Identity(nn.Module):
    """`x` times the constant leaf `scale []` in `batch_stats`, which is 1."""

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        del train
        scale = self.variable("batch_stats", "scale", jnp.ones, (), self.param_dtype)
        return x * scale.value.astype(self.dtype)


class DeployBlock(_Block):
    """Fused form: one 3x3 convolution with bias, then ReLU. Shapes as `RepVGGBlock`; `train` changes nothing."""

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        del train
        geometry = (self.stride, self.groups, self.dilation)
        reparam = ReparamConv(self.features, *geometry, self.dtype, self.param_dtype, name="rbr_reparam")
        return self._activate(reparam(x))
