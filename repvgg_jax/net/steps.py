"""The steps of a branch: convolution, BN, average pooling, multiplication by a constant.

Each step is linear in the image once the BN statistics are fixed. Five methods define it: its leaves, its computation,
its pointwise convolution in training, its fusion with the steps before it, and its cost.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax.numpy as jnp
from jax import Array

from ..broadcasting import channelwise
from .kernel_algebra import Pair, average_1x1, chain_1x1, fuse_conv_bn, identity_kernel
from .layers import BatchNorm, Constant, Conv, Dtype, average_pool
from .leaves import Layer, Shape
from .moments import ImageMoments, Moments

Tree = Mapping[str, Any]
Centred = tuple[Array, Array]
"""A pointwise convolution: kernel `[1, 1, C_in / groups, C_out]`, and its output `[C_out]` for the image's mean."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Channels, stride, groups and dilation of the convolution that a block amounts to."""

    in_channels: int
    out_channels: int
    stride: int
    groups: int
    dilation: int


@dataclasses.dataclass(frozen=True)
class FusedBlock:
    """Facts about the block that a branch needs in order to fuse.

    Attributes:
      per_group: input channels per group: the fused kernel is `[3, 3, per_group, channels]`.
      channels: output channels.
      dtype: dtype of the kernel.
      epsilon: epsilon of every BN.
    """

    per_group: int
    channels: int
    dtype: Any
    epsilon: float

    def identity(self) -> Pair:
        """Return the identity as a convolution."""
        kernel = identity_kernel(self.channels, self.channels // self.per_group, self.dtype)
        return kernel, jnp.zeros(self.channels, self.dtype)


class Host(Protocol):
    """Interface of the Flax module that a step is part of."""

    geometry: Geometry
    param_dtype: Dtype
    epsilon: float

    def identity(self, image: ImageMoments) -> Centred:
        """Return the pointwise identity convolution."""
        ...

    def options(self, step: "Step") -> dict[str, Any]:
        """Return the constructor arguments common to every step's module."""
        ...

    def module(self, step: "Step", module: Any) -> Any:
        """Return the step's module; if the step has no name, its leaves belong to the branch directly."""
        ...


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of a branch.

    Attributes:
      name: name of its subtree inside the branch; empty if its leaves belong to the branch directly.
    """

    name: str = ""
    leaf: ClassVar[str] = ""
    """Leaf in `params` that identifies the step if it has no name."""

    def layer(self, geometry: Geometry, channels: int) -> Layer | None:
        """Return the layer with the step's leaves for an input of `channels` channels; None if it has no leaves."""
        return None

    def compute(self, branch: Host, x: Array, zero: Array | None, train: bool) -> tuple[Array, Array | None]:
        """Return the output for `x + zero`, again as two such parts if a later step pads.

        Args:
          branch: module that the step is part of.
          x: `[N, H, W, C]`, padded with zeros.
          zero: `[C]`, added to `x` everywhere, including the padding; None for zero.
          train: use and update batch statistics.
        """
        raise NotImplementedError

    @property
    def is_pointwise(self) -> bool:
        """Whether every output pixel is the same function of a single pixel of the image."""
        return False

    def fold(self, branch: Host, before: Centred | None, image: ImageMoments) -> Centred:
        """Return the chain up to and including this step as one pointwise convolution, in training.

        Args:
          branch: module that the step is part of.
          before: the chain before this step; None if this is the first step.
          image: moments of the image at the pixels that the chain reads.
        """
        raise NotImplementedError

    def fuse(self, before: Pair | None, params: Tree, stats: Tree, block: FusedBlock) -> Pair:
        """Return the chain up to and including this step as one convolution; `before` is None for the first step."""
        raise NotImplementedError

    def multiply_adds(self, kernel: Shape, in_pixels: int, out_pixels: int) -> int:
        """Return the multiply-adds for one image, with `in_pixels` before and `out_pixels` after the block's stride."""
        return 0


@dataclasses.dataclass(frozen=True)
class Convolution(Step):
    """A convolution without bias.

    Attributes:
      size: rows and columns of the kernel.
      keeps_resolution: stride 1; a later step applies the block's stride.
      keeps_channels: as many output channels as input channels.
    """

    size: tuple[int, int] = (3, 3)
    keeps_resolution: bool = False
    keeps_channels: bool = False
    leaf: ClassVar[str] = "kernel"

    def layer(self, geometry: Geometry, channels: int) -> Layer:
        outputs = channels if self.keeps_channels else geometry.out_channels
        return Layer(self.name, "conv", (*self.size, channels // geometry.groups, outputs), has_bias=False)

    def compute(self, branch: Host, x: Array, zero: Array | None, train: bool) -> tuple[Array, None]:
        geometry = branch.geometry
        conv = Conv(
            features=x.shape[-1] if self.keeps_channels else geometry.out_channels,
            kernel_size=self.size,
            stride=1 if self.keeps_resolution else geometry.stride,
            groups=geometry.groups,
            dilation=1 if self.size == (1, 1) else geometry.dilation,
            **branch.options(self),
        )
        return branch.module(self, conv)(x, train, zero), None

    @property
    def is_pointwise(self) -> bool:
        return self.size == (1, 1) and not self.keeps_resolution

    def fold(self, branch: Host, before: Centred | None, image: ImageMoments) -> Centred:
        assert before is None
        geometry = branch.geometry
        conv = Conv(geometry.out_channels, self.size, groups=geometry.groups, **branch.options(self))
        kernel = branch.module(self, conv).weights(geometry.in_channels)
        return kernel, image.response(kernel)

    def fuse(self, before: Pair | None, params: Tree, stats: Tree, block: FusedBlock) -> Pair:
        kernel = params["kernel"]
        pair = kernel, jnp.zeros(kernel.shape[3], kernel.dtype)
        return pair if before is None else chain_1x1(before, pair, groups=before[0].shape[3] // kernel.shape[2])

    def multiply_adds(self, kernel: Shape, in_pixels: int, out_pixels: int) -> int:
        return math.prod(kernel) * (in_pixels if self.keeps_resolution else out_pixels)


@dataclasses.dataclass(frozen=True)
class Normalization(Step):
    """BN.

    Attributes:
      pads_later: whether a later step pads.
    """

    pads_later: bool = False
    leaf: ClassVar[str] = "scale"

    def layer(self, geometry: Geometry, channels: int) -> Layer:
        return Layer(self.name, "bn", (channels,))

    def compute(self, branch: Host, x: Array, zero: Array | None, train: bool) -> tuple[Array, Array | None]:
        norm = branch.module(self, BatchNorm(epsilon=branch.epsilon, **branch.options(self)))
        return norm.above_zero(x, train) if self.pads_later else (norm(x, train), None)

    @property
    def is_pointwise(self) -> bool:
        return not self.pads_later

    def fold(self, branch: Host, before: Centred | None, image: ImageMoments) -> Centred:
        kernel, mean = branch.identity(image) if before is None else before
        norm = branch.module(self, BatchNorm(epsilon=branch.epsilon, **branch.options(self)))
        factor, bias = norm.terms_for(Moments(mean, image.response_variance(kernel), image.pixels))
        return kernel * channelwise(factor), bias

    def fuse(self, before: Pair | None, params: Tree, stats: Tree, block: FusedBlock) -> Pair:
        kernel, bias = block.identity() if before is None else before
        return fuse_conv_bn(kernel, params, stats, block.epsilon, bias)


@dataclasses.dataclass(frozen=True)
class AveragePooling(Step):
    """3x3 average pooling that includes the padding in the average, after another step."""

    def compute(self, branch: Host, x: Array, zero: Array | None, train: bool) -> tuple[Array, None]:
        x = average_pool(x, branch.geometry.stride, branch.geometry.dilation)
        return (x if zero is None else x + channelwise(zero)), None

    def fuse(self, before: Pair | None, params: Tree, stats: Tree, block: FusedBlock) -> Pair:
        kernel, bias = block.identity() if before is None else before
        return average_1x1(kernel), bias


@dataclasses.dataclass(frozen=True)
class ConstantScale(Step):
    """Multiplication by the constant 1; its leaf in `batch_stats` shows that the branch exists."""

    def layer(self, geometry: Geometry, channels: int) -> Layer:
        return Layer(self.name, "constant", ())

    def compute(self, branch: Host, x: Array, zero: Array | None, train: bool) -> tuple[Array, None]:
        return branch.module(self, Constant(**branch.options(self)))(x), None

    @property
    def is_pointwise(self) -> bool:
        return True

    def fold(self, branch: Host, before: Centred | None, image: ImageMoments) -> Centred:
        kernel, mean = branch.identity(image) if before is None else before
        constant = branch.module(self, Constant(branch.param_dtype, branch.param_dtype))
        return constant(kernel), constant(mean)

    def fuse(self, before: Pair | None, params: Tree, stats: Tree, block: FusedBlock) -> Pair:
        kernel, bias = block.identity() if before is None else before
        return kernel * stats["scale"], bias
