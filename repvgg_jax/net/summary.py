"""Parameters, FLOPs, Winograd multiplications and activation memory of a variant, from the architecture alone.

Counted as in the paper's tables: deploy form, multiply-adds; under Winograd F(2x2, 3x3) a 3x3 stride-1 convolution
counts 4/9 of its multiplications (paper section 2.4), a strided one all of them.
"""

import dataclasses
import math

from ..errors import ConfigError
from ..text_table import text_table
from .layout import block_layers, expected_shapes
from .variants import VARIANTS, BlockSpec, Variant


@dataclasses.dataclass(frozen=True)
class Summary:
    """Cost of a network for one image.

    Attributes:
      params: weights and biases of the deploy form.
      train_params: parameters of the training form (without running statistics).
      flops: multiply-adds of convolutions, squeeze-and-excite and classifier in the deploy form.
      train_flops: multiply-adds of the training form's forward pass (without auxiliary heads).
      winograd_muls: multiplications of the deploy form when stride-1 3x3 convolutions run as F(2x2, 3x3).
      peak_activation_bytes: largest input plus output of a block in float32: the memory that a plain stack needs.
    """

    params: int
    train_params: int
    flops: int
    train_flops: int
    winograd_muls: int
    peak_activation_bytes: int


@dataclasses.dataclass(frozen=True)
class BlockCost:
    """Cost of one block for one image.

    Attributes:
      block: the block.
      in_size: side of the input in pixels.
      out_size: side of the output in pixels.
      params: weights and biases of the deploy form.
      train_params: parameters of the training form.
      flops: multiply-adds of the deploy form, gate included.
      train_flops: multiply-adds of the training form, gate included.
      winograd_muls: multiplications of the deploy form with Winograd's F(2x2, 3x3) where the stride is 1; not rounded.
      activation_bytes: size of input plus output in float32.
    """

    block: BlockSpec
    in_size: int
    out_size: int
    params: int
    train_params: int
    flops: int
    train_flops: int
    winograd_muls: float
    activation_bytes: int


def block_costs(variant: Variant, image_size: int, in_channels: int = 3) -> list[BlockCost]:
    """Return the cost of every block of `variant` on one square image, from image to head."""
    costs = []
    size = image_size
    for block in variant.blocks(in_channels):
        in_size, size = size, math.ceil(size / block.stride)
        in_pixels, pixels = in_size * in_size, size * size
        multiplies = 9 * block.in_channels // block.groups * block.out_channels * pixels
        gate = 2 * variant.squeeze_width(block.out_channels) * block.out_channels if variant.squeeze_excite else 0
        branches = variant.training_branches(block)
        costs.append(
            BlockCost(
                block=block,
                in_size=in_size,
                out_size=size,
                params=_block_params(variant, block, deploy=True),
                train_params=_block_params(variant, block, deploy=False),
                flops=multiplies + gate,
                train_flops=sum(branch.multiply_adds(block, in_pixels, pixels) for branch in branches) + gate,
                winograd_muls=multiplies * (4 / 9 if block.stride == 1 else 1) + gate,
                activation_bytes=4 * (in_pixels * block.in_channels + pixels * block.out_channels),
            )
        )
    return costs


def _block_params(variant: Variant, block: BlockSpec, *, deploy: bool) -> int:
    leaves = (leaf for layer in block_layers(variant, block, deploy) for leaf in layer.leaves())
    return sum(math.prod(shape) for name, shape in leaves if name.startswith("params/"))


def summarize(variant: Variant, *, image_size: int = 224, num_classes: int = 1000, in_channels: int = 3) -> Summary:
    """Return the cost of `variant` for one square image.

    Args:
      variant: the architecture.
      image_size: side of the image in pixels.
      num_classes: width of the classifier.
      in_channels: channels of the image.

    Raises:
      ConfigError: a size is not positive.
    """
    for option, value in (("image_size", image_size), ("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ConfigError(f"{option} must be at least 1, not {value}")
    costs = block_costs(variant, image_size, in_channels)
    head = variant.widths[-1] * num_classes
    shapes = (expected_shapes(variant, deploy, num_classes, in_channels) for deploy in (True, False))
    params, train_params = (
        sum(math.prod(shape) for name, shape in form.items() if name.startswith("params/")) for form in shapes
    )
    return Summary(
        params=params,
        train_params=train_params,
        flops=sum(cost.flops for cost in costs) + head,
        train_flops=sum(cost.train_flops for cost in costs) + head,
        winograd_muls=round(sum(cost.winograd_muls for cost in costs)) + head,
        peak_activation_bytes=max(cost.activation_bytes for cost in costs),
    )


def summary_table(
    variants: list[Variant] | None = None, *, image_size: int = 224, num_classes: int = 1000, in_channels: int = 3
) -> str:
    """Return a text table of variants, one per line: our figures, and published ones in brackets where they exist.

    Args:
      variants: the variants to list; None for all published ones.
      image_size: side of the image in pixels.
      num_classes: width of the classifier.
      in_channels: channels of the image.

    Raises:
      ConfigError: a size is not positive.
    """
    rows = [("model", "top-1 %", "params M", "(train)", "FLOPs B", "Wino MULs B", "peak act. MB")]
    for variant in variants or list(VARIANTS.values()):
        cost = summarize(variant, image_size=image_size, num_classes=num_classes, in_channels=in_channels)
        paper = variant.published
        rows.append(
            (
                variant.name,
                "" if paper.top1 is None else f"[{paper.top1:.2f}]",
                _beside(truncated(cost.params / 1e6, 2), paper.params_millions, 2),
                f"{truncated(cost.train_params / 1e6, 2):.2f}",
                _beside(cost.flops / 1e9, paper.flops_billions, 1),
                _beside(cost.winograd_muls / 1e9, paper.winograd_muls_billions, 1),
                f"{cost.peak_activation_bytes / 1e6:.2f}",
            )
        )
    lines = text_table(rows)
    note = (
        f"Deploy form, one {image_size}x{image_size} image, {num_classes} classes; "
        "(train) counts the training form's parameters.\n"
        "FLOPs are multiply-adds. Parameters are truncated, not rounded, to two decimals, as in the paper.\n"
        "[Published figures, at 224x224 with 1000 classes; top-1 of D2se and RepVGGplus at 320x320.]"
    )
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", note])


def truncated(value: float, digits: int) -> float:
    """Truncate `value` to `digits` decimals, as the paper does for parameter counts; it rounds other figures."""
    return math.floor(value * 10**digits) / 10**digits


def _beside(ours: float, published: float | None, digits: int) -> str:
    ours_text = f"{ours:.{digits}f}"
    return ours_text if published is None else f"{ours_text} [{published:.{digits}f}]"
