"""Claim: a train step compiles well: all-reduces combined, its state updated in place, no wide activations written."""

import functools
import math

import jax
import pytest

from train.compiled import Array, entry_arrays, program_cost
from train.fitting import compiled_program, state_shapes, tree_bytes
from train.presets import parse
from train.run import Run, make_run, open_data
from train.targets import Target

IMAGES = {"RepVGG-A0": 128, "RepVGG-B1g4": 64, "RepVGG-D2se": 32, "RepVGGplus-L2pse": 32}
"""Images per chip."""

TRAFFIC_BEFORE = {"cuda": 18.0e9, "tpu": 20.4e9}
"""Bytes that one step of A0 moved when BN's statistics took two passes and every branch was computed separately."""

AIM = 0.8

BUCKET = {"cuda": 30 * 2**20, "tpu": 128 * 2**20}
"""Bytes up to which XLA combines all-reduces, so that those of the last layers start while others compute."""


@functools.cache
def step(name: str, target: Target, devices: tuple) -> tuple[Run, jax.stages.Compiled]:
    preset = "plus_300" if name.startswith("RepVGGplus") else "imagenet_120"
    batch = IMAGES[name] * len(devices)
    words = ["--preset", preset, "--model", name, "--dtype", "bfloat16", "--batch-size", str(batch)]
    recipe = parse(words)
    run = make_run(recipe, open_data(recipe, unopened=True))
    return run, compiled_program(run, devices, target.family.platform)


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_a_step_compiles_well(name: str, target: Target, devices: list):
    run, program = step(name, target, tuple(devices))
    text, sizes = program.as_text() or "", program.memory_analysis()
    cost = program_cost(text, on_chip=target.family.platform == "tpu")
    assert cost.collectives <= 1 + 2 * cost.collective_bytes / BUCKET[target.family.platform]
    assert sizes is not None
    assert sizes.alias_size_in_bytes >= tree_bytes(state_shapes(run))

    images, last_side = IMAGES[name], run.dataset.train_size // 32

    def is_wide_activation(array: Array) -> bool:
        """Return whether float32 activations are written to memory, except in the small last stage, where XLA may."""
        of_images = len(array.shape) == 4 and images in array.shape and array.shape.count(last_side) < 2
        on_chip = target.family.platform == "tpu" and array.space
        return of_images and not on_chip and array.dtype == "f32" and math.prod(array.shape) > images * 2**14

    assert [array for array in entry_arrays(text) if is_wide_activation(array)] == []


@pytest.mark.slow
def test_a_step_moves_a_fifth_less_data_than_before(target: Target, devices: list):
    _, program = step("RepVGG-A0", target, tuple(devices))
    if target.family.platform == "cuda":
        moved = program_cost(program.as_text() or "", on_chip=False).traffic
    else:  # as the compiler estimates it, including traffic to on-chip memory
        cost = program.cost_analysis()
        assert cost is not None
        moved = cost["bytes accessed"]
    assert moved <= AIM * TRAFFIC_BEFORE[target.family.platform]
