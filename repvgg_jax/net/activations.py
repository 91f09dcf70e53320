"""What may follow a block's sum instead of ReLU, by name or as a function."""

from collections.abc import Callable

import jax
from jax import Array

Activation = str | Callable[[Array], Array]
"""One of `ACTIVATIONS`, or an elementwise function."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}
"""PyTorch's `ReLU`, `ReLU6`, `LeakyReLU`, `GELU` and `SiLU` with their default arguments."""


def activation_function(activation: Activation) -> Callable[[Array], Array]:
    """Return the function behind a name; a function is returned as it is.

    Raises:
      ValueError: no activation has that name.
    """
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}, or a function")
    return ACTIVATIONS[activation]
