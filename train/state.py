"""The state that a training run carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from repvgg_jax import RepVGG


class TrainState(struct.PyTreeNode):
    """Everything that a step changes; the input and all randomness are functions of the seed and `step`.

    Attributes:
      step: number of steps taken, int32.
      params, batch_stats: the model's variables. BN statistics differ between devices.
      opt_state: the optimizer's state.
      ema_params, ema_batch_stats: moving averages of both; None without `--ema-decay`.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema_params: Any = None
    ema_batch_stats: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """The variables for `model.apply`."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def ema_variables(self) -> dict[str, Any]:
        """The moving averages as variables for `model.apply`."""
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
    """Return a state at step 0.

    Args:
      model: training form.
      optimizer: optimizer whose state is initialised.
      seed: seed of the initial weights.
      image_shape: `(H, W, C)`.
      ema: keep moving averages, which start at the initial weights.
      variables: initial weights instead of random ones.
    """

    def start(variables: Any) -> TrainState:
        params, stats = variables["params"], variables["batch_stats"]
        averages = dict(ema_params=params, ema_batch_stats=stats) if ema else {}
        return TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params), **averages)

    if variables is not None:
        return jax.jit(start)(variables)
    return jax.jit(lambda key: start(model.init(key, jnp.zeros((1, *image_shape)))))(jax.random.key(seed))
