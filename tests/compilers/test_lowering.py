"""Claim: everything that runs on a device can be lowered for GPUs and TPUs, which needs neither them nor a compiler."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import repvgg_jax as rv
from tests.compilers.programs import deploy_net
from tests.helpers.random_weights import random_variables
from train.fitting import shapes_on, state_shapes
from train.loop import make_step
from train.presets import parse
from train.run import batch_shapes, make_run, open_data
from train.step import make_eval_step

ACCELERATORS = ("cuda", "tpu")
SIZE = 64
SHALLOW = ("--num-blocks", "1", "2", "2", "1")
"""The fewest blocks that include every kind."""


def lowered_text(function: Callable[..., Any], *arguments: Any) -> str:
    exported = jax.export.export(jax.jit(function), platforms=ACCELERATORS)(*arguments)
    assert exported.platforms == ACCELERATORS
    return exported.mlir_module()


@pytest.mark.parametrize("name", ["RepVGG-A0", "RepVGG-B1g4", "RepVGG-D2se", "RepVGGplus-L2pse"])
def test_a_deploy_net_is_one_convolution_per_block(name: str):
    model, forward, params, images = deploy_net(name, 2, SIZE)
    text = lowered_text(forward, params, images)
    assert text.count("= stablehlo.convolution(") >= len(model.variant.blocks())
    assert "stablehlo.custom_call @repvgg" not in text


@pytest.mark.parametrize("depth", [SHALLOW, pytest.param((), marks=pytest.mark.slow)], ids=["shallow", "whole"])
@pytest.mark.parametrize("name", ["RepVGG-A0", "RepVGG-B1g4", "RepVGG-D2se", "RepVGGplus-L2pse"])
def test_train_and_evaluation_steps_can_be_lowered(name: str, depth: tuple[str, ...]):
    preset = "plus_300" if name.startswith("RepVGGplus") else "imagenet_120"
    words = ["--preset", preset, "--model", name, *depth, "--dtype", "bfloat16", "--image-size", str(SIZE)]
    recipe = parse([*words, "--mixup", "0.2", "--ema-decay", "0.99"])
    run = make_run(recipe, open_data(recipe, unopened=True))
    state, batch = state_shapes(run), batch_shapes(run, 2)
    step = make_step(run)
    on_one = shapes_on(1, (state, batch))
    text = lowered_text(lambda state, batch: jax.vmap(step, axis_name="batch")(state, batch), *on_one)
    assert "stablehlo.convolution" in text
    evaluate = make_eval_step(run.model, run.dataset.preprocessing)
    mask = {"mask": jax.ShapeDtypeStruct((2,), np.float32)}
    lowered_text(evaluate, state.variables, batch | mask)


@pytest.mark.parametrize("integer", [False, True])
def test_an_int8_net_can_be_lowered(integer: bool):
    model = rv.create_model(rv.Variant((1, 1, 1, 1), (8, 8, 8, 8, 8)), 5)
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)
    net = rv.quantize(model, random_variables(model), images, "per-channel")
    text = lowered_text(lambda variables, x: net.apply(variables, x, integer=integer), net.variables, images)
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    # XLA's GPU compiler refuses convolutions from int8 to int32, so only those for the TPU are lowered to integer ones.
    assert {"xi32>" in line for line in convolutions} == ({True, False} if integer else {False})
