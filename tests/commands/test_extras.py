"""Claim: if an optional library is missing, a command says in one line which, and how to install it in a checkout."""

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest

import repvgg_jax as rv
from repvgg_jax.extras import CORE, EXTRAS, install_hint, missing_library
from tests.helpers.random_weights import random_variables
from tests.helpers.repository import ROOT

OUTSIDE = """
import runpy, sys

sys.path.insert(0, sys.argv[1])
del sys.argv[:2]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""

WITHOUT = """
import contextlib, importlib, io, json, sys

missing, commands = json.loads(sys.argv[1])


class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Without())
from repvgg_jax.cli import run_command

for module, *arguments in commands:
    sys.argv, out, err, status = [module, *arguments], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_command(lambda: importlib.import_module(module).main())
        except SystemExit as stop:
            status = stop.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""
"""Runs commands, one after the other, in a process where some modules cannot be imported."""


BROUGHT_ANYWAY = {"rich"}
"""Required by Flax."""


def without(missing: tuple[str, ...], *commands: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """Return status, stdout and stderr of each command, run where these modules are missing."""
    words = [sys.executable, "-c", WITHOUT, json.dumps([missing, commands])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture
def weights(tmp_path) -> str:
    model = rv.create_model(rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8), name="Small"), 2)
    rv.save_weights(tmp_path / "w.safetensors", model, random_variables(model))
    return str(tmp_path / "w.safetensors")


def test_commands_name_the_extra_that_they_need(weights, tmp_path):
    out = str(tmp_path / "net")
    expected = {
        ("train.main", "--preset", "digits"): "train",
        ("train.evaluate", "digits", "train", weights): "train",
        ("train.plot", str(tmp_path)): "train",
        ("examples.digits", str(tmp_path)): "train",
        ("examples.nnx_backbone",): "train",
        ("examples.segmentation",): "train",
        ("examples.use_in_your_code",): "train",
        ("repvgg_jax.__main__", "summary", "RepVGG-A0"): "",
        ("convert.__main__", weights, f"{out}.onnx"): "export",
        ("convert.__main__", weights, f"{out}.pth"): "torch",
        ("convert.__main__", "hf://timm/repvgg_a0.rvgg_in1k", f"{out}.safetensors"): "hub",
        ("convert.__main__", weights, f"{out}.safetensors", "--int8", "--calibration", "digits", "--method", "full"): (
            "train"
        ),
    }
    missing = tuple(module for modules in EXTRAS.values() for module in modules if module not in BROUGHT_ANYWAY)
    for (command, extra), (status, out, err) in zip(expected.items(), without(missing, *expected), strict=True):
        if not extra:
            assert (status, err) == (0, ""), "a command that needs no extra works"
            continue
        assert (status, out) == (2, ""), command
        assert err.count("\n") == 1, (command, err)
        assert err.startswith("error: "), (command, err)
        assert err.endswith(f": pip install -e '.[{extra}]' in your checkout of repvgg-jax\n"), (command, err)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_missing_library_is_named_by_the_command_that_needs_it(tmp_path):
    done = without(("matplotlib", "optax"), ("train.plot", str(tmp_path)), ("train.main", "--preset", "digits"))
    for (status, _, err), module in zip(done, ("matplotlib", "optax"), strict=True):
        assert status == 2
        assert err == f"error: this needs {module}, which is not installed: {install_hint('train')}\n"


def test_a_missing_tracker_is_named_before_anything_begins(tmp_path):
    run = ("train.main", "--preset", "digits", "--workdir", str(tmp_path / "run"), "--tracker", "wandb")
    (status, out, err), *_ = without(("wandb",), run)
    assert (status, out) == (2, "")
    assert err == f"error: --tracker wandb: this needs wandb, which is not installed: {install_hint('wandb')}\n"
    assert not (tmp_path / "run").exists()


def test_a_missing_module_outside_all_extras_is_a_bug_of_ours():
    assert (
        missing_library(ModuleNotFoundError("No module named 'repvgg_jax.nothing'", name="repvgg_jax.nothing")) is None
    )
    assert missing_library(ModuleNotFoundError("?")) is None


def test_outside_of_the_environment_every_command_says_so(tmp_path):
    commands = [
        ("repvgg_jax", "summary"),
        ("train.main", "--help"),
        ("train.evaluate",),
        ("convert", "a.pth", "b.onnx"),
    ]
    for module, *arguments in commands:
        # Without site-packages, Python finds nothing but itself and the checkout.
        command = [sys.executable, "-I", "-S", "-c", OUTSIDE, str(ROOT), module, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(
            r"error: this needs \w+, which \S+ does not have: activate the environment .*\n", done.stderr
        )


def test_a_missing_library_is_named_by_its_module():
    hint = missing_library(ModuleNotFoundError("?", name="sklearn.datasets"))
    assert (
        hint == "this needs sklearn, which is not installed: pip install -e '.[train]' in your checkout of repvgg-jax"
    )


def test_extras_install_the_modules_listed_for_them():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    distributions = {
        "cv2": "opencv-python-headless",
        "orbax": "orbax-checkpoint",
        "sklearn": "scikit-learn",
        "skimage": "scikit-image",
        "tensorflow_datasets": "tensorflow-datasets",
    }
    core = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert {re.match(r"\w+", name)[0] for name in core} == {*CORE} - {"jaxlib", "PIL"} | {"pillow"}  # pyright: ignore
    for extra, modules in EXTRAS.items():
        names = {re.match(r"[\w-]+", requirement)[0] for requirement in declared[extra]}  # pyright: ignore
        assert {distributions.get(module, module) for module in modules} <= names
        if extra != "dev":
            assert len(names) == len(modules), "an extra has a library whose module EXTRAS does not list"


def test_no_message_says_to_install_an_unpublished_release():
    for folder in ("repvgg_jax", "train", "convert", "examples", "docs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md"):
                assert "install 'repvgg-jax" not in path.read_text(encoding="utf-8"), path
