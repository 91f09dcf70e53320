"""A deploy-form net as a plain stack of layers, for processing layer by layer.

`Layers` is `{"stage0": {"kernel", "bias"[, "se" or "post_se"]}, …, "linear": {"kernel", "bias"}}`. The global average
between the last block and `linear` is called `pool`; its input is quantised like that of any layer.

Each function on one layer is compiled separately: many layers of a net have the same shape and share a compilation.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..broadcasting import channelwise
from ..conv.deploy import deploy_conv
from ..errors import QuantizationError
from ..net.blocks import SqueezeExcite
from ..net.variants import BlockSpec, Variant
from ..net.walk import walk

Layers = Mapping[str, Mapping[str, Any]]

Geometry = tuple[int, int, int]
"""(stride, groups, dilation)."""

POOL, LINEAR = "pool", "linear"

BATCH_SIZE = 32


def check_relu(variant: Variant) -> None:
    """Raise QuantizationError unless the activation is ReLU: uint8 cannot represent other activations' outputs."""
    if variant.activation != "relu":
        raise QuantizationError(f"only nets with ReLU are quantised, this one has {variant.activation}")


def layers_of(deploy_params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the layers of a deploy-form parameter tree, as new float32 NumPy arrays."""
    layers = {}
    for name, block in deploy_params.items():
        beside = {key: tree for key, tree in block.items() if key != "rbr_reparam"}  # a gate; the whole classifier
        layers[name] = jax.tree.map(lambda leaf: np.array(leaf, np.float32), {**block.get("rbr_reparam", {}), **beside})
    return layers


def with_readers(specs: Sequence[BlockSpec]) -> list[tuple[BlockSpec, str]]:
    """Return each block of the body with the name of the layer that reads its output: the next block, or the pool."""
    return list(zip(specs, [*(spec.name for spec in specs[1:]), POOL], strict=True))


def geometry(spec: BlockSpec | None) -> Geometry | None:
    """Return the parameters that a compilation depends on in addition to array shapes; None for the classifier."""
    return None if spec is None else (spec.stride, spec.groups, spec.dilation)


def linear_map(shape: Geometry | None, x: Array, kernel: Array) -> Array:
    """Return a layer's convolution, or the classifier's matrix product if `shape` is None, without bias."""
    return x @ kernel if shape is None else deploy_conv(x, kernel, *shape)


def layer_output(spec: BlockSpec | None, layer: Mapping[str, Any], x: Any) -> Array:
    """Return a layer's output before gate and activation, compiled; `spec` is None for the classifier."""
    return _layer_output(geometry(spec), x, layer["kernel"], layer["bias"])


@functools.partial(jax.jit, static_argnums=0)
def _layer_output(shape: Geometry | None, x: Array, kernel: Array, bias: Array) -> Array:
    return linear_map(shape, x, kernel) + channelwise(bias, x.ndim)


@functools.partial(jax.jit, static_argnums=0)
def _gated(squeeze_width: int, gate: Mapping[str, Any], x: Array) -> Array:
    gated = SqueezeExcite(squeeze_width).apply({"params": gate}, x)
    assert isinstance(gated, Array)
    return gated


@dataclasses.dataclass
class FloatOperations:
    """Operations for `walk` through a float net. `inputs` collects the input of each layer by name."""

    variant: Variant
    layers: Layers
    inputs: dict[str, Array] = dataclasses.field(default_factory=dict, init=False)

    def read(self, name: str, x: Array) -> Array:
        """Record `x` as the input of the layer called `name`, and return it."""
        self.inputs[name] = x
        return x

    def conv(self, block: BlockSpec, x: Array, *, activate: bool) -> Array:
        """Compute the convolution in float32."""
        y = layer_output(block, self.layers[block.name], self.read(block.name, x))
        return self.activation(block, y) if activate else y

    def gate(self, block: BlockSpec, name: str, x: Array) -> Array:
        """Apply the squeeze-and-excite gate in float32."""
        return _gated(self.variant.squeeze_width(block.out_channels), self.layers[block.name][name], x)

    def activation(self, block: BlockSpec, x: Array) -> Array:
        """Apply ReLU."""
        del block
        return nn.relu(x)

    def pool(self, x: Array) -> Array:
        """Average over pixels in float32."""
        return self.read(POOL, x).mean((1, 2))

    def linear(self, x: Array) -> Array:
        """Compute the classifier in float32."""
        return layer_output(None, self.layers[LINEAR], self.read(LINEAR, x))


def layer_inputs(variant: Variant, layers: Layers, images: Any) -> dict[str, Array]:
    """Return the input of each layer of the float net by name, from `stage0` (the images) to `linear` (`[N, C]`)."""
    operations = FloatOperations(variant, layers)
    walk(variant, operations, images)
    return operations.inputs


def in_batches(function: Callable[[Array], Any], images: Array | np.ndarray) -> list[Any]:
    """Apply `function` to `BATCH_SIZE` images at a time, and return the results."""
    return [function(jnp.asarray(images[start : start + BATCH_SIZE])) for start in range(0, len(images), BATCH_SIZE)]


def over_batches(function: Callable[[Array], Array], images: Array | np.ndarray) -> np.ndarray:
    """Apply `function` to `BATCH_SIZE` images at a time, and return the results as one NumPy array."""
    return np.concatenate(in_batches(lambda batch: np.asarray(function(batch)), images))
