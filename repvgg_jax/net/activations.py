"""Activations that can replace ReLU after a block's sum, by name or as a function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..conv.xla import on_cpu

Activation = str | Callable[[Array], Array]
"""One of `ACTIVATIONS`, or an elementwise function."""


@jax.custom_jvp
def relu(x: Array) -> Array:
    """Return `max(x, 0)`. The gradient (0 at 0) is computed from the result, so `x` need not be kept."""
    return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = on_cpu(lambda y: y, lax.optimization_barrier, relu(*primals))
    return y, jnp.where(y > 0, tangents[0], 0)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}
"""PyTorch's `ReLU`, `ReLU6`, `LeakyReLU`, `GELU` and `SiLU` with their default arguments."""


def activation_function(activation: Activation) -> Callable[[Array], Array]:
    """Return the activation function called `activation`; a function is returned unchanged.

    Raises:
      ValueError: no activation has that name.
    """
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}, or a function")
    return ACTIVATIONS[activation]
