"""The RepVGG block in its training and its deploy form (paper section 3)."""

import functools
import operator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ..broadcasting import channelwise
from ..conv.deploy import deploy_conv
from ..conv.sharding import explicitly_sharded
from ..conv.training import every_mode, materialize
from .activations import Activation, activation_function
from .branches import SUM_BN, BlockKind, Branches, BranchModule, add_pointwise, branches_of, merged
from .kernel_algebra import BN_EPSILON
from .layers import BatchNorm, Dtype, torch_bias_init, torch_kernel_init
from .steps import Geometry
from .variants import SqueezeExcitePlace
from .walk import ACTIVATION, AFTER_CONVOLUTION


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
    """Base of both forms: their common fields, and the operations after the (summed or single) convolution."""

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
        """Apply the gate, if there is one, and the activation."""
        for step in AFTER_CONVOLUTION[self.squeeze_excite]:
            if step == ACTIVATION:
                x = activation_function(self.activation)(x)
            else:
                x = SqueezeExcite(self.squeeze_width, self.dtype, self.param_dtype, name=step)(x)
        return x


class RepVGGBlock(_Block):
    """Training form: 3x3 conv+BN, 1x1 conv+BN and, where shapes allow, identity BN; summed; then ReLU.

    `[N, H, W, C_in] -> [N, ceil(H / stride), ceil(W / stride), features]`. With `train=True` BN uses the statistics
    of the batch and updates the running ones in `batch_stats`.

    QARepVGG's block has BN only in the 3x3 branch, and one more BN on the sum. Its identity branch has no parameters;
    `batch_stats` holds the constant 1 that scales it, so the tree shows that the branch exists.

    Attributes:
      identity: whether to include an identity branch where stride and channels allow one.
      block: kind of block, RepVGG's or QARepVGG's.
      branches: branches of the block.
      epsilon: epsilon of every BN.
    """

    identity: bool = True
    block: BlockKind = "repvgg"
    branches: Branches = Branches()
    epsilon: float = BN_EPSILON

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = x.astype(self.dtype)
        geometry = Geometry(x.shape[-1], self.features, self.stride, self.groups, self.dilation)
        options: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype, epsilon=self.epsilon)
        may_be_identity = self.identity and self.stride == 1 and x.shape[-1] == self.features
        branches = branches_of(self.block, self.branches, may_be_identity)
        modules = {branch: BranchModule(branch.steps, geometry, **options, name=branch.name) for branch in branches}
        together = merged(branches) if train and self._has_exact_moments(x) else []
        results = [module(x, train) for branch, module in modules.items() if branch not in together]
        if together:
            results.append(add_pointwise([modules[branch] for branch in together], x))
        y = functools.reduce(operator.add, results)
        if self.block == "qarepvgg":
            y = BatchNorm(**options, name=SUM_BN)(y, train)
        return materialize(self._activate(y))

    def _has_exact_moments(self, x: Array) -> bool:
        """Return whether second moments of `x` can be summed without loss, and differentiated in the active mode."""
        narrow = jnp.dtype(self.dtype).itemsize < jnp.dtype(self.param_dtype).itemsize
        return narrow and not (every_mode() or explicitly_sharded(x) or self.is_initializing())


class DeployBlock(_Block):
    """Fused form: one 3x3 convolution with bias, then ReLU. Shapes as in `RepVGGBlock`; `train` has no effect."""

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        del train
        geometry = (self.stride, self.groups, self.dilation)
        reparam = ReparamConv(self.features, *geometry, self.dtype, self.param_dtype, name="rbr_reparam")
        return self._activate(reparam(x))
