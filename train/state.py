"""What a training run carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from repvgg_jax import RepVGG


class TrainState(struct.PyTreeNode):
    """Everything that a checkpoint must hold to go on bit for bit; the input is a function of seed and step."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, Any]:
        """As `model.apply` takes them."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
    model: RepVGG, optimizer: optax.GradientTransformation, seed: int, image_shape: tuple[int, int, int]
) -> TrainState:
    """A fresh state; `image_shape` is `(H, W, C)`."""

    def init(key: jax.Array) -> TrainState:
        variables = model.init(key, jnp.zeros((1, *image_shape)))
        params, stats = variables["params"], variables["batch_stats"]
        return TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params))

    return jax.jit(init)(jax.random.key(seed))
