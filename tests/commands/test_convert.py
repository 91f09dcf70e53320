"""Claim: `python -m convert` turns any weight file into any other, fused and verified, or says in one line why not."""

import dataclasses
import resource
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
import torch

import repvgg_jax as rv
from convert import compare
from tests.helpers.commands import convert, error_of
from tests.helpers.comparison import relative_difference
from tests.helpers.random_weights import random_variables
from tests.helpers.repository import ROOT
from tests.helpers.weight_files import TINY, assert_same_bits, random_model, torch_state

pytestmark = pytest.mark.filterwarnings("ignore:.*is not a published variant:repvgg_jax.weights.WeightsWarning")

SMALL = dataclasses.replace(TINY, num_blocks=(2, 1, 1, 1))
TO = {"timm.safetensors": ("--to", "timm")}
IMAGES = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)


@pytest.fixture
def trained(tmp_path):
    """The authors' training-form file of a small net with random weights, so that equivalence means something."""
    model = rv.create_model(SMALL, num_classes=5)
    variables = random_variables(model)
    rv.save_weights(tmp_path / "train.pth", model, variables, num_batches_tracked=9)
    return tmp_path / "train.pth", model, variables


@pytest.fixture
def untrained(tmp_path):
    """A published variant's file, for tests where the values do not matter."""
    rv.save_weights(tmp_path / "untrained.pth", *random_model("RepVGG-A0"))
    return tmp_path / "untrained.pth"


@pytest.mark.parametrize(
    ("output", "options", "family"),
    [
        ("deploy.safetensors", (), "native"),
        ("deploy.pth", (), "authors"),
        ("deploy.safetensors", ("--to", "timm"), "timm"),
        ("deploy.pt", ("--to", "mmpretrain"), "mmpretrain"),
    ],
)
def test_the_training_form_is_converted_to_the_deploy_form(output, options, family, trained, tmp_path):
    path, model, variables = trained
    done = convert(path, tmp_path / output, *options)
    assert done.returncode == 0, done.stderr
    assert "fused, relative difference" in done.stdout
    assert rv.inspect_weights(tmp_path / output).family == family
    deployed, fused = rv.load_weights(tmp_path / output)
    assert deployed.deploy
    expected, actual = jax.jit(model.apply)(variables, IMAGES), jax.jit(deployed.apply)(fused, IMAGES)
    assert relative_difference(expected, actual) <= 1e-5


@pytest.mark.slow
def test_it_runs_as_a_command(tmp_path):
    model = rv.create_model("RepVGG-A0", num_classes=5)
    variables = random_variables(model)
    rv.save_weights(tmp_path / "train.pth", model, variables)
    command = [sys.executable, "-m", "convert", tmp_path / "train.pth", tmp_path / "deploy.pth", "-a", "RepVGG-A0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith(f"{tmp_path / 'deploy.pth'}: RepVGG-A0, 5 classes, fused, relative difference")
    deployed, fused = rv.load_weights(tmp_path / "deploy.pth", "RepVGG-A0")
    expected, actual = jax.jit(model.apply)(variables, IMAGES), jax.jit(deployed.apply)(fused, IMAGES)
    assert relative_difference(expected, actual) <= 1e-5


def test_the_training_form_can_be_kept_without_any_loss(trained, tmp_path):
    path, _, variables = trained
    for source, target, to in (
        (path, tmp_path / "a.safetensors", "native"),
        (tmp_path / "a.safetensors", tmp_path / "b.safetensors", "timm"),
        (tmp_path / "b.safetensors", tmp_path / "c.pth", "authors"),
    ):
        done = convert(source, target, "--keep-training-form", "--to", to)
        assert "training form kept" in done.stdout, done.stderr
    assert_same_bits(variables, rv.load_weights(tmp_path / "c.pth")[1])
    again, original = (torch.load(file, weights_only=True) for file in (tmp_path / "c.pth", path))
    assert list(again) == list(original)
    assert all(torch.equal(again[key], original[key]) for key in original)


def test_inspect_describes_a_file(untrained, trained):
    done = convert("--inspect", untrained)
    for words in ("RepVGG-A0,", "training form", "authors", "5 classes", "float32", "7,834,373 parameters"):
        assert words in done.stdout
    done = convert("--inspect", trained[0])
    assert "custom (blocks (2, 1, 1, 1), widths (8, 8, 12, 16, 20), groups 1)" in done.stdout


def test_a_fused_net_that_differs_is_not_written(tmp_path):
    # Two branches subtract and add a million: it cancels in the fused bias; unfused, it costs the others their digits.
    model, variables = random_model(SMALL)
    for name, stats in variables["batch_stats"].items():
        params = variables["params"][name]
        params["rbr_1x1"]["bn"] = params["rbr_dense"]["bn"]
        stats["rbr_dense"]["bn"]["mean"] = stats["rbr_dense"]["bn"]["mean"] + np.float32(1e6)
        stats["rbr_1x1"]["bn"] = {"mean": -stats["rbr_dense"]["bn"]["mean"], "var": stats["rbr_dense"]["bn"]["var"]}
    rv.save_weights(tmp_path / "bad.pth", model, variables)
    done = convert(tmp_path / "bad.pth", tmp_path / "out.pth")
    note, error = done.stderr.splitlines()
    assert note.startswith("warning: ")
    assert "is not a published variant" in note
    assert (done.returncode, done.stdout) == (2, "")
    assert error.startswith("error: the fused net differs from the training form")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


def test_warnings_such_as_a_new_classifier_go_to_stderr(tmp_path):
    torch.save({"model": torch_state(TINY)}, tmp_path / "w.pth")
    done = convert(tmp_path / "w.pth", tmp_path / "out.safetensors", "--num-classes", "3", "--keep-training-form")
    assert done.returncode == 0
    assert "the classifier is newly initialised" in done.stderr
    assert "not a published variant" in done.stderr
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())
    assert rv.inspect_weights(tmp_path / "out.safetensors").num_classes == 3


def test_the_deploy_form_passes_through_unchanged(trained, tmp_path):
    assert convert(trained[0], tmp_path / "deploy.pth").returncode == 0
    done = convert(tmp_path / "deploy.pth", tmp_path / "deploy.safetensors")
    assert "already in deploy form" in done.stdout
    assert_same_bits(*(rv.load_weights(tmp_path / name)[1] for name in ("deploy.pth", "deploy.safetensors")))


def test_a_mistake_is_one_line_and_leaves_no_files(untrained, tmp_path):
    path = untrained
    (tmp_path / "short.pth").write_bytes(path.read_bytes()[:1000])
    rv.save_weights(tmp_path / "deploy.safetensors", *random_model(TINY, deploy=True))
    plus = dataclasses.replace(TINY, squeeze_excite="after_relu", auxiliary_heads=True)
    rv.save_weights(tmp_path / "plus.safetensors", *random_model(plus))
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out.pth"
    for arguments, words in (
        ((), "expected IN and OUT, or --inspect FILE"),
        ((path,), "expected IN and OUT"),
        (("--inspect", path, out), "remove IN and OUT"),
        ((path, out, "-a", "RepVGG-B0"), "holds RepVGG-A0, not RepVGG-B0"),
        ((path, out, "-a", "RepVGG-Q7"), "unknown model"),
        ((path, out, "--ema"), "no moving average"),
        ((path, out, "--num-classes", "0"), "num_classes must be at least 1"),
        ((tmp_path / "none.pth", out), "does not exist"),
        ((tmp_path / "short.pth", out), "cannot read"),
        (("--inspect", tmp_path / "short.pth"), "cannot read"),
        ((tmp_path / "deploy.safetensors", out, "--keep-training-form"), "is in deploy form"),
    ):
        assert words in error_of(convert(*arguments))
    # Problems with the output are reported before anything is computed.
    with mock.patch("repvgg_jax.load_weights", side_effect=AssertionError):
        for arguments, words in (
            ((path, tmp_path / "out.weights"), "unknown suffix"),
            ((path, tmp_path / "none" / "out.pth"), "there is no folder"),
            ((path, tmp_path / "short.pth" / "out.pth"), "Not a directory"),
            ((path, tmp_path / ("n" * 300 + ".pth")), "File name too long"),
            ((path, tmp_path / "n\0n.pth"), "null byte"),
            ((path, out, "--to", "native"), "native weights are .safetensors files"),
            ((tmp_path / "plus.safetensors", out, "--to", "timm"), "timm files have no name for the"),
        ):
            assert words in error_of(convert(*arguments))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("output", ["out.pth", "native.safetensors", "timm.safetensors"])
def test_a_full_disk_is_one_line_and_keeps_the_existing_file(output, untrained, tmp_path):
    (tmp_path / output).write_text("before", encoding="utf-8")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        done = convert(untrained, tmp_path / output, "--overwrite", "--keep-training-form", *TO.get(output, ()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "too large" in error_of(done)
    assert (tmp_path / output).read_text(encoding="utf-8") == "before"
    assert len(list(tmp_path.iterdir())) == 2


def test_norms_that_float32_cannot_hold_are_compared(trained, tmp_path):
    """Logits of 1e25: their squares are infinite in float32, and a difference was once printed as 0."""
    _, model, variables = trained
    for factor in (1e25, 1e-30):
        large = jax.tree.map(lambda leaf: leaf, variables)
        large["params"]["linear"] = jax.tree.map(
            lambda leaf, f=factor: leaf * np.float32(f), variables["params"]["linear"]
        )
        rv.save_weights(tmp_path / "large.safetensors", model, large)
        done = convert(tmp_path / "large.safetensors", tmp_path / "out.safetensors", "--overwrite")
        assert done.returncode == 0, done.stderr
        difference = float(done.stdout.split("relative difference ")[1].split()[0])
        assert 1e-9 < difference < 1e-4


def test_logits_that_are_not_finite_are_reported(trained, tmp_path):
    _, model, variables = trained
    kernel = variables["params"]["linear"]["kernel"]
    variables["params"]["linear"]["kernel"] = np.full_like(kernel, 3e38)
    rv.save_weights(tmp_path / "huge.safetensors", model, variables)
    message = error_of(convert(tmp_path / "huge.safetensors", tmp_path / "out.safetensors"))
    assert "the training form's logits on a random batch are NaN or infinite" in message
    assert not (tmp_path / "out.safetensors").exists()


def test_relative_differences_are_computed_in_float64():
    expected = np.array([3e38, -2e38], np.float32)
    actual = expected * np.float32(1.001)
    assert compare.relative_difference(expected, actual) == pytest.approx(1e-3, rel=1e-3)
    assert np.isnan(compare.relative_difference(expected, np.array([np.inf, 0], np.float32)))
    assert compare.relative_difference(np.zeros(3), np.zeros(3)) == 0
    assert compare.relative_difference(np.zeros(3), np.ones(3)) > 1
