"""Data parallelism over all devices of all processes. The one file that knows it is `jax.pmap`.

State has a leading axis of this process's devices, batches are `[devices, per_device, …]`, and collectives over
`AXIS` run over every device of every process. Neither is ever indexed with an integer while training: since pmap is
built on `jit` and `shard_map`, that would copy between devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from repvgg_jax.errors import ConfigError

AXIS = "batch"


def parallel(step: Callable, *, donate: bool = False, devices: Sequence[Any] | None = None) -> Callable:
    """`step` on every device, or on `devices`, with collectives over `AXIS`.

    `donate` reuses the first argument's memory.
    """
    return jax.pmap(step, axis_name=AXIS, donate_argnums=(0,) if donate else (), devices=devices)


def replicate(tree: Any) -> Any:
    """A copy on every local device: `[…] -> [local devices, …]`.

    Laid out as the parallel step returns its state: any other layout would make it compile twice.
    """
    count = jax.local_device_count()
    host = jax.tree.map(np.asarray, tree)
    return put_batch(jax.tree.map(lambda leaf: np.broadcast_to(leaf, (count, *leaf.shape)), host))


def put_batch(batch: Any) -> Any:
    """Start the copy of a host batch `[local devices, per_device, …]` to where the parallel step wants it."""
    return jax.device_put(batch, _local_sharding())


def distribute(tree: Any) -> Any:
    """Each local device's own entry: NumPy `[all devices, …] -> [local devices, …]`."""
    first, count = jax.process_index() * jax.local_device_count(), jax.local_device_count()
    return jax.device_put(jax.tree.map(lambda leaf: leaf[first : first + count], tree), _local_sharding())


def _local_sharding() -> jax.sharding.NamedSharding:
    """One entry of the leading axis on each local device: pmap's own sharding, so that it moves nothing."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))


def to_host(tree: Any) -> Any:
    """The first local device's copy, as NumPy arrays: `[local devices, …] -> […]`."""
    shards = jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
    return jax.tree.map(lambda leaf: leaf[0], jax.device_get(shards))


def _mean(tree: Any) -> Any:
    return lax.pmean(tree, AXIS)


def _gather(tree: Any) -> Any:
    return lax.all_gather(tree, AXIS)


mean_over_devices: Callable[[Any], Any] = jax.pmap(_mean, axis_name=AXIS)
"""Average of every device's copy, on every device: BN statistics for evaluation and saving."""

_all_gather = jax.pmap(_gather, axis_name=AXIS)


def gather_to_host(tree: Any) -> Any:
    """Every device's own entry, as NumPy arrays: `[local devices, …] -> [all devices, …]`."""
    return to_host(_all_gather(tree))


def sum_over_processes(value: int) -> int:
    """The sum of each process's `value`."""
    return int(np.sum(multihost_utils.process_allgather(np.array(value)))) if jax.process_count() > 1 else value


def per_device_batch(batch_size: int, accumulate: int = 1, devices: int | None = None) -> int:
    """Each device's share of a global batch, in one of `accumulate` portions.

    Args:
      batch_size: the global batch.
      accumulate: portions.
      devices: how many share it; all of all processes if None.

    Raises:
      ConfigError: they do not divide it.
    """
    devices = jax.device_count() if devices is None else devices
    parts = devices * accumulate
    if batch_size % parts:
        near = max(batch_size // parts, 1) * parts
        portions = f" in {accumulate} portions each" if accumulate > 1 else ""
        raise ConfigError(f"--batch-size {batch_size} cannot be shared by {devices} devices{portions}; {near} could")
    return batch_size // parts
