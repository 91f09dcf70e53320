"""Claim: `python -m convert` takes any weight file to any other, fused and verified, or says why not in one line."""

import contextlib
import dataclasses
import io
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import random_variables, relative_difference
from weights_helpers import TINY, assert_same_bits, random_model, torch_state

import repvgg_jax as rv
from convert.__main__ import main
from repvgg_jax.cli import run_command

ROOT = Path(__file__).parent.parent
IMAGES = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command left: its status and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def convert(*arguments: object) -> Done:
    """Run the command, in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", [""]):
        sys.argv += map(str, arguments)
        try:
            run_command(main)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


def error_of(done: Done) -> str:
    """Its one line on stderr, once it is sure that it failed as a user's mistake should."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture
def trained(tmp_path):
    """The authors' training-form file of RepVGG-A0 with weights at which equivalence means something."""
    model = rv.create_model("RepVGG-A0", num_classes=5)
    variables = random_variables(model)
    rv.save_weights(tmp_path / "train.pth", model, variables, num_batches_tracked=9)
    return tmp_path / "train.pth", model, variables


@pytest.mark.parametrize(
    ("output", "options", "family"),
    [
        ("deploy.safetensors", (), "native"),
        ("deploy.pth", (), "authors"),
        ("deploy.safetensors", ("--to", "timm"), "timm"),
        ("deploy.pt", ("--to", "mmpretrain"), "mmpretrain"),
    ],
)
def test_training_form_in_deploy_form_out(output, options, family, trained, tmp_path):
    path, model, variables = trained
    done = convert(path, tmp_path / output, "-a", "RepVGG-A0", *options)
    assert done.returncode == 0, done.stderr
    assert "fused, relative difference" in done.stdout
    assert rv.inspect_weights(tmp_path / output).family == family
    deployed, fused = rv.load_weights(tmp_path / output)
    assert deployed.deploy
    assert relative_difference(model.apply(variables, IMAGES), deployed.apply(fused, IMAGES)) <= 1e-5


def test_training_form_can_be_kept_and_nothing_is_lost_on_the_way(trained, tmp_path):
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


def test_it_runs_as_a_command(trained):
    command = [sys.executable, "-m", "convert", "--inspect", str(trained[0])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "RepVGG-A0" in done.stdout


def test_inspect_says_what_a_file_is(trained):
    done = convert("--inspect", trained[0])
    for words in ("RepVGG-A0", "training form", "authors", "5 classes", "float32", "7,834,373 parameters"):
        assert words in done.stdout


def test_a_fused_net_that_differs_is_not_written(tmp_path):
    model, variables = random_model("RepVGG-A0")
    for block in variables["batch_stats"].values():
        block["rbr_dense"]["bn"]["mean"] = block["rbr_dense"]["bn"]["mean"] * np.float32(3e6)
        block["rbr_1x1"]["bn"]["mean"] = -block["rbr_dense"]["bn"]["mean"]
    rv.save_weights(tmp_path / "bad.pth", model, variables)
    message = error_of(convert(tmp_path / "bad.pth", tmp_path / "out.pth"))
    assert "the fused net differs from the training form" in message
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


def test_a_fresh_head_and_other_remarks_go_to_stderr(tmp_path):
    torch.save({"model": torch_state(TINY)}, tmp_path / "w.pth")
    done = convert(tmp_path / "w.pth", tmp_path / "out.safetensors", "--num-classes", "3", "--keep-training-form")
    assert done.returncode == 0
    assert "the classifier is a fresh one" in done.stderr
    assert "no published variant" in done.stderr
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())
    assert rv.inspect_weights(tmp_path / "out.safetensors").num_classes == 3


def test_deploy_form_passes_through(trained, tmp_path):
    path, *_ = trained
    assert convert(path, tmp_path / "deploy.pth").returncode == 0
    done = convert(tmp_path / "deploy.pth", tmp_path / "deploy.safetensors")
    assert "deploy form, as it was" in done.stdout
    assert_same_bits(*(rv.load_weights(tmp_path / name)[1] for name in ("deploy.pth", "deploy.safetensors")))


def test_mistakes_are_one_line_and_leave_nothing_behind(trained, tmp_path):
    path, *_ = trained
    (tmp_path / "short.pth").write_bytes(path.read_bytes()[:1000])
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out.pth"
    for arguments, words in (
        ((), "expected IN and OUT, or --inspect FILE"),
        ((path,), "expected IN and OUT"),
        ((path, out, "-a", "RepVGG-B0"), "holds RepVGG-A0, not RepVGG-B0"),
        ((path, out, "-a", "RepVGG-Q7"), "unknown model"),
        ((path, out, "--ema"), "no moving average"),
        ((path, out, "--num-classes", "0"), "num_classes must be at least 1"),
        ((tmp_path / "none.pth", out), "does not exist"),
        ((tmp_path / "short.pth", out), "cannot read"),
        (("--inspect", tmp_path / "short.pth"), "cannot read"),
        ((path, tmp_path / "out.onnx"), "unknown suffix"),
        ((path, tmp_path / "none" / "out.pth"), "there is no folder"),
        ((path, out, "--to", "native"), "native weights are .safetensors files"),
    ):
        assert words in error_of(convert(*arguments))
    assert sorted(tmp_path.iterdir()) == before
