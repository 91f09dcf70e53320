"""A deploy-form net as the plain stack of layers that it is, for whoever looks at one layer after another.

`Layers` is `{"stage0": {"kernel", "bias"[, "se" or "post_se"]}, …, "linear": {"kernel", "bias"}}`. Between the last
block and `linear` the global average `pool` has a name too, since its input is quantised like any layer's.

Functions on one layer are compiled one by one: many layers of a net have the same shape, and share a compilation.
"""

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
from ..net.blocks import SqueezeExcite
from ..net.variants import BlockSpec, SqueezeExcitePlace, Variant

Layers = Mapping[str, Mapping[str, Any]]

Geometry = tuple[int, int, int]
"""Stride, groups, dilation."""

POOL, LINEAR = "pool", "linear"

BATCH_SIZE = 32


def layers_of(deploy_params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The layers of a deploy-form parameter tree, as float32 NumPy arrays that nobody else holds."""
    layers = {}
    for name, block in deploy_params.items():
        convolution = block if name == LINEAR else block["rbr_reparam"]
        gate = {key: tree for key, tree in block.items() if key in ("se", "post_se")}
        layers[name] = jax.tree.map(lambda leaf: np.array(leaf, np.float32), {**convolution, **gate})
    return layers


def named_specs(variant: Variant) -> list[tuple[str, BlockSpec | None]]:
    """Every layer with weights, in order; the classifier has no `BlockSpec`."""
    return [*((spec.name, spec) for spec in variant.blocks()), (LINEAR, None)]


def with_readers(specs: Sequence[BlockSpec]) -> list[tuple[BlockSpec, str]]:
    """Each block of the body with the name of what reads its output: the next block, or the pool."""
    return list(zip(specs, [*(spec.name for spec in specs[1:]), POOL], strict=True))


def geometry(spec: BlockSpec | None) -> Geometry | None:
    """What a compilation depends on besides the arrays' shapes; None for the classifier."""
    return None if spec is None else (spec.stride, spec.groups, spec.dilation)


def linear_map(shape: Geometry | None, x: Array, kernel: Array) -> Array:
    """A layer's convolution, or the classifier's matrix product where `shape` is None; without bias."""
    return x @ kernel if shape is None else deploy_conv(x, kernel, *shape)


def affine(spec: BlockSpec | None, layer: Mapping[str, Any], x: Any) -> Array:
    """A layer's output before what follows, compiled."""
    return _affine(geometry(spec), x, layer["kernel"], layer["bias"])


@functools.partial(jax.jit, static_argnums=0)
def _affine(shape: Geometry | None, x: Array, kernel: Array, bias: Array) -> Array:
    return linear_map(shape, x, kernel) + channelwise(bias, x.ndim)


def activate(variant: Variant, spec: BlockSpec, layer: Mapping[str, Any], x: Any) -> Array:
    """What follows a block's convolution, compiled: (SE,) ReLU (, SE)."""
    place = variant.squeeze_excite
    gate = None if place is None else layer["se" if place == "before_relu" else "post_se"]
    return _activate(place, variant.squeeze_width(spec.out_channels), gate, x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _activate(place: SqueezeExcitePlace | None, squeeze_width: int, gate: Mapping[str, Any] | None, x: Array) -> Array:
    def gated(x: Array) -> Array:
        found = SqueezeExcite(squeeze_width).apply({"params": gate or {}}, x)
        assert isinstance(found, Array)
        return found

    if place == "before_relu":
        x = gated(x)
    x = nn.relu(x)
    return gated(x) if place == "after_relu" else x


def layer_inputs(variant: Variant, layers: Layers, images: Any) -> dict[str, Array]:
    """What each layer of the float net reads: `{"stage0": images, …, "pool": [N, H, W, C], "linear": [N, C]}`."""
    inputs, x = {}, images
    for spec in variant.blocks():
        inputs[spec.name], layer = x, layers[spec.name]
        x = activate(variant, spec, layer, affine(spec, layer, x))
    return inputs | {POOL: x, LINEAR: x.mean((1, 2))}


def in_batches(function: Callable[[Array], Any], images: Array | np.ndarray) -> list[Any]:
    """`function` of `images`, `BATCH_SIZE` at a time."""
    return [function(jnp.asarray(images[start : start + BATCH_SIZE])) for start in range(0, len(images), BATCH_SIZE)]


def over_batches(function: Callable[[Array], Array], images: Array | np.ndarray) -> np.ndarray:
    """The same as one NumPy array."""
    return np.concatenate(in_batches(lambda batch: np.asarray(function(batch)), images))
