"""What an array's type says of how it lies on several devices."""

from typing import Any

import jax
from jax import Array, lax


def explicitly_sharded(*arrays: Array) -> bool:
    """Return whether a mesh axis of type `Explicit` divides one of them; then every operation has to say how."""
    return any(axis is not None for array in arrays for axis in jax.typeof(array).sharding.spec)


def varying_axes(*arrays: Array) -> tuple[str, ...]:
    """Return the mesh axes over which one of them differs from device to device, where `shard_map` keeps account."""
    axes: set[str] = set()
    for array in arrays:
        kind: Any = jax.typeof(array)
        manual = getattr(kind, "manual_axis_type", None)  # before JAX 0.10.2: `vma`
        axes |= set(getattr(kind, "vma", ()) if manual is None else manual.varying)
    return tuple(sorted(axes))


def varying_over(axes: tuple[str, ...], array: Array) -> Array:
    """Return `array` typed as different from device to device over those axes too; the transpose is a sum over them."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(array))
    return lax.pcast(array, missing, to="varying") if missing else array
