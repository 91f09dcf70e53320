"""Distribution of an array over devices, read from its type."""

from typing import Any

import jax
from jax import Array, lax


def explicitly_sharded(*arrays: Array) -> bool:
    """Return whether an `Explicit` mesh axis shards any array; then each operation must specify its sharding."""
    return any(axis is not None for array in arrays for axis in jax.typeof(array).sharding.spec)


def varying_axes(*arrays: Array) -> tuple[str, ...]:
    """Return the mesh axes over which any of the arrays varies between devices, as tracked by `shard_map`."""
    axes: set[str] = set()
    for array in arrays:
        kind: Any = jax.typeof(array)
        manual = getattr(kind, "manual_axis_type", None)  # before JAX 0.10.2: `vma`
        axes |= set(getattr(kind, "vma", ()) if manual is None else manual.varying)
    return tuple(sorted(axes))


def varying_over(axes: tuple[str, ...], array: Array) -> Array:
    """Return `array` typed as varying over `axes` too; the transpose sums over them."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(array))
    return lax.pcast(array, missing, to="varying") if missing else array
