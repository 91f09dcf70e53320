"""Claim: every command answers a path too long for any file system with one line, not a traceback."""

import pytest

import repvgg_jax as rv
from tests.helpers.commands import command
from tests.helpers.random_weights import random_variables

LONG = "x" * 300


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    model = rv.create_model(rv.Variant((1, 1, 1, 1), (4, 4, 4, 4, 4)), 10, deploy=True)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    rv.save_weights(path, model, random_variables(model))
    return path


@pytest.mark.parametrize(
    "words",
    [
        ("repvgg_jax.__main__", "summary", LONG),
        ("repvgg_jax.__main__", "predict", "WEIGHTS", LONG),
        ("repvgg_jax.__main__", "predict", LONG, "a.jpg"),
        ("convert.__main__", "WEIGHTS", f"{LONG}.onnx"),
        ("convert.__main__", "WEIGHTS", "OUT", "--int8", "--calibration", LONG),
        ("train.evaluate", LONG, "deploy", "WEIGHTS"),
        ("train.evaluate", "digits", "deploy", LONG),
        ("train.evaluate", "digits", "deploy", "WEIGHTS", "--report", LONG),
        ("train.main", "--preset", "digits", "--workdir", LONG),
        ("train.main", "--preset", "digits", "--init", LONG),
        ("train.plot", LONG),
        ("train.plot", LONG, "--out", f"{LONG}.png"),
    ],
    ids=lambda words: "-".join(word[:12] for word in words),
)
def test_a_path_that_is_too_long_is_one_line(words, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"WEIGHTS": weights, "OUT": tmp_path / "out.safetensors"}
    done = command(*(places.get(word, word) for word in words))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert LONG in done.stderr
    assert not list(tmp_path.iterdir())
