"""The table of published RepVGG variants, and the list of blocks that each expands to.

Source: paper (arXiv 2101.03697) Tables 2 to 5; D2se and RepVGGplus-L2pse from the authors' later releases.
"""

import dataclasses
import difflib
import numbers
from collections.abc import Sequence
from typing import Any, Literal, get_args

from ..errors import UnknownModelError
from .activations import Activation, activation_function
from .branches import BlockKind, Branch, Branches, branches_of
from .kernel_algebra import BN_EPSILON
from .steps import Geometry

SqueezeExcitePlace = Literal["before_relu", "after_relu"]

GATE_NAMES: dict[SqueezeExcitePlace, str] = {"before_relu": "se", "after_relu": "post_se"}
"""The authors' name for the squeeze-and-excite gate in each place."""

OUTPUT_STRIDES = (8, 16, 32)

AUX_HEADS = ("stage1_aux", "stage2_aux", "stage3_first_aux")
"""RepVGGplus's auxiliary heads, named after the stage (or half stage) whose output they read."""


@dataclasses.dataclass(frozen=True)
class Published:
    """Figures published by the authors: deploy form at 224x224, multiply-adds; speed on a 1080Ti, fp32, batch 128."""

    top1: float | None = None
    images_per_second: int | None = None
    params_millions: float | None = None
    flops_billions: float | None = None
    winograd_muls_billions: float | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """Consecutive blocks of one width; the first has the stride (unless dilation replaces it)."""

    name: str
    number: int
    depth: int
    width: int
    stride: int


@dataclasses.dataclass(frozen=True)
class BlockSpec(Geometry):
    """Description of one block of the body, for modules, weight maps and FLOP counts.

    Its 3x3 kernels have shape `[3, 3, in_channels // groups, out_channels]`, with taps `dilation` pixels apart.
    `nominal_stride` is the block's stride in the same net without dilation.
    """

    name: str
    stage: str
    stage_number: int
    nominal_stride: int

    @property
    def may_be_identity(self) -> bool:
        """Whether the training form may have an identity branch (paper section 3.3); independent of dilation."""
        return self.nominal_stride == 1 and self.in_channels == self.out_channels


@dataclasses.dataclass(frozen=True)
class Variant:
    """Architecture of a RepVGG; every field except the first two defaults to RepVGG's usual value.

    For example, `Variant(num_blocks=(1, 2, 2, 1), widths=(16, 16, 32, 64, 128))` is complete, ready for `create_model`.

    Attributes:
      num_blocks: blocks in stages 1 to 4; stage 0 is one block, and each stage starts with stride 2.
      widths: output channels of stages 0 to 4.
      groups: groups of the 3x3 and 1x1 convolutions in the even-numbered blocks 2, 4, ….
      squeeze_excite: position of the squeeze-and-excite gate; None for no gate.
      squeeze_excite_ratio: the block's width divided by the gate's hidden width.
      auxiliary_heads: split stage 3 in two halves and add auxiliary classifiers in training, as in RepVGGplus.
      name: name of the variant.
      image_size: test resolution of the published accuracy, in pixels.
      crop_fraction: side of the centre crop divided by the resized shorter side, at evaluation.
      published: the authors' figures, where there are any.
      strides: strides of stages 0 to 4, each 2 or 1; (1, 1, 2, 2, 2) for images as small as 32x32.
      output_stride: 32, or 16 or 8 for a dense-prediction backbone: stages that would exceed it get stride 1, and the
        blocks after the omitted stride are dilated instead, as in timm and torchvision.
      activation: activation after each block's sum: a name in `ACTIVATIONS`, or an elementwise function.
      block: kind of block in the training form.
      branches: branches of the training form's blocks.
      epsilon: constant that every BatchNorm of the training form adds to the variance. The keys of a weight file do
        not show it.

    Raises:
      ValueError: the values do not describe a network; the message names the field, its value and what it must be.
    """

    num_blocks: tuple[int, int, int, int]
    widths: tuple[int, int, int, int, int]
    groups: int = 1
    squeeze_excite: SqueezeExcitePlace | None = None
    squeeze_excite_ratio: int = 16
    auxiliary_heads: bool = False
    name: str = "custom"
    image_size: int = 224
    crop_fraction: float = 0.875
    published: Published = dataclasses.field(default=Published(), compare=False)
    strides: tuple[int, int, int, int, int] = (2, 2, 2, 2, 2)
    output_stride: int = 32
    activation: Activation = "relu"
    block: BlockKind = "repvgg"
    branches: Branches = Branches()
    epsilon: float = BN_EPSILON

    def __post_init__(self):
        object.__setattr__(self, "num_blocks", _positive_numbers("num_blocks", self.num_blocks, "four", "1 to 4"))
        for field in ("widths", "strides"):
            object.__setattr__(self, field, _positive_numbers(field, getattr(self, field), "five", "0 to 4"))
        if not set(self.strides) <= {1, 2}:
            raise ValueError(f"strides must be five numbers, each 1 or 2 (stages 0 to 4), not {self.strides}")
        for field in ("groups", "squeeze_excite_ratio", "image_size"):
            if type(getattr(self, field)) is not int or getattr(self, field) < 1:
                raise ValueError(f"{field} must be a positive whole number, not {getattr(self, field)!r}")
        choices = {
            "auxiliary_heads": (False, True),
            "squeeze_excite": (None, *get_args(SqueezeExcitePlace)),
            "output_stride": OUTPUT_STRIDES,
            "block": get_args(BlockKind),
        }
        for field, values in choices.items():
            chosen = getattr(self, field)
            if not any(chosen == value and type(chosen) is type(value) for value in values):
                raise ValueError(f"{field} must be one of {', '.join(map(str, values))}, not {chosen!r}")
        if type(self.crop_fraction) not in (int, float) or not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be a number above 0 and up to 1, not {self.crop_fraction!r}")
        if not isinstance(self.branches, Branches):
            raise ValueError(f"branches must be a Branches, not {self.branches!r}")
        activation_function(self.activation)
        object.__setattr__(self, "epsilon", checked_epsilon(self.epsilon))
        if self.auxiliary_heads and self.num_blocks[2] < 2:
            raise ValueError(f"auxiliary heads split stage 3 in two, which needs 2 blocks, not {self.num_blocks[2]}")
        for block in self.blocks():
            if block.in_channels % block.groups or block.out_channels % block.groups:
                raise ValueError(
                    f"{block.name}: {block.in_channels} -> {block.out_channels} channels cannot be split "
                    f"into {block.groups} groups"
                )

    def stages(self) -> tuple[Stage, ...]:
        """Return every stage, in order; in RepVGGplus, stage 3 counts as two."""
        depths = (1, *self.num_blocks)
        stages = [
            Stage(f"stage{number}", number, depths[number], self.widths[number], self.strides[number])
            for number in range(5)
        ]
        if self.auxiliary_heads:
            third = stages[3]
            first = dataclasses.replace(third, name="stage3_first", depth=third.depth // 2)
            second = dataclasses.replace(third, name="stage3_second", depth=third.depth - first.depth, stride=1)
            stages[3:4] = [first, second]
        return tuple(stages)

    def blocks(self, in_channels: int = 3) -> tuple[BlockSpec, ...]:
        """Return every block of the body, from image to head, named as in the parameter tree."""
        specs: list[BlockSpec] = []
        reduction = dilation = 1
        for stage in self.stages():
            dilated = stage.stride == 2 and reduction >= self.output_stride
            # A block whose stride is omitted keeps the previous dilation, so it reads the same pixels. Later blocks
            # double it.
            dilation_before, dilation = dilation, 2 * dilation if dilated else dilation
            reduction *= 1 if dilated else stage.stride
            for position in range(stage.depth):
                index = len(specs)  # stage 0 is block 0; groups go to even blocks after it
                nominal_stride = stage.stride if position == 0 else 1
                specs.append(
                    BlockSpec(
                        name=stage.name if stage.number == 0 else f"{stage.name}_{position}",
                        stage=stage.name,
                        stage_number=stage.number,
                        in_channels=specs[-1].out_channels if specs else in_channels,
                        out_channels=stage.width,
                        stride=1 if dilated else nominal_stride,
                        groups=self.groups if index and index % 2 == 0 else 1,
                        dilation=dilation_before if position == 0 else dilation,
                        nominal_stride=nominal_stride,
                    )
                )
        return tuple(specs)

    def training_branches(self, block: BlockSpec) -> tuple[Branch, ...]:
        """Return the branches of the block's training form."""
        return branches_of(self.block, self.branches, block.may_be_identity)

    @property
    def gate_name(self) -> str | None:
        """Name of the squeeze-and-excite gate in a block's parameters; None if there is no gate."""
        return None if self.squeeze_excite is None else GATE_NAMES[self.squeeze_excite]

    def squeeze_width(self, channels: int) -> int:
        """Return the hidden channels of the squeeze-and-excite gate in a block with `channels` output channels."""
        return max(1, channels // self.squeeze_excite_ratio)


def checked_epsilon(value: Any) -> float:
    """Return `value` as the epsilon of a BatchNorm.

    Raises:
      ValueError: `value` is not a number above 0 and below 1.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < 1:
        raise ValueError(f"epsilon must be a number above 0 and below 1, such as 1e-3, not {value!r}")
    return float(value)


def _positive_numbers(field: str, value: Any, how_many: str, stages: str) -> tuple[int, ...]:
    """Return `value` as a tuple of `how_many` ("four" or "five") positive whole numbers."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(values) != {"four": 4, "five": 5}[how_many] or any(type(n) is not int or n < 1 for n in values):
        shown = tuple(value) if isinstance(value, list) else value
        raise ValueError(f"{field} must be {how_many} positive numbers (stages {stages}), not {shown}")
    return values


def scaled_widths(a: float, b: float) -> tuple[int, int, int, int, int]:
    """Return the stage widths from the paper's multipliers: 64a capped at 64, 64a, 128a, 256a, 512b (section 3.4)."""
    return min(64, int(64 * a)), int(64 * a), int(128 * a), int(256 * a), int(512 * b)


_A = (2, 4, 14, 1)
_B = (4, 6, 16, 1)
_D = (8, 14, 24, 1)

_TABLE = (
    Variant(_A, scaled_widths(0.75, 2.5), name="RepVGG-A0", published=Published(72.41, 3256, 8.30, 1.4, 0.7)),
    Variant(_A, scaled_widths(1, 2.5), name="RepVGG-A1", published=Published(74.46, 2339, 12.78, 2.4, 1.3)),
    Variant(_A, scaled_widths(1.5, 2.75), name="RepVGG-A2", published=Published(76.48, 1322, 25.49, 5.1, 2.7)),
    Variant(_B, scaled_widths(1, 2.5), name="RepVGG-B0", published=Published(75.14, 1817, 14.33, 3.1, 1.6)),
    Variant(_B, scaled_widths(2, 4), name="RepVGG-B1", published=Published(78.37, 685, 51.82, 11.8, 5.9)),
    Variant(_B, scaled_widths(2, 4), 2, name="RepVGG-B1g2", published=Published(77.78, 792, 41.36, 8.8, 4.6)),
    Variant(_B, scaled_widths(2, 4), 4, name="RepVGG-B1g4", published=Published(77.58, 868, 36.12, 7.3, 3.9)),
    Variant(_B, scaled_widths(2.5, 5), name="RepVGG-B2", published=Published(78.78, 460, 80.31, 18.4, 9.1)),
    Variant(_B, scaled_widths(2.5, 5), 2, name="RepVGG-B2g2"),
    Variant(_B, scaled_widths(2.5, 5), 4, name="RepVGG-B2g4", published=Published(79.38, 581, 55.77, 11.3, 6.0)),
    Variant(_B, scaled_widths(3, 5), name="RepVGG-B3", published=Published(80.52, 363, 110.96, 26.2, 12.9)),
    Variant(_B, scaled_widths(3, 5), 2, name="RepVGG-B3g2"),
    Variant(_B, scaled_widths(3, 5), 4, name="RepVGG-B3g4", published=Published(80.21, 464, 75.62, 16.1, 8.4)),
    Variant(
        _D,
        scaled_widths(2.5, 5),
        squeeze_excite="before_relu",
        name="RepVGG-D2se",
        image_size=320,
        crop_fraction=1.0,
        published=Published(83.55),
    ),
    Variant(
        _D,
        scaled_widths(2.5, 5),
        squeeze_excite="after_relu",
        squeeze_excite_ratio=4,
        auxiliary_heads=True,
        name="RepVGGplus-L2pse",
        image_size=320,
        crop_fraction=1.0,
        published=Published(84.06),
    ),
)
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _TABLE}


def list_models() -> list[str]:
    """Return the names of all published variants, in the order of the paper's tables."""
    return list(VARIANTS)


def get_variant(name: str) -> Variant:
    """Return the published variant called `name` (letter case does not matter).

    Raises:
      UnknownModelError: there is no such variant; the message suggests the nearest names.
    """
    by_lower = {published_name.lower(): variant for published_name, variant in VARIANTS.items()}
    variant = by_lower.get(name.lower())
    if variant is None:
        near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
        hint = (
            f"did you mean {' or '.join(by_lower[n].name for n in near)}?" if near else f"known: {', '.join(VARIANTS)}"
        )
        raise UnknownModelError(f"unknown model {name!r}; {hint}")
    return variant
