"""The walk through a deploy net, which defines the order of its operations.

Code that computes, records, quantises or exports a deploy net passes its operations to the walk. The value that they
pass on may be anything: an array, a pair of arrays, the name of a node.
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
"""Steps after a block's convolution, in order; a gate by its name. D2se gates before the ReLU, RepVGGplus after it."""


class BlockOperations(Protocol[_Block, Value]):
    """Operations that the walk calls in a block."""

    def conv(self, block: _Block, x: Value, *, activate: bool) -> Value:
        """Convolve and add the bias; with `activate`, also apply the activation, which follows directly."""
        ...

    def gate(self, block: _Block, name: str, x: Value) -> Value:
        """Apply the squeeze-and-excite gate called `name`."""
        ...

    def activation(self, block: _Block, x: Value) -> Value:
        """Apply the activation, if a gate comes between it and the convolution."""
        ...


class Operations(BlockOperations[BlockSpec, Value], Protocol[Value]):
    """Operations that the walk calls in a net."""

    def pool(self, x: Value) -> Value:
        """Average over height and width."""
        ...

    def linear(self, x: Value) -> Value:
        """Apply the classifier."""
        ...


def walk(variant: Variant, operations: Operations[Value], x: Value) -> Value:
    """Apply the operations from the image `x` to the logits, in order, and return the result."""
    for block in variant.blocks():
        x = walk_block(variant, operations, block, x)
    return operations.linear(operations.pool(x))


def walk_block(variant: Variant, operations: BlockOperations[_Block, Value], block: _Block, x: Value) -> Value:
    """Apply the operations of one block to `x` and return the result."""
    steps = AFTER_CONVOLUTION[variant.squeeze_excite]
    activate = steps[0] == ACTIVATION
    x = operations.conv(block, x, activate=activate)
    for step in steps[activate:]:
        x = operations.activation(block, x) if step == ACTIVATION else operations.gate(block, step, x)
    return x
