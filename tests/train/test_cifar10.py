"""Claim: the preset `cifar10` trains on 32-pixel photographs with the usual preprocessing, and learns."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import repvgg_jax as rv
from repvgg_jax.preprocess import Preprocessing
from tests.helpers.commands import command
from tests.helpers.photos import write_photos
from tests.helpers.repository import ROOT, shared_data
from train import data
from train.presets import PRESETS, parse
from train.run import open_data

USUAL = Preprocessing(32, 1.0, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
"""Mean and deviation of the 50,000 training images, as in most recipes for CIFAR-10."""

TINY = ("--num-blocks", 1, 1, 1, 1, "--widths", 8, 8, 8, 8, 8)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos" / "train", 8)
    write_photos(tmp_path / "photos" / "val", 6, offset=20)
    return tmp_path / "photos"


def test_a_folder_is_preprocessed_like_the_data_set(photos: Path) -> None:
    recipe = parse(["--preset", "cifar10", "--data", str(photos)])
    folder = open_data(recipe)
    assert folder.preprocessing == USUAL
    assert (folder.train_size, folder.train_transform) == (32, "pad_and_crop_flip")
    by_name = data.open_dataset("cifar10", unopened=True)
    assert by_name.preprocessing == USUAL
    assert (by_name.train_size, by_name.train_transform) == (32, "pad_and_crop_flip")
    assert recipe.model.variant.strides == (1, 2, 2, 2, 1)


def test_every_preprocessing_value_has_an_option(photos: Path) -> None:
    """CIFAR-100, Tiny-ImageNet, SVHN or custom images need no code."""
    words = "--image-size 64 --test-image-size 56 --crop-fraction 0.9 --train-transform as_is --mean 0.1 0.2 0.3"
    recipe = parse(["--preset", "cifar10", "--data", str(photos), *words.split(), "--std", "0.5", "0.6", "0.7"])
    dataset = open_data(recipe)
    assert dataset.preprocessing == Preprocessing(56, 0.9, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert (dataset.train_size, dataset.train_transform) == (64, "as_is")


def test_the_preprocessing_is_stored_in_and_read_from_the_weight_files(photos: Path, tmp_path: Path) -> None:
    words = ("--preset", "cifar10", "--data", photos, *TINY, "--batch-size", 4, "--epochs", 2, "--warmup-epochs", 1)
    trained = command("train.main", *words, "--mean", 0.1, 0.2, 0.3, "--workdir", tmp_path / "run")
    assert trained.returncode == 0, trained.stderr
    assert "top-5" not in trained.stdout, "there are only two classes"
    weights = tmp_path / "run" / "deploy.safetensors"
    info = rv.inspect_weights(weights)
    assert info.preprocessing == Preprocessing(32, 1.0, (0.1, 0.2, 0.3), USUAL.std)
    assert info.class_names == ("garden", "pagoda")
    evaluated = command("train.evaluate", photos, "deploy", weights)
    assert evaluated.returncode == 0, evaluated.stderr
    summary = json.loads(trained.stdout.splitlines()[-1])
    assert json.loads(evaluated.stdout.splitlines()[-1])["top1"] == summary["test_top1_deploy_form"]
    predicted = command("repvgg_jax.__main__", "predict", weights, photos / "val", "--format", "json").stdout
    assert {guess["name"] for line in predicted.splitlines() for guess in json.loads(line)["predictions"]} == {
        "garden",
        "pagoda",
    }


def test_another_model_has_its_own_depth_and_widths() -> None:
    preset, other = parse(["--preset", "cifar10"]), parse(["--preset", "cifar10", "--model", "RepVGG-A1"])
    assert preset.model.variant.widths == PRESETS["cifar10"].model.widths
    assert preset.run.workdir == "runs/cifar10"
    assert other.model.variant.widths == rv.create_model("RepVGG-A1").variant.widths
    assert other.model.variant.strides == (1, 2, 2, 2, 1)
    assert other.run.workdir == "runs/cifar10-RepVGG-A1"
    assert (preset.fine_tune.whiten_stem, other.fine_tune.whiten_stem) == (True, False)
    assert parse(["--preset", "cifar10", *map(str, TINY)]).run.workdir == "runs/cifar10-custom"


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory) -> Path:
    """The first images of each class of the real CIFAR-10: 200 for training, 100 for testing."""
    root = tmp_path_factory.mktemp("cifar10")
    counts = {"train": 200, "val": 100}
    with tarfile.open(shared_data("cifar10.tar.xz")) as archive:
        for member in archive:
            split, *rest = member.name.split("/")
            if member.isfile() and int(Path(rest[-1]).stem) < counts[split]:
                archive.extract(member, root, filter="data")
    return root


def test_a_minute_of_training_learns_real_photographs(cifar10: Path, tmp_path: Path) -> None:
    """2000 photographs are enough for the preset to be right four times as often as chance (48 % with two seeds)."""
    words = ["--preset", "cifar10", "--data", str(cifar10), "--batch-size", "64", "--epochs", "5"]
    words += ["--evaluate-every", "5", "--workdir", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "train.main", *words], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["test_top1_deploy_form"] >= 0.42
    assert "predict the same class for 1000 of 1000 test images" in done.stdout
    assert rv.inspect_weights(tmp_path / "run" / "deploy.safetensors").class_names == CLASSES
