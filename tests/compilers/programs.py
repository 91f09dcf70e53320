"""Programs to compile and lower: a deploy net as in a predictor, on shapes alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import repvgg_jax as rv
from repvgg_jax.inference.plan import xla_plan
from repvgg_jax.inference.planned_net import planned_forward, prepare_params


def deploy_net(name: str, batch: int, size: int) -> tuple[rv.RepVGG, Callable[..., Any], Any, Any]:
    """Return a bfloat16 deploy net's model, its forward pass, and the shapes of its prepared parameters and images."""
    model = rv.create_model(name, deploy=True, dtype=jnp.bfloat16)
    plan = xla_plan(model.variant, batch, (size, size), 3, "an accelerator")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    params = jax.eval_shape(lambda params: prepare_params(params, plan, model.dtype), variables["params"])
    return model, planned_forward(model, plan), params, images
