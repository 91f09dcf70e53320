"""Data parallelism over all devices of all processes; the only module that uses `jax.pmap`.

The state has a leading axis of this process's devices, batches are `[devices, per_device, …]`, and collectives over
`AXIS` run over every device of every process. Training never indexes the leading axis with an integer: since pmap is
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
    """Return `step` parallelised over all devices, or over `devices`, with collectives over `AXIS`.

    With `donate`, it reuses the first argument's memory.
    """
    return jax.pmap(step, axis_name=AXIS, donate_argnums=(0,) if donate else (), devices=devices)


def replicate(tree: Any) -> Any:
    """Copy a tree to every local device: `[…] -> [local devices, …]`.

    The layout is that of the state which the parallel step returns; with any other, the step would compile twice.
    """
    count = jax.local_device_count()
    host = jax.tree.map(np.asarray, tree)
    return put_batch(jax.tree.map(lambda leaf: np.broadcast_to(leaf, (count, *leaf.shape)), host))


def put_batch(batch: Any) -> Any:
    """Start copying a host batch `[local devices, per_device, …]` to the devices of the parallel step."""
    return jax.device_put(batch, _local_sharding())


def distribute(tree: Any) -> Any:
    """Copy each local device's entry to it: NumPy `[all devices, …] -> [local devices, …]`."""
    first, count = jax.process_index() * jax.local_device_count(), jax.local_device_count()
    return jax.device_put(jax.tree.map(lambda leaf: leaf[first : first + count], tree), _local_sharding())


def _local_sharding() -> jax.sharding.NamedSharding:
    """Return pmap's sharding, one entry of the leading axis per local device, so that pmap moves nothing."""
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))


def to_host(tree: Any) -> Any:
    """Return the first local device's copy as NumPy arrays: `[local devices, …] -> […]`."""
    shards = jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
    return jax.tree.map(lambda leaf: leaf[0], jax.device_get(shards))


def _mean(tree: Any) -> Any:
    return lax.pmean(tree, AXIS)


def _gather(tree: Any) -> Any:
    return lax.all_gather(tree, AXIS)


mean_over_devices: Callable[[Any], Any] = jax.pmap(_mean, axis_name=AXIS)
"""Average over all devices, on every device; used for BN statistics in evaluation and saving."""

_all_gather = jax.pmap(_gather, axis_name=AXIS)


def gather_to_host(tree: Any) -> Any:
    """Return the entries of all devices as NumPy arrays: `[local devices, …] -> [all devices, …]`."""
    return to_host(_all_gather(tree))


def sum_over_processes(value: int) -> int:
    """Return the sum of `value` over all processes."""
    return int(np.sum(multihost_utils.process_allgather(np.array(value)))) if jax.process_count() > 1 else value


def per_device_batch(batch_size: int, accumulate: int = 1, devices: int | None = None) -> int:
    """Return the number of images of a global batch that each device takes in each of `accumulate` portions.

    Args:
      batch_size: global batch size.
      accumulate: number of portions.
      devices: number of devices; None for all devices of all processes.

    Raises:
      ConfigError: `batch_size` is not divisible by devices and portions.
    """
    devices = jax.device_count() if devices is None else devices
    parts = devices * accumulate
    if batch_size % parts:
        near = max(batch_size // parts, 1) * parts
        divisor = "1 device" if devices == 1 else f"{devices} devices"
        divisor += f" x --accumulate {accumulate}" if accumulate > 1 else ""
        raise ConfigError(f"--batch-size {batch_size} is not a multiple of {divisor}; {near} is")
    return batch_size // parts
