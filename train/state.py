"""What a training run carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from repvgg_jax import RepVGG


class TrainState(struct.PyTreeNode):
    """Everything that a step changes; the input and all randomness are functions of the seed and `step`.

    Attributes:
      step: steps taken, int32.
      params, batch_stats: the model's variables. BN statistics are each device's own.
      opt_state: the optimizer's.
      ema_params, ema_batch_stats: moving averages of both; None where none is kept.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema_params: Any = None
    ema_batch_stats: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """As `model.apply` takes them."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def ema_variables(self) -> dict[str, Any]:
        """The moving averages, as `model.apply` takes them."""
        return {"params": self.ema_params, "batch_stats": self.ema_batch_stats}


def create_state(
    model: RepVGG,
    optimizer: optax.GradientTransformation,
    seed: int,
    image_shape: tuple[int, int, int],
    *,
    ema: bool = False,
    variables: dict[str, Any] | None = None,
) -> TrainState:
    """A state at step 0.

    Args:
      model: training form.
      optimizer: gives the optimizer's state.
      seed: of the initial weights.
      image_shape: `(H, W, C)`.
      ema: keep moving averages, which start at the initial weights.
      variables: start from these weights instead of random ones.
    """

    def start(variables: Any) -> TrainState:
        params, stats = variables["params"], variables["batch_stats"]
        averages = dict(ema_params=params, ema_batch_stats=stats) if ema else {}
        return TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params), **averages)

    if variables is not None:
        return jax.jit(start)(variables)
    return jax.jit(lambda key: start(model.init(key, jnp.zeros((1, *image_shape)))))(jax.random.key(seed))
