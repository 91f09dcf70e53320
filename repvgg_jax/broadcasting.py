"""Broadcasting said out loud, as `jax_numpy_rank_promotion="raise"` demands."""

from typing import Any

from jax import Array, lax
from jax import numpy as jnp


def channelwise(values: Any, rank: int = 4) -> Array:
    """Return `[C]` with axes of size 1 in front, to be broadcast over an array of that rank: `[1, 1, 1, C]`."""
    values = jnp.asarray(values)
    return lax.expand_dims(values, range(rank - values.ndim))
