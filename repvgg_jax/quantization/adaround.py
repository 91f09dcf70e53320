"""AdaRound (Nagel et al., ICML 2020): learns layer by layer whether to round each weight up or down.

Rounding to nearest is best for a single weight, but not for a sum of many. Here the layer's output on calibration data
decides: each weight is `floor(w / s) + h` with h between 0 and 1, and a growing penalty drives every h to 0 or 1.

With small images, a late layer has more weights than the calibration images have pixels there, and would overfit. So
some images are held out; if the learned rounding does not improve on them, the layer is rounded to nearest.
"""

import dataclasses
import functools
import importlib.util
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..broadcasting import channelwise
from ..errors import QuantizationError
from ..extras import install_hint
from ..net.variants import BlockSpec
from .quantizer import WEIGHT_LEVELS
from .stack import Geometry, geometry, linear_map

ZETA, GAMMA = 1.1, -0.1
"""Stretch of the sigmoid (paper, equation 23), so that h reaches 0 and 1 at finite logits."""

HELD_OUT = 4
"""One in this many calibration images is held out for validation, up to `MAX_HELD_OUT` images."""

MAX_HELD_OUT = 64


@dataclasses.dataclass(frozen=True)
class AdaRoundOptions:
    """Settings for the optimisation of the rounding.

    Attributes:
      steps: optimiser steps per layer.
      batch_size: calibration images per step.
      learning_rate: Adam's learning rate.
      penalty: weight of the penalty against the reconstruction error, both relative to their starting values.
      warm_up: fraction of the steps without penalty.
      hardness: the penalty's exponent at the first and the last step with penalty.
    """

    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 1e-2
    penalty: float = 0.1
    warm_up: float = 0.2
    hardness: tuple[float, float] = (20.0, 2.0)


def require_optax() -> None:
    """Raise QuantizationError with an installation hint if optax is not installed."""
    if importlib.util.find_spec("optax") is None:
        raise QuantizationError(f"learned rounding needs optax: {install_hint('train')}")


def learn_rounding(
    spec: BlockSpec | None,
    layer: dict[str, Any],
    scale: np.ndarray,
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    relu: bool,
    options: AdaRoundOptions,
) -> np.ndarray:
    """Return the integer weights that bring the layer's output closest to that of the float layer.

    Args:
      spec: the block; None for the classifier.
      layer: float `kernel` and `bias`.
      scale: weight scale of each output channel, `[O]`.
      inputs: the layer's inputs in the quantised net, dequantised, `[N, …]`.
      targets: the layer's outputs in the float net, before the ReLU.
      relu: whether a ReLU follows directly; errors below zero then do not count.
      options: settings of the optimiser.

    Returns:
      Integers in the shape of the kernel, as float32.
    """
    require_optax()
    held_out = min(len(inputs) // HELD_OUT, MAX_HELD_OUT)
    count = len(inputs) - held_out
    batch = min(options.batch_size, count)
    places = np.random.default_rng(0).integers(0, count, (options.steps, batch))
    kernel, bias = jnp.asarray(layer["kernel"]), jnp.asarray(layer["bias"])
    steps = channelwise(scale, kernel.ndim)
    shape = geometry(spec)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        soft = _optimize(shape, relu, options, kernel, bias, steps, inputs[:count], targets[:count], places)
    nearest, learned = jnp.round(kernel / steps), jnp.floor(kernel / steps) + (soft >= 0.5).astype(kernel.dtype)

    def held_out_error(integers: Array) -> float:
        return float(_error(shape, relu, _weights(integers, steps), bias, inputs[count:], targets[count:]))

    better = held_out > 0 and held_out_error(learned) < held_out_error(nearest)
    return np.asarray(learned if better else nearest)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _error(shape: Geometry | None, relu: bool, weights: Array, bias: Array, x: Array, target: Array) -> Array:
    """Return the mean squared error of the layer's output, after the ReLU if there is one."""
    output = linear_map(shape, x, weights) + channelwise(bias, x.ndim)
    if relu:
        output, target = nn.relu(output), nn.relu(target)
    return jnp.square(output - target).mean()


def _weights(integers: Array, scale: Array) -> Array:
    return jnp.clip(integers, -WEIGHT_LEVELS, WEIGHT_LEVELS) * scale


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _optimize(
    shape: Geometry | None,
    relu: bool,
    options: AdaRoundOptions,
    kernel: Array,
    bias: Array,
    scale: Array,
    inputs: Array,
    targets: Array,
    places: Array,
) -> Array:
    """Return each weight's h after the last step. Layers of the same shape share one compilation."""
    import optax

    floor = jnp.floor(kernel / scale)
    optimizer = optax.adam(options.learning_rate)

    def error(integers: Array, x: Array, target: Array) -> Array:
        return _error(shape, relu, _weights(integers, scale), bias, x, target)

    first = places[: min(8, options.steps)].reshape(-1)
    start_error = jnp.maximum(error(jnp.round(kernel / scale), inputs[first], targets[first]), 1e-20)

    def loss(logits: Array, x: Array, target: Array, step: Array) -> Array:
        h = _rectified_sigmoid(logits)
        progress = (step / options.steps - options.warm_up) / (1 - options.warm_up)
        high, low = options.hardness
        # Cosine annealing from soft to hard, as in the paper's code.
        exponent = low + 0.5 * (high - low) * (1 + jnp.cos(jnp.clip(progress, 0, 1) * jnp.pi))
        undecided = (1 - jnp.abs(2 * h - 1) ** exponent).mean()
        return error(floor + h, x, target) / start_error + jnp.where(progress >= 0, options.penalty, 0) * undecided

    def step(carry: tuple[Array, Any], turn: tuple[Array, Array]) -> tuple[tuple[Array, Any], None]:
        (logits, state), (number, chosen) = carry, turn
        gradient = jax.grad(loss)(logits, inputs[chosen], targets[chosen], number)
        updates, state = optimizer.update(gradient, state)
        return (logits + jnp.asarray(updates), state), None

    remainder = jnp.clip((kernel / scale - floor - GAMMA) / (ZETA - GAMMA), 0.01, 0.99)
    logits = jnp.log(remainder / (1 - remainder))
    start = (logits, optimizer.init(logits))
    (logits, _), _ = lax.scan(step, start, (jnp.arange(options.steps), places))
    return _rectified_sigmoid(logits)


def _rectified_sigmoid(logits: Array) -> Array:
    return jnp.clip(nn.sigmoid(logits) * (ZETA - GAMMA) + GAMMA, 0, 1)
