"""A deploy-form net as the plain stack of layers that it is, for whoever looks at one layer after another.

`Layers` is `{"stage0": {"kernel", "bias"[, "se" or "post_se"]}, …, "linear": {"kernel", "bias"}}`. Between the last
block and `linear` the global average `pool` has a name too, since its input is quantised like any layer's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..blocks import SqueezeExcite
from ..training_conv import plain_conv
from ..variants import BlockSpec, Variant

Layers = Mapping[str, Mapping[str, Any]]

POOL, LINEAR = "pool", "linear"


def layers_of(deploy_params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The layers of a deploy-form parameter tree, as float32 NumPy arrays that nobody else holds."""
    layers = {}
    for name, block in deploy_params.items():
        convolution = block if name == LINEAR else block["rbr_reparam"]
        gate = {key: tree for key, tree in block.items() if key in ("se", "post_se")}
        layers[name] = jax.tree.map(lambda leaf: np.array(leaf, np.float32), {**convolution, **gate})
    return layers


def linear_map(spec: BlockSpec | None, x: Array, kernel: Array) -> Array:
    """A layer's convolution, or the classifier's matrix product where `spec` is None; without bias."""
    return x @ kernel if spec is None else plain_conv(x, kernel, spec.stride, spec.groups)


def activate(variant: Variant, spec: BlockSpec, layer: Mapping[str, Any], x: Array) -> Array:
    """What follows a block's convolution: (SE,) ReLU (, SE)."""

    def gate(name: str, x: Array) -> Array:
        gated = SqueezeExcite(variant.squeeze_width(spec.out_channels)).apply({"params": layer[name]}, x)
        assert isinstance(gated, Array)
        return gated

    if variant.squeeze_excite == "before_relu":
        x = gate("se", x)
    x = nn.relu(x)
    return gate("post_se", x) if variant.squeeze_excite == "after_relu" else x


def layer_inputs(variant: Variant, layers: Layers, images: Array) -> dict[str, Array]:
    """What each layer of the float net reads: `{"stage0": images, …, "pool": [N, H, W, C], "linear": [N, C]}`."""
    inputs, x = {}, images
    for spec in variant.blocks():
        inputs[spec.name], layer = x, layers[spec.name]
        x = activate(variant, spec, layer, linear_map(spec, x, layer["kernel"]) + layer["bias"])
    return inputs | {POOL: x, LINEAR: x.mean((1, 2))}


def in_batches(function: Callable[..., Any], images: Array | np.ndarray, batch_size: int = 32) -> list[Any]:
    """`function` of `images`, `batch_size` at a time."""
    return [function(jnp.asarray(images[start : start + batch_size])) for start in range(0, len(images), batch_size)]
