"""Algorithm and time of each layer, estimated by the cost model or measured."""

import time
from statistics import median

import jax
import numpy as np

from ..conv.algorithm import ALGORITHMS
from ..conv.cost import LayerShape
from ..inference.plan import Plan
from ..inference.plan_cache import device_name
from ..inference.predictor import Predictor
from ..inference.tuning import measure_layer
from ..machine import cores, cpu_model
from .facts import LayerTime, PlanFacts

RUNS = 5


def plan_facts(predictor: Predictor, images: np.ndarray, *, measure: bool) -> PlanFacts:
    """Return the facts about a predictor's plan and times.

    Args:
      predictor: predictor of a float or INT8 net.
      images: input of the predictor, `[N, H, W, C]`.
      measure: measure the time of the net, and that of each layer if there is a plan for a CPU, instead of using the
        cost model.
    """
    plan, on_cpu = predictor.plan, jax.default_backend() == "cpu"
    times_from = None
    if plan is not None and on_cpu:
        times_from = "measurement" if measure else "cost model"
    return PlanFacts(
        batch_size=predictor.batch_size,
        source=None if plan is None else plan.source,
        times_from=times_from,
        layers=() if plan is None else _layer_times(plan, times_from),
        device=f"{cpu_model().rpartition(' ')[0]}, {cores()} cores" if on_cpu else device_name(),
        net_seconds=_net_seconds(predictor, images) if measure else None,
    )


def _layer_times(plan: Plan, times_from: str | None) -> tuple[LayerTime, ...]:
    measured: dict[tuple[LayerShape, str, int], float] = {}

    def seconds(shape: LayerShape, algorithm: str, portion: int) -> float | None:
        if times_from is None:
            return None
        if times_from == "cost model":
            return ALGORITHMS[algorithm].seconds(shape, portion)
        key = (shape, algorithm, portion)
        if key not in measured:
            with jax.disable_jit(False):  # measure compiled code
                measured[key] = measure_layer(shape, algorithm, portion, plan.outer)
        return measured[key]

    return tuple(
        LayerTime(
            name=layer.name,
            algorithm=layer.algorithm,
            multiplications=layer.shape.multiplications(ALGORITHMS[layer.algorithm].tile),
            seconds=seconds(layer.shape, layer.algorithm, stage.portion),
        )
        for stage in plan.stages
        for layer in stage.layers
    )


def _net_seconds(predictor: Predictor, images: np.ndarray) -> float:
    """Return the median time per image, with batches of the predictor's size."""
    batch = np.resize(images, (predictor.batch_size, *images.shape[1:]))
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        predictor(batch)
        times.append(time.perf_counter() - start)
    return median(times[1:]) / len(batch)
