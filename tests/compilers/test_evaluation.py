"""Claim: an evaluation step and an INT8 net compile for accelerators, and write no wide activations to memory."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.preprocess import Preprocessing
from tests.helpers.random_weights import random_variables
from train.compiled import entry_arrays, program_cost
from train.fitting import shapes_on
from train.parallel import AXIS, parallel
from train.step import make_eval_step
from train.targets import Target

SIZE, IMAGES = 224, 128


def evaluation_batch() -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of one chip's share of a batch."""
    return {
        "image": jax.ShapeDtypeStruct((IMAGES, SIZE, SIZE, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((IMAGES,), np.int32),
        "mask": jax.ShapeDtypeStruct((IMAGES,), np.float32),
    }


@pytest.mark.slow
@pytest.mark.parametrize("deploy", [False, True], ids=["training form", "deploy form"])
def test_an_evaluation_step_sums_over_all_chips_at_once(deploy: bool, target: Target, devices: list):
    model = rv.create_model("RepVGG-A0", deploy=deploy, dtype=jnp.bfloat16)
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    step: Any = parallel(make_eval_step(model, Preprocessing(SIZE), axis_name=AXIS), devices=devices)
    text = step.lower(*shapes_on(len(devices), (variables, evaluation_batch()))).compile().as_text()
    cost = program_cost(text, on_chip=target.family.platform == "tpu")
    assert cost.collectives == 1
    wide = [array for array in entry_arrays(text) if array.dtype == "f32" and len(array.shape) == 4]
    assert [array for array in wide if IMAGES in array.shape and np.prod(array.shape) > IMAGES * SIZE * SIZE] == []


@pytest.mark.slow
@pytest.mark.parametrize("integer", [False, True], ids=["in float32", "in integers"])
def test_an_int8_net_is_one_convolution_per_block(integer: bool, target: Target, devices: list):
    model = rv.create_model(rv.Variant((1, 1, 1, 1), (32, 32, 64, 64, 128)), 10)
    images = np.random.default_rng(0).normal(size=(16, 32, 32, 3)).astype(np.float32)
    net = rv.quantize(model, random_variables(model), images, "per-channel")
    place = jax.sharding.SingleDeviceSharding(devices[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), (net.variables, images)
    )
    compiled = jax.jit(lambda variables, x: net.apply(variables, x, integer=integer)).lower(*shapes).compile()
    text = compiled.as_text() or ""
    kind = r"custom_call_target=\"__cudnn\$conv" if target.family.platform == "cuda" else r" convolution\("
    assert len(re.findall(kind, text)) >= len(model.variant.blocks())
