"""Choosing the plan of a net: XLA's, the cost model's, or one that was measured on this machine."""

import jax
import jax.numpy as jnp

from ..net.model import RepVGG
from . import plan_cache
from .plan import Plan, default_plan, xla_plan


def choose_plan(model: RepVGG, batch_size: int, image_size: tuple[int, int], channels: int, *, tune: bool) -> Plan:
    """XLA's convolutions on accelerators and in 16 bits; else the cost model's plan, or the measured one."""
    platform, name = jax.default_backend(), jnp.dtype(model.dtype).name
    if platform != "cpu" or name not in ("float32", "float64"):
        source = f"platform ({platform}, {name})"
        return xla_plan(model.variant, batch_size, image_size, channels, source)
    plan = default_plan(model.variant, batch_size, image_size, channels, dtype=name)
    if not tune or name != "float32":
        return plan
    cached = plan_cache.load_plan(plan, name)
    if cached is not None:
        return cached
    from .tuning import measured_plan

    with jax.disable_jit(False):  # what is measured is compiled code
        plan = measured_plan(plan)
    plan_cache.save_plan(plan, name)
    return plan
