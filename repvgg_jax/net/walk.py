"""The one walk through a deploy net: which operation comes after which.

Whoever computes, records, quantises or writes a deploy net gives the walk its operations. What they hand on is theirs:
an array, a pair of them, the name of a node.
"""

from typing import Protocol, TypeVar

from .variants import GATE_NAMES, BlockSpec, SqueezeExcitePlace, Variant

Value = TypeVar("Value")
_Block = TypeVar("_Block", contravariant=True)

ACTIVATION = "activation"

AFTER_CONVOLUTION: dict[SqueezeExcitePlace | None, tuple[str, ...]] = {
    None: (ACTIVATION,),
    "before_relu": (GATE_NAMES["before_relu"], ACTIVATION),
    "after_relu": (ACTIVATION, GATE_NAMES["after_relu"]),
}
"""What follows a block's convolution, in order; a gate by its name. D2se gates before the ReLU, RepVGGplus after it."""


class BlockOperations(Protocol[_Block, Value]):
    """What the walk asks for in a block."""

    def conv(self, block: _Block, x: Value, *, activate: bool) -> Value:
        """Convolve and add the bias; with `activate` also apply the activation, which then follows directly."""
        ...

    def gate(self, block: _Block, name: str, x: Value) -> Value:
        """Squeeze and excite by the block's parameters of that name."""
        ...

    def activation(self, block: _Block, x: Value) -> Value:
        """Apply the activation, where a gate stands between it and the convolution."""
        ...


class Operations(BlockOperations[BlockSpec, Value], Protocol[Value]):
    """What the walk asks for in a net."""

    def pool(self, x: Value) -> Value:
        """Average over height and width."""
        ...

    def linear(self, x: Value) -> Value:
        """Classify."""
        ...


def walk(variant: Variant, operations: Operations[Value], x: Value) -> Value:
    """Return what the operations make of `x` on its way from the image to the logits."""
    for block in variant.blocks():
        x = walk_block(variant, operations, block, x)
    return operations.linear(operations.pool(x))


def walk_block(variant: Variant, operations: BlockOperations[_Block, Value], block: _Block, x: Value) -> Value:
    """Return what the operations make of `x` in one block."""
    steps = AFTER_CONVOLUTION[variant.squeeze_excite]
    activate = steps[0] == ACTIVATION
    x = operations.conv(block, x, activate=activate)
    for step in steps[activate:]:
        x = operations.activation(block, x) if step == ACTIVATION else operations.gate(block, step, x)
    return x
