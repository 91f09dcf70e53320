"""Claim: a variant's name is accepted like a weight file and means its ImageNet weights; a file of that name wins."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.net.variants import VARIANTS
from repvgg_jax.trees import flatten
from repvgg_jax.weights.argument import weights_path
from tests.helpers.commands import command, convert, error_of
from tests.helpers.photos import write_photos
from tests.helpers.random_weights import random_variables
from tests.helpers.weight_files import assert_same_bits

NAME = "RepVGG-A0"


@pytest.fixture
def published(fake_hub, tmp_path, monkeypatch) -> Path:
    """A small net of two classes in place of RepVGG-A0, on the hub and in the returned file."""
    small = rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8), name=NAME, image_size=32)
    monkeypatch.setitem(VARIANTS, NAME, small)
    monkeypatch.chdir(tmp_path)
    model = rv.create_model(NAME, 2)
    path = tmp_path / "theirs.safetensors"
    rv.save_weights(path, model, random_variables(model), family="timm")
    fake_hub.add("timm/repvgg_a0.rvgg_in1k", {"model.safetensors": path.read_bytes()})
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of photographs in two classes."""
    write_photos(tmp_path / "photos" / "train", 8)
    write_photos(tmp_path / "photos" / "val", 6, offset=20)
    return tmp_path / "photos"


def output(module: str, *arguments: object) -> str:
    """Return the stdout of a command that succeeds."""
    done = command(module, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_predict_takes_a_name(published, photos):
    answers = [output("repvgg_jax.__main__", "predict", weights, photos / "val") for weights in (NAME, published)]
    assert answers[0] == answers[1]
    assert answers[0].count("\n") == 6


def test_evaluate_takes_a_name(published, photos):
    answers = [output("train.evaluate", photos, "deploy", weights, "-a", NAME) for weights in (NAME, published)]
    assert answers[0] == answers[1]
    assert json.loads(answers[0])["images"] == 6


def test_convert_and_inspect_take_a_name(published, tmp_path):
    for name, weights in (("by_name", "repvgg-a0"), ("by_file", published)):
        done = convert(weights, tmp_path / f"{name}.safetensors")
        assert done.returncode == 0, done.stderr
    loaded = [rv.load_weights(tmp_path / f"{name}.safetensors") for name in ("by_name", "by_file")]
    assert loaded[0][0] == loaded[1][0] == rv.create_model(NAME, 2, deploy=True)
    assert_same_bits(loaded[0][1], loaded[1][1])
    assert output("convert.__main__", "--inspect", NAME).startswith("hf://RepVGG-A0: RepVGG-A0, training form, timm")


@pytest.mark.slow
def test_training_starts_from_a_name(published, photos, tmp_path):
    sizes = ("--image-size", 32, "--test-image-size", 32, "--batch-size", 4, "--epochs", 1, "--warmup-epochs", 0)
    run = ("--preset", "digits", "--model", NAME, "--data", photos, *sizes, "--learning-rate", 0)
    output("train.main", *run, "--init", NAME, "--workdir", tmp_path / "run")
    start = flatten(rv.load_weights(published)[1])
    end = flatten(rv.load_weights(tmp_path / "run" / "final.safetensors")[1])
    for name, leaf in start.items():
        if name.startswith("params/"):
            np.testing.assert_array_equal(leaf, end[name], err_msg=name)


def test_a_file_of_that_name_wins(published, fake_hub, tmp_path):
    model = rv.create_model(dataclasses.replace(VARIANTS[NAME], name="Mine"), 3)
    rv.save_weights(tmp_path / "mine.safetensors", model, random_variables(model, seed=1))
    (tmp_path / "mine.safetensors").rename(tmp_path / NAME)
    assert output("convert.__main__", "--inspect", NAME).startswith("RepVGG-A0: Mine")
    assert not fake_hub.requests


def test_what_is_neither_a_file_nor_a_variant_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = error_of(command("repvgg_jax.__main__", "predict", "RepVGG-A9", "cat.jpg"))
    assert error.startswith(
        "error: there is no file RepVGG-A9 and no variant of that name; the variants are RepVGG-A0, RepVGG-A1, "
    )
    error = error_of(convert("RepVGG-B1g2", "out.safetensors"))
    assert error.startswith("error: timm has no weights of RepVGG-B1g2 on the Hugging Face hub")
    error = error_of(command("train.main", "--preset", "digits", "--init", "repvggplus-l2pse", "--workdir", "run"))
    assert error.startswith("error: timm has no weights of RepVGGplus-L2pse on the Hugging Face hub")
    for path in ("RepVGG-A0.pth", "runs/RepVGG-A0", "gs://bucket/RepVGG-A0", "hf://timm/repvgg_a0.rvgg_in1k"):
        assert weights_path("WEIGHTS", path) == path
    assert not list(tmp_path.iterdir())
