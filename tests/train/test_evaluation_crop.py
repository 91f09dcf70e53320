"""Claim: a net is evaluated at its own published size and crop unless told otherwise, and its files record which."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import repvgg_jax as rv
from repvgg_jax.preprocess import Preprocessing
from tests.helpers.architecture import write_variant
from tests.helpers.batches import evaluation, flat
from tests.helpers.commands import command
from tests.helpers.photos import PHOTO, encode, write_photos
from tests.helpers.random_weights import random_variables
from tests.helpers.torchvision_reference import torchvision
from train import data
from train.config_file import save_or_compare
from train.presets import PRESETS, parse
from train.recipe import Recipe
from train.run import set_up

# Published for 48 pixels without cropping, as D2se is for 320.
WHOLE = rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8), name="Whole", image_size=48, crop_fraction=1.0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos" / "train", 8)
    write_photos(tmp_path / "photos" / "val", 6, offset=20)
    return tmp_path / "photos"


def preprocessing_of(photos: Path, *options: object) -> Preprocessing:
    """Return the preprocessing that a run with these options evaluates with and stores in its files."""
    words = ["--data", photos, "--workdir", photos.parent / "run", "--batch-size", 4, *options]
    return set_up(parse([str(word) for word in words])).dataset.preprocessing


@pytest.mark.parametrize("name", ["RepVGG-A0", "RepVGG-B3g4", "RepVGG-D2se", "RepVGGplus-L2pse"])
def test_training_evaluates_at_the_variants_published_size_and_crop(photos: Path, name: str) -> None:
    size, crop = (320, 1.0) if name in ("RepVGG-D2se", "RepVGGplus-L2pse") else (224, 0.875)
    preprocessing = preprocessing_of(photos, "--preset", "imagenet_120", "--model", name)
    assert (preprocessing.image_size, preprocessing.crop_fraction) == (size, crop)
    assert rv.create_model(name).variant.image_size == size


def test_the_recipe_of_repvggplus_resizes_to_320_and_crops_320(photos: Path) -> None:
    preprocessing = preprocessing_of(photos, "--preset", "plus_300")
    (photos / "val" / "garden" / "000.jpg").write_bytes(encode(PHOTO, "PNG"))
    source = data.open_dataset(str(photos), variant=rv.create_model("RepVGGplus-L2pse").variant).test
    (batch,) = evaluation(source, preprocessing=preprocessing)
    transform = torchvision.transforms
    theirs = transform.Compose([transform.Resize(320), transform.CenterCrop(320)])
    with Image.open(photos / "val" / "garden" / "000.jpg") as image:
        assert np.array_equal(flat([batch], "image")[0], np.asarray(theirs(image.convert("RGB"))))


def test_options_override_the_size_and_the_crop(photos: Path) -> None:
    def size_and_crop(*options: object) -> tuple[int, float]:
        preprocessing = preprocessing_of(photos, "--preset", "imagenet_120", *options)
        return preprocessing.image_size, preprocessing.crop_fraction

    d2se = ("--model", "RepVGG-D2se")
    assert size_and_crop(*d2se, "--test-image-size", 224) == (224, 0.875)  # at which its 81.82 % were measured
    assert size_and_crop(*d2se, "--crop-fraction", 0.9) == (320, 0.9)
    assert size_and_crop("--test-image-size", 320) == (320, 1.0)
    assert size_and_crop("--test-image-size", 192, "--crop-fraction", 1) == (192, 1.0)
    for wrong in (0, 1.01, "nan"):
        done = command("train.main", "--preset", "digits", "--crop-fraction", wrong, "--workdir", photos.parent / "x")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "--crop-fraction must be above 0 and at most 1, not" in done.stderr


@pytest.mark.parametrize("spec", ["digits", "synthetic"])
def test_digits_and_synthetic_images_are_not_cropped_unless_told_to(tmp_path: Path, spec: str) -> None:
    assert data.open_dataset(spec, image_size=32, data_dir=tmp_path).preprocessing.crop_fraction == 1.0
    cropped = data.open_dataset(spec, image_size=32, data_dir=tmp_path, crop_fraction=0.8).preprocessing
    assert (cropped.image_size, cropped.crop_fraction) == (32, 0.8)


@pytest.mark.parametrize(
    ("published", "size", "resized"),
    [
        ((224, 0.875), 224, 256),
        ((224, 0.875), 320, 320),  # the authors: Resize(320), CenterCrop(320)
        ((224, 0.875), 384, 384),
        ((224, 0.875), 192, 219),
        ((320, 1.0), 320, 320),
        ((320, 1.0), 224, 256),
        ((320, 0.9), 320, 356),  # its own crop at its own size
        ((32, 1.0), 64, 64),  # small images that were never cropped
        ((224, 0.95), 256, 269),
    ],
)
def test_other_sizes_are_cropped_by_the_authors_rule(published: tuple[int, float], size: int, resized: int) -> None:
    assert Preprocessing(*published).at_size(size).resize_size == resized
    assert Preprocessing(*published).at_size(size).image_size == size


@pytest.mark.slow
def test_a_runs_files_record_its_evaluation_preprocessing(photos: Path) -> None:
    workdir = photos.parent / "run"
    net = write_variant(photos.parent, WHOLE)
    options = ("--preset", "imagenet_120", "--model", net, "--data", photos, "--workdir", workdir)
    done = command("train.main", *options, "--image-size", 32, "--batch-size", 8, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    top1 = json.loads(done.stdout.splitlines()[-1])
    for name in ("final", "deploy"):
        described = rv.inspect_weights(workdir / f"{name}.safetensors").preprocessing
        assert (described.image_size, described.crop_fraction) == (48, 1.0)
    done = command("train.evaluate", photos, "deploy", workdir / "final.safetensors")
    assert json.loads(done.stdout)["top1"] == top1["test_top1_deploy_form"]
    assert "evaluating at" not in done.stderr


def test_evaluation_at_another_size_reports_it(photos: Path) -> None:
    model, path = rv.create_model(WHOLE, 2), photos.parent / "w.safetensors"
    rv.save_weights(path, model, random_variables(model), class_names=("garden", "pagoda"))
    done = command("train.evaluate", photos, "train", path, "-r", 64, "--crop-fraction", 0.5)
    assert done.returncode == 0, done.stderr
    assert "evaluating at 64 pixels, cropped from images resized to 128 on the shorter side" in done.stderr
    done = command("train.evaluate", photos, "train", path, "--crop-fraction", 2)
    assert done.stderr == "error: --crop-fraction must be above 0 and at most 1, not 2.0\n"


@pytest.mark.parametrize("preset", ["digits", "imagenet_120", "plus_300"])
def test_a_run_older_than_the_crop_option_resumes(tmp_path: Path, preset: str) -> None:
    config = dataclasses.replace(PRESETS[preset], run=dataclasses.replace(Recipe().run, workdir=str(tmp_path)))
    save_or_compare(config, tmp_path)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del saved["input"]["crop_fraction"]
    saved["input"]["test_image_size"] = {"digits": 32, "imagenet_120": 224, "plus_300": 320}[preset]
    (tmp_path / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    save_or_compare(config, tmp_path)
