"""What the branches of a block consist of: convolution, BN, average pooling, multiplication by a constant.

Each is linear in the image once BN's statistics are fixed. It says in five methods which leaves it has, how it is
computed, what it is as a pointwise convolution in training, how it fuses with what comes before, and what it costs.
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
"""A pointwise convolution: kernel `[1, 1, C_in / groups, C_out]`, and what it gives `[C_out]` for the image's mean."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The convolution that a block as a whole is: its channels, stride, groups and dilation."""

    in_channels: int
    out_channels: int
    stride: int
    groups: int
    dilation: int


@dataclasses.dataclass(frozen=True)
class FusedBlock:
    """What the fusion of a branch needs to know of its block: the kernel's `[3, 3, per_group, channels]` and dtype."""

    per_group: int
    channels: int
    dtype: Any
    epsilon: float

    def identity(self) -> Pair:
        """Return the convolution that returns its input."""
        kernel = identity_kernel(self.channels, self.channels // self.per_group, self.dtype)
        return kernel, jnp.zeros(self.channels, self.dtype)


class Host(Protocol):
    """What a step needs of the Flax module that it is part of."""

    geometry: Geometry
    param_dtype: Dtype
    epsilon: float

    def identity(self, image: ImageMoments) -> Centred:
        """Return the pointwise convolution that returns its input."""
        ...

    def options(self, step: "Step") -> dict[str, Any]:
        """Return what every step's module is made with."""
        ...

    def module(self, step: "Step", module: Any) -> Any:
        """Return the step's module, whose leaves are the branch's own if the step has no name."""
        ...


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of a branch.

    Attributes:
      name: of its leaves inside the branch; empty if they are the branch's own.
    """

    name: str = ""
    leaf: ClassVar[str] = ""
    """What shows in `params` that the step is there, if it has no name."""

    def layer(self, geometry: Geometry, channels: int) -> Layer | None:
        """Return the layer with its leaves, for an input of so many channels; None if it has none."""
        return None

    def compute(self, branch: Host, x: Array, zero: Array | None, train: bool) -> tuple[Array, Array | None]:
        """Return the result for `x + zero`, in two such parts if padding is still to come.

        Args:
          branch: what the step's module is part of.
          x: `[N, H, W, C]`, padded with zeros.
          zero: `[C]`, everywhere added to `x`, in the padding too; None for nothing.
          train: use and update batch statistics.
        """
        raise NotImplementedError

    @property
    def is_pointwise(self) -> bool:
        """Whether every output pixel depends on one pixel of the image alone, in the same way."""
        return False

    def fold(self, branch: Host, before: Centred | None, image: ImageMoments) -> Centred:
        """Return the pointwise convolution that the chain is up to here in training, on an image of these moments.

        Args:
          branch: what the step's module is part of.
          before: the chain before this step; None for the image.
          image: moments at the pixels that the chain reads.
        """
        raise NotImplementedError

    def fuse(self, before: Pair | None, params: Tree, stats: Tree, block: FusedBlock) -> Pair:
        """Return the convolution that the chain is up to here, from what it was before; None stands for the image."""
        raise NotImplementedError

    def multiply_adds(self, kernel: Shape, in_pixels: int, out_pixels: int) -> int:
        """Return those for one image of so many pixels before and after the block's stride."""
        return 0


@dataclasses.dataclass(frozen=True)
class Convolution(Step):
    """A convolution without bias.

    Attributes:
      size: rows and columns of its kernel.
      keeps_resolution: the block's stride is left to a later step.
      keeps_channels: as many outputs as inputs.
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
      pads_later: a step that pads follows.
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
    """3x3 average pooling that counts its padding, after another step."""

    def compute(self, branch: Host, x: Array, zero: Array | None, train: bool) -> tuple[Array, None]:
        x = average_pool(x, branch.geometry.stride, branch.geometry.dilation)
        return (x if zero is None else x + channelwise(zero)), None

    def fuse(self, before: Pair | None, params: Tree, stats: Tree, block: FusedBlock) -> Pair:
        kernel, bias = block.identity() if before is None else before
        return average_1x1(kernel), bias


@dataclasses.dataclass(frozen=True)
class ConstantScale(Step):
    """Multiplication by the constant 1, whose leaf in `batch_stats` shows that the branch is there."""

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
