"""Random weights for which an equivalence test is meaningful, for tests and benchmarks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import repvgg_jax as rv
from repvgg_jax.trees import flatten, unflatten


def random_variables(model: rv.RepVGG, seed: int = 0, in_channels: int = 3, dtype: Any = np.float32) -> dict[str, Any]:
    """Return variables with random weights, affine parameters and running statistics, none at its initial value.

    They are scaled so that activations neither vanish nor explode with depth and logits are of unit order: each branch
    of a block adds its share of variance, half of which the ReLU removes.
    """
    rng = np.random.default_rng(seed)
    images = jax.ShapeDtypeStruct((1, 32, 32, in_channels), jnp.float32)
    shapes = flatten(jax.eval_shape(model.init, jax.random.key(0), images))

    def leaf(name: str, shape: tuple[int, ...]) -> np.ndarray:
        parent, kind = name.split("/")[-2:]
        if kind == "kernel":
            gain = 1.0 if parent in ("conv", "down", "up", "linear") else np.sqrt(2)
            return rng.normal(0, gain / np.sqrt(np.prod(shape[:-1])), shape)
        if name.endswith("up/bias"):
            return rng.normal(3, 0.5, shape)  # gates of about 0.95: many gates of a half would leave no signal
        if kind == "scale":
            return rng.uniform(0.5, 1.05, shape) * rng.choice([1, -1], shape, p=[0.9, 0.1])
        if kind == "var":
            return rng.uniform(0.6, 1.6, shape)
        return rng.normal(0, 0.2, shape)  # means and biases

    return unflatten({name: leaf(name, s.shape).astype(dtype) for name, s in shapes.items()})
