"""Symmetric 8-bit quantisation: real number = scale * integer, without zero-points.

Weights are int8 in -127..127, activations after a ReLU uint8 in 0..255, and the image int8 in -128..127. AVX-512 VNNI
and Arm's dot products natively multiply unsigned activations and signed weights. Values are rounded to nearest, ties to
even, as by ONNX's QuantizeLinear.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..broadcasting import channelwise

WEIGHT_LEVELS = 127
"""Largest integer weight; -128 is not used, so that the range is symmetric."""

UNSIGNED, SIGNED = np.dtype(np.uint8), np.dtype(np.int8)


def levels(dtype: Any) -> int:
    """Return the largest integer of an activation dtype, 255 or 127: scale = range / levels."""
    return int(np.iinfo(dtype).max)


def to_integers(x: Array, scale: Array, dtype: Any) -> Array:
    """Return `round(x / scale)`, saturated to `dtype` (uint8 or int8)."""
    info = np.iinfo(dtype)
    return jnp.clip(jnp.round(x / scale), info.min, info.max).astype(dtype)


def fake_quantize(x: Array, scale: Array, low: int, high: int) -> Array:
    """Return `scale * clip(round(x / scale), low, high)` with the gradient of the straight-through estimator.

    The gradient passes to `x` unchanged inside the range, and is zero outside (Bengio et al., 2013).

    Args:
      x: array of any shape.
      scale: positive, broadcast against `x`; treated as a constant in gradients.
      low: smallest integer.
      high: largest integer.
    """
    scale = lax.stop_gradient(scale)
    steps = jnp.clip(x / scale, low, high)
    return (steps + lax.stop_gradient(jnp.round(steps) - steps)) * scale


@functools.partial(jax.jit, static_argnums=2)
def fake_quantize_activations(x: Array, scale: Array, dtype: Any) -> Array:
    """Fake-quantise to the integers of an activation dtype."""
    info = np.iinfo(dtype)
    return fake_quantize(x, scale, info.min, info.max)


def fake_quantize_weights(kernel: Array, scale: Array) -> Array:
    """Fake-quantise weights whose last axis is the output channel."""
    return fake_quantize(kernel, channelwise(scale, kernel.ndim), -WEIGHT_LEVELS, WEIGHT_LEVELS)


def weight_scale(kernel: Any, per_channel: bool) -> Any:
    """Return the scale that maps the largest absolute weight (per output channel, or of the layer) to 127.

    Args:
      kernel: `[…, O]`, NumPy or JAX.
      per_channel: use one scale per output channel.

    Returns:
      Scales `[O]`, all equal without `per_channel`. For weights that are all zero, the smallest normal float32.
    """
    largest = abs(kernel).max(tuple(range(kernel.ndim - 1)))
    if not per_channel:
        largest = largest.max() + 0 * largest
    return (largest / WEIGHT_LEVELS).clip(np.finfo(np.float32).tiny)
