"""Explicit broadcasting, for `jax_numpy_rank_promotion="raise"`."""

from typing import Any

from jax import Array, lax
from jax import numpy as jnp


def channelwise(values: Any, rank: int = 4) -> Array:
    """Return `[C]` values as `[1, …, 1, C]` with `rank` axes, to broadcast over an array of that rank."""
    values = jnp.asarray(values)
    return lax.expand_dims(values, range(rank - values.ndim))
