"""Claim: a StableHLO file gives the net's logits wherever JAX runs, without this package."""

import dataclasses
import os
import subprocess
import sys
import venv
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export

import repvgg_jax as rv
from tests.helpers.comparison import relative_difference
from tests.helpers.random_weights import random_variables
from tests.helpers.repository import ROOT
from tests.helpers.weight_files import TINY

CLASSES = 5
PLUS = dataclasses.replace(TINY, groups=4, squeeze_excite="after_relu", squeeze_excite_ratio=4, auxiliary_heads=True)

ALONE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("repvgg_jax", "flax"):
            raise ImportError(f"{name} is not to be imported")

sys.meta_path.insert(0, Nothing())

import jax
import numpy as np

with open(sys.argv[1], "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
np.save(sys.argv[3], program.call(np.load(sys.argv[2])))
"""
"""A user's script: takes a program, a batch of images, and where to write the logits. Only jax and numpy."""

PACKAGES = ("jax", "flatbuffers")
"""jax.export reads files with flatbuffers, which jax does not declare as a dependency."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with the file and a batch of images, and the training form's logits for them."""
    folder = tmp_path_factory.mktemp("exported")
    model = rv.create_model(PLUS, CLASSES)
    variables = random_variables(model)
    images = np.random.default_rng(1).normal(size=(3, 48, 32, 3)).astype(np.float32)
    rv.export_stablehlo(folder / "net.stablehlo", model, variables, image_size=(48, 32))
    rv.export_stablehlo(folder / "nchw.stablehlo", model, variables, image_size=(48, 32), input_layout="NCHW")
    np.save(folder / "images.npy", images)
    return folder, images, np.asarray(jax.jit(model.apply)(variables, images))


def load(path: Path) -> export.Exported:
    return export.deserialize(bytearray(path.read_bytes()))


def run_alone(python: Path | str, folder: Path) -> np.ndarray:
    """Return the file's logits from a fresh process that cannot import this checkout."""
    command = [python, "-c", ALONE, "net.stablehlo", "images.npy", "logits.npy"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "logits.npy")


def test_a_process_that_cannot_import_the_package_gets_the_same_logits(exported):
    folder, _, expected = exported
    assert relative_difference(expected, run_alone(sys.executable, folder)) <= 1e-5


@pytest.mark.slow
def test_an_environment_with_only_jax_and_flatbuffers_gets_the_same_logits(exported, tmp_path):
    folder, _, expected = exported
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *PACKAGES]
    subprocess.run(install, check=True, timeout=500)
    assert relative_difference(expected, run_alone(python, folder)) <= 1e-5


def test_the_batch_size_is_dynamic_in_either_layout(exported):
    folder, images, expected = exported
    assert relative_difference(expected[:1], load(folder / "net.stablehlo").call(images[:1])) <= 1e-5
    assert relative_difference(expected, load(folder / "nchw.stablehlo").call(images.transpose(0, 3, 1, 2))) <= 1e-5


def test_the_file_is_for_every_platform_and_describes_its_input(exported):
    program = load(exported[0] / "net.stablehlo")
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert program.fun_name == "custom"
    assert [str(shape) for shape in (*program.in_avals, *program.out_avals)] == ["float32[N,48,32,3]", "float32[N,5]"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RepVGG-B3g4", "RepVGG-D2se", "RepVGGplus-L2pse"])
def test_large_nets_at_full_size_give_the_same_logits(name, tmp_path):
    model = rv.create_model(name)
    size = model.variant.image_size
    variables = random_variables(model)
    images = np.random.default_rng(1).normal(size=(1, size, size, 3)).astype(np.float32)
    rv.export_stablehlo(tmp_path / "net.stablehlo", model, variables)
    actual = load(tmp_path / "net.stablehlo").call(images)
    assert relative_difference(jax.jit(model.apply)(variables, images), actual) <= 1e-5
