"""The branches of a training-form block: their leaves, computation, fusion and cost.

A branch is a chain of steps. Each step is linear in the image once the BN statistics are fixed, so in inference a chain
is one convolution with bias. The branches of a block read the same image, so they add up to one convolution (paper
section 3.3). A step (`steps.py`) is defined by five methods; a branch is a row of `KINDS`, and `branches_of` selects
the branches of a block.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from ..broadcasting import channelwise
from ..conv.training import training_conv
from .kernel_algebra import BN_EPSILON, Pair, add_branches, embed, identity_kernel
from .layers import Dtype
from .leaves import Layer
from .moments import ImageMoments, image_moments
from .steps import (
    AveragePooling,
    Centred,
    ConstantScale,
    Convolution,
    FusedBlock,
    Geometry,
    Normalization,
    Step,
    Tree,
)

BlockKind = Literal["repvgg", "qarepvgg"]
"""Kind of training-form block. `qarepvgg` (arXiv 2212.01593): BN only in the 3x3 branch, and one more on the sum."""

SUM_BN = "bn"
"""QARepVGG's BN on the sum of the branches."""

MAX_DENSE_COPIES = 8


@dataclasses.dataclass(frozen=True)
class Branches:
    """The branches that a training-form block sums; they all fuse into one 3x3 kernel.

    Attributes:
      dense_copies: number of 3x3 branches, each with its own BN: 1 in RepVGG, up to 4 in MobileOne (arXiv 2206.04040).
      dbb_1x1_3x3: a 1x1 convolution followed by a 3x3 one, with a BN after each (Diverse Branch Block, arXiv
        2103.13425).
      dbb_1x1_avg: a 1x1 convolution followed by 3x3 average pooling, with a BN after each (same source).
      point: RepVGG's 1x1 branch (removed in an ablation of the paper, Table 6).
      identity: RepVGG's identity branch, where stride and channels allow one (removed in the same ablation).
      strips: a 1x3 and a 3x1 convolution, each with its own BN (ACNet, arXiv 1908.03930).

    Raises:
      ValueError: `dense_copies` is out of range, or another field is not a bool.
    """

    dense_copies: int = 1
    dbb_1x1_3x3: bool = False
    dbb_1x1_avg: bool = False
    point: bool = True
    identity: bool = True
    strips: bool = False

    def __post_init__(self):
        if type(self.dense_copies) is not int or not 1 <= self.dense_copies <= MAX_DENSE_COPIES:
            raise ValueError(f"dense_copies must be 1 to {MAX_DENSE_COPIES}, not {self.dense_copies}")
        for field in dataclasses.fields(self)[1:]:
            if type(getattr(self, field.name)) is not bool:
                raise ValueError(f"{field.name} must be True or False, not {getattr(self, field.name)!r}")


@dataclasses.dataclass(frozen=True)
class Branch:
    """One branch of a training-form block: its `name` in the parameter tree, and its steps."""

    name: str
    steps: tuple[Step, ...]

    def layers(self, geometry: Geometry) -> list[Layer]:
        """Return the layers that have leaves, with paths relative to the block."""
        return [layer for _, layer in self._layers(geometry)]

    def multiply_adds(self, geometry: Geometry, in_pixels: int, out_pixels: int) -> int:
        """Return the multiply-adds for one image, with `in_pixels` before and `out_pixels` after the block's stride."""
        return sum(step.multiply_adds(layer.shape, in_pixels, out_pixels) for step, layer in self._layers(geometry))

    def fuse(self, params: Tree, stats: Tree, block: FusedBlock) -> Pair:
        """Return the branch as a 3x3 convolution."""
        pair = None
        for step in self.steps:
            step_params, step_stats = ((tree.get(step.name, {}) if step.name else tree) for tree in (params, stats))
            pair = step.fuse(pair, step_params, step_stats, block)
        assert pair is not None
        return embed(pair[0]), pair[1]

    @property
    def is_pointwise(self) -> bool:
        """Whether every output pixel is the same function of a single pixel of the image."""
        return all(step.is_pointwise for step in self.steps)

    def is_in(self, params: Tree) -> bool:
        """Return whether the branch's tree `params` has leaves for every step."""
        return all((step.name or step.leaf) in params for step in self.steps if step.name or step.leaf)

    def _layers(self, geometry: Geometry) -> Iterator[tuple[Step, Layer]]:
        channels = geometry.in_channels
        for step in self.steps:
            layer = step.layer(geometry, channels)
            if layer is not None:
                channels = layer.shape[-1] if layer.shape else channels
                yield step, dataclasses.replace(layer, path=f"{self.name}/{layer.path}".removesuffix("/"))


class BranchModule(nn.Module):
    """A branch as a Flax module that applies its steps: `[N, H, W, C_in] -> [N, H / stride, W / stride, C_out]`.

    Before a step that pads, the image is padded with the previous step's output for zero input, so the chain is equal
    to one convolution (arXiv 2103.13425, transform III). In training, that output comes from the BN of the batch; the
    authors use the running statistics instead.
    """

    steps: tuple[Step, ...]
    geometry: Geometry
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    epsilon: float = BN_EPSILON

    @overload
    def __call__(self, x: Array, train: bool = False) -> Array: ...

    @overload
    def __call__(self, x: ImageMoments, train: bool = False) -> Centred: ...

    @nn.compact  # a module may have only one compact method, so it takes both an image and its moments
    def __call__(self, x: Array | ImageMoments, train: bool = False) -> Array | Centred:
        """Return the output for an image, or, in training, the equivalent convolution for its `ImageMoments`."""
        if isinstance(x, ImageMoments):
            folded = None
            for step in self.steps:
                folded = step.fold(self, folded, x)
            assert folded is not None
            return folded
        zero = None
        for step in self.steps:
            x, zero = step.compute(self, x, zero, train)
        return x

    def identity(self, image: ImageMoments) -> Centred:
        """Return the pointwise identity convolution."""
        kernel = identity_kernel(self.geometry.out_channels, self.geometry.groups, self.param_dtype)
        return kernel[1:2, 1:2], image.mean

    def options(self, step: Step) -> dict[str, Any]:
        """Return the constructor arguments common to every step's module."""
        return dict(dtype=self.dtype, param_dtype=self.param_dtype) | ({"name": step.name} if step.name else {})

    def module(self, step: Step, module: Any) -> Any:
        """Return the step's module; if the step has no name, its leaves belong to the branch directly."""
        if not step.name:
            nn.share_scope(self, module)
        return module


DENSE = Branch("rbr_dense", (Convolution("conv", (3, 3)), Normalization("bn")))
POINT = Branch("rbr_1x1", (Convolution("conv", (1, 1)), Normalization("bn")))
BARE_POINT = Branch("rbr_1x1", (Convolution("", (1, 1)),))
POINT_THEN_3X3 = Branch(
    "dbb_1x1_3x3",
    (
        Convolution("conv1", (1, 1), keeps_resolution=True, keeps_channels=True),
        Normalization("bn1", pads_later=True),
        Convolution("conv2", (3, 3)),
        Normalization("bn2"),
    ),
)
POINT_THEN_AVERAGE = Branch(
    "dbb_1x1_avg",
    (
        Convolution("conv1", (1, 1), keeps_resolution=True),
        Normalization("bn1", pads_later=True),
        AveragePooling(),
        Normalization("bn2"),
    ),
)
ROW = Branch("rbr_1x3", (Convolution("conv", (1, 3)), Normalization("bn")))
COLUMN = Branch("rbr_3x1", (Convolution("conv", (3, 1)), Normalization("bn")))
IDENTITY = Branch("rbr_identity", (Normalization(""),))
CONSTANT_IDENTITY = Branch("rbr_identity", (ConstantScale(),))

KINDS = (DENSE, POINT, BARE_POINT, POINT_THEN_3X3, POINT_THEN_AVERAGE, ROW, COLUMN, IDENTITY, CONSTANT_IDENTITY)
"""Every kind of branch, in the order in which a block sums them."""


def branches_of(block: BlockKind, branches: Branches, may_be_identity: bool) -> tuple[Branch, ...]:
    """Return the branches of a training-form block, in the order of summation.

    Args:
      block: kind of block.
      branches: selection of branches.
      may_be_identity: whether stride and channels allow an identity branch.
    """
    bare = block == "qarepvgg"
    names = [DENSE.name, *(f"{DENSE.name}_{copy}" for copy in range(1, branches.dense_copies))]
    chosen = [dataclasses.replace(DENSE, name=name) for name in names]
    if branches.point:
        chosen.append(BARE_POINT if bare else POINT)
    if branches.dbb_1x1_3x3:
        chosen.append(POINT_THEN_3X3)
    if branches.dbb_1x1_avg:
        chosen.append(POINT_THEN_AVERAGE)
    if branches.strips:
        chosen += [ROW, COLUMN]
    if branches.identity and may_be_identity:
        chosen.append(CONSTANT_IDENTITY if bare else IDENTITY)
    return tuple(chosen)


def merged(branches: Sequence[Branch]) -> list[Branch]:
    """Return the branches that one pointwise convolution can replace; empty if that saves nothing."""
    pointwise = [branch for branch in branches if branch.is_pointwise]
    return pointwise if any(isinstance(step, Convolution) for branch in pointwise for step in branch.steps) else []


def add_pointwise(modules: Sequence[BranchModule], x: Array) -> Array:
    """Return the sum of pointwise branches in training, computed as one convolution.

    Args:
      modules: branches with the same geometry.
      x: image `[N, H, W, C_in]`, in a dtype narrower than that of the parameters.
    """
    geometry, dtype = modules[0].geometry, modules[0].param_dtype
    pixels = x[:, :: geometry.stride, :: geometry.stride]
    image = image_moments(pixels, dtype)
    kernel, centre = add_branches(module(image, train=True) for module in modules)
    kernel = kernel.astype(x.dtype)
    bias = centre - image.response(kernel.astype(dtype))  # response of the rounded kernel
    y = training_conv(pixels, kernel, 1, geometry.groups).astype(dtype)  # the bias's gradient is a sum over pixels
    return (y + channelwise(bias)).astype(x.dtype)


def is_branch(name: str) -> bool:
    """Return whether the subtree `name` of a training-form block disappears in fusion."""
    return name.startswith(("rbr_", "dbb_")) or name == SUM_BN


def branch_in_tree(name: str, params: Tree) -> Branch | None:
    """Return the kind of branch under `name`, identified by its leaves `params`; None if no kind matches."""
    kinds = (kind for kind in KINDS if kind.name == re.sub(r"^rbr_dense_\d+$", DENSE.name, name))
    return next((kind for kind in kinds if kind.is_in(params)), None)
