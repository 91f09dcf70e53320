"""Data parallelism over the local devices. The one file that knows it is `jax.pmap`.

State has a leading axis of devices, batches are `[devices, per_device, …]`. Neither is ever indexed with an
integer while training: since pmap is built on `jit` and `shard_map`, that would copy between devices.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import jax_utils
from jax import lax

from repvgg_jax.errors import ConfigError

from .state import TrainState

AXIS = "batch"


def parallel(step: Callable, *, donate: bool = False) -> Callable:
    """`step` on every local device, with collectives over `AXIS`; `donate` reuses the first argument's memory."""
    return jax.pmap(step, axis_name=AXIS, donate_argnums=(0,) if donate else ())


def replicate(tree: Any) -> Any:
    """A copy on every local device: `[…] -> [devices, …]`."""
    return jax_utils.replicate(tree)


def unreplicate(tree: Any) -> Any:
    """The first device's copy: `[devices, …] -> […]`."""
    return jax_utils.unreplicate(tree)


def _mean_stats(state: TrainState) -> TrainState:
    return state.replace(batch_stats=lax.pmean(state.batch_stats, AXIS))


average_batch_stats: Callable[[TrainState], TrainState] = jax.pmap(_mean_stats, axis_name=AXIS)
"""BN statistics averaged over the devices, for evaluation and saving."""


def per_device_batch(batch_size: int) -> int:
    """Each local device's share of a global batch.

    Raises:
      ConfigError: the devices do not divide it.
    """
    devices = jax.device_count()
    if batch_size % devices:
        near = max(batch_size // devices, 1) * devices
        raise ConfigError(f"--batch-size {batch_size} cannot be shared by {devices} devices; {near} could")
    return batch_size // devices
