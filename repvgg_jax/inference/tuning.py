"""Choice of a net's plan: XLA's, the cost model's, or the algorithms measured as fastest on this machine."""

import dataclasses
import time
from statistics import median

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from ..conv.algorithm import candidates
from ..conv.cost import LayerShape
from ..conv.deploy import convolve, prepare_kernel
from ..net.model import RepVGG
from . import plan_cache
from .plan import Plan, StagePlan, default_plan, portion_choices, stage_layers, xla_plan
from .planned_net import compile_for_cpu

DTYPE = "float32"
"""Dtype of the measurements."""

RUNS = 5
HOPELESS = 4.0
"""Candidates are not measured if the cost model estimates that they are this many times slower than the best."""


def choose_plan(model: RepVGG, batch_size: int, image_size: tuple[int, int], channels: int, *, tune: bool) -> Plan:
    """Return XLA's plan on accelerators, or if no other algorithm applies; otherwise a plan for this CPU.

    Args:
      model: model whose `dtype` is the computation dtype.
      batch_size: images per call.
      image_size: (height, width) in pixels.
      channels: number of input channels.
      tune: if possible, use measurements on this machine (new or cached) instead of the cost model.
    """
    platform, dtype = jax.default_backend(), jnp.dtype(model.dtype).name
    layers = [layer for stage in stage_layers(model.variant, image_size, channels) for layer in stage]
    if platform != "cpu" or all(len(candidates(layer.shape, dtype)) == 1 for layer in layers):
        return xla_plan(model.variant, batch_size, image_size, channels, f"platform ({platform}, {dtype})")
    plan = default_plan(model.variant, batch_size, image_size, channels, dtype=dtype)
    if not tune or dtype != DTYPE:
        return plan
    cached = plan_cache.load_plan(plan, dtype)
    if cached is not None:
        return cached
    with jax.disable_jit(False):  # measure compiled code
        plan = measured_plan(plan)
    plan_cache.save_plan(plan, dtype)
    return plan


def measured_plan(plan: Plan) -> Plan:
    """Return `plan` with each stage's portion and each layer's algorithm replaced by the fastest ones measured (CPU).

    Compiles and runs a small function for each distinct layer shape, candidate and portion, which takes a minute or
    two.
    """
    cache: dict[tuple[LayerShape, int], tuple[str, float]] = {}

    def best(shape: LayerShape, portion: int) -> tuple[str, float]:
        if (shape, portion) not in cache:
            guesses = {a.name: a.seconds(shape, portion) for a in candidates(shape, DTYPE)}
            worth = [name for name, guess in guesses.items() if guess <= HOPELESS * min(guesses.values())]
            times = [(name, measure_layer(shape, name, portion, plan.outer)) for name in worth]
            cache[shape, portion] = min(times, key=lambda pair: pair[1])
        return cache[shape, portion]

    stages = []
    for stage in plan.stages:
        totals = {p: sum(best(layer.shape, p)[1] for layer in stage.layers) for p in portion_choices(plan.outer)}
        portion = min(totals, key=lambda p: totals[p])
        layers = (dataclasses.replace(x, algorithm=best(x.shape, portion)[0]) for x in stage.layers)
        stages.append(StagePlan(portion, tuple(layers)))
    return dataclasses.replace(plan, stages=tuple(stages), source="measured")


def measure_layer(shape: LayerShape, algorithm: str, portion: int, images: int) -> float:
    """Return the seconds per image that one layer takes to process `images` images, `portion` at a time, in float32.

    The layer's output does not leave the loop, as inside a net. The result is only one maximum per channel, so the
    measurement does not include page faults for a large result.
    """
    rng = np.random.default_rng(0)
    scale = (9 * shape.in_channels / shape.groups) ** -0.5
    kernel = rng.normal(0, scale, (3, 3, shape.in_channels // shape.groups, shape.out_channels)).astype(np.float32)
    prepared = jnp.asarray(prepare_kernel(kernel, algorithm, groups=shape.groups))
    bias = jnp.zeros(shape.out_channels)
    steps = max(images // portion, 2)
    batches = rng.normal(0, 1, (steps, portion, shape.height, shape.width, shape.in_channels)).astype(np.float32)

    def run(batches: jax.Array, prepared: jax.Array, bias: jax.Array) -> jax.Array:
        def step(x: jax.Array) -> jax.Array:
            y = convolve(
                x,
                prepared,
                bias,
                algorithm=algorithm,
                stride=shape.stride,
                groups=shape.groups,
                dilation=shape.dilation,
                relu=True,
            )
            return y.max((0, 1, 2))

        return lax.map(step, batches)

    arguments = (jnp.asarray(batches), prepared, bias)
    compiled = compile_for_cpu(run, *arguments)
    times = []
    with jax.disable_jit(False):  # compiled code cannot be called with jit disabled
        for _ in range(RUNS + 1):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            times.append(time.perf_counter() - start)
    return median(times[1:]) / (steps * portion)
