"""Claim: the order of operations in a deploy net is defined once, and all code that goes through a net follows it."""

import dataclasses
from pathlib import Path

import pytest

import repvgg_jax as rv
from repvgg_jax.net.variants import BlockSpec
from repvgg_jax.net.walk import walk, walk_block

PLAIN = rv.Variant((1, 1, 1, 1), (8, 8, 8, 8, 8))


class Words:
    """Operations that record their names."""

    def conv(self, block: BlockSpec, x: str, *, activate: bool) -> str:
        return f"{x} {block.name}" + "+activation" * activate

    def gate(self, block: BlockSpec, name: str, x: str) -> str:
        return f"{x} {name}"

    def activation(self, block: BlockSpec, x: str) -> str:
        return f"{x} activation"

    def pool(self, x: str) -> str:
        return f"{x} pool"

    def linear(self, x: str) -> str:
        return f"{x} linear"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (None, "x stage1_0+activation"),
        ("before_relu", "x stage1_0 se activation"),
        ("after_relu", "x stage1_0+activation post_se"),
    ],
)
def test_gate_and_activation_follow_a_convolution_in_the_variants_order(place, expected):
    variant = dataclasses.replace(PLAIN, squeeze_excite=place)
    assert walk_block(variant, Words(), variant.blocks()[1], "x") == expected


def test_a_net_is_its_blocks_in_order_then_pool_and_classifier():
    body = " ".join(f"{block.name}+activation" for block in PLAIN.blocks())
    assert walk(PLAIN, Words(), "x") == f"x {body} pool linear"


def test_no_other_file_decides_where_a_gate_goes():
    package = Path(rv.__file__).parent
    knowing = {file.name for file in package.rglob("*.py") if '"before_relu"' in file.read_text(encoding="utf-8")}
    assert knowing == {"variants.py", "walk.py"}
