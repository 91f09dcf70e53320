"""Claim: everything about a data set is one row of a table, and a recipe can override each of its columns."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repvgg_jax.errors import ConfigError
from repvgg_jax.preprocess import IMAGENET_MEAN, Preprocessing
from tests.helpers.commands import command
from tests.helpers.photos import PHOTO, write_photos
from train.data import datasets, make_transform, open_dataset
from train.data.augmentation import Augmentation
from train.data.transforms import as_is, pad_and_crop_flip
from train.presets import parse
from train.run import check_augmentation, open_data

OWN: dict[str, Any] = dict(
    mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3), train_size=24, test_size=28, crop_fraction=0.9, train_transform="as_is"
)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photographs in the folder `mine` of the current folder."""
    write_photos(tmp_path / "mine" / "train", 8)
    write_photos(tmp_path / "mine" / "val", 4, offset=20)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mine"


def columns(dataset: datasets.DataSet) -> dict[str, Any]:
    how = dataset.preprocessing
    evaluation = dict(mean=how.mean, std=how.std, test_size=how.image_size, crop_fraction=how.crop_fraction)
    return evaluation | dict(train_size=dataset.train_size, train_transform=dataset.train_transform)


def test_a_data_set_with_its_own_mean_and_crop_is_one_row(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(datasets.DATA_SETS, "mine", datasets.Row(datasets.PHOTOGRAPHS.source, **OWN))
    for spec in ("mine", "mine:1.0.0"):
        assert columns_of_row(spec) == OWN
    recipe = parse(["--preset", "imagenet_120", "--data", "mine"])
    assert columns(open_data(recipe)) == OWN
    assert columns(open_data(parse(["--preset", "imagenet_120", "--data", str(photos)])))["mean"] == IMAGENET_MEAN


def columns_of_row(spec: str) -> dict[str, Any]:
    row = datasets.row_of(spec)
    return {name: getattr(row, name) for name in OWN}


@pytest.mark.parametrize("spec", ["photographs", "digits", "synthetic"])
def test_a_recipe_overrides_every_column(spec: str, photos: Path) -> None:
    words = ["--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.2", "0.3", "--image-size", "24"]
    words += ["--test-image-size", "28", "--crop-fraction", "0.9", "--train-transform", "as_is"]
    words += ["--data", str(photos) if spec == "photographs" else spec, "--data-dir", str(photos.parent / "tfds")]
    assert columns(open_data(parse(["--preset", "imagenet_120", *words]))) == OWN


def test_digits_keep_their_own_preprocessing_under_any_preset(tmp_path: Path) -> None:
    options = ["--data", "digits", "--data-dir", str(tmp_path)]
    dataset = open_data(parse(["--preset", "imagenet_120", *options]))
    assert dataset.preprocessing == Preprocessing(32, 1.0, (0.306,) * 3, (0.376,) * 3)
    assert (dataset.train_size, dataset.train_transform) == (32, "random_affine")
    grey = open_dataset("digits", data_dir=tmp_path, channels=1).preprocessing
    assert (grey.mean, grey.std) == (pytest.approx((0.306,)), pytest.approx((0.376,)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--mean", "0.5"), "--mean must be three finite numbers, one for each colour, not 0.5"),
        (("--mean", "0.5", "nan", "0.5"), "--mean must be three finite numbers, one for each colour, not 0.5 nan 0.5"),
        (("--std", "0.5", "0", "0.5"), "--std must be positive, not 0.5 0.0 0.5"),
        (("--train-transform", "mirror"), "--train-transform must be one of random_resized_crop_flip, "),
    ],
)
def test_invalid_values_are_one_line(options: tuple[str, ...], says: str, tmp_path: Path) -> None:
    done = command("train.main", "--preset", "digits", "--workdir", tmp_path / "run", *options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {says}")
    assert not list(tmp_path.iterdir())


def test_padding_and_cropping_only_shifts_and_mirrors() -> None:
    image = PHOTO.crop((0, 0, 32, 32))
    pixels = as_is(image, np.random.default_rng(0), 32)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
    windows = [padded[top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
    expected = {window.tobytes() for window in windows}
    mirrored = {window[:, ::-1].tobytes() for window in windows}
    rng, plain = np.random.default_rng(1), 0
    for _ in range(200):
        crop = pad_and_crop_flip(image, rng, 32)
        assert crop.shape == (32, 32, 3)
        assert crop.tobytes() in expected | mirrored
        plain += crop.tobytes() in expected
    assert 60 < plain < 140
    assert all(pad_and_crop_flip(image, rng, 32, horizontal_flip=0).tobytes() in expected for _ in range(20))


def test_a_transform_accepts_only_its_own_options(photos: Path) -> None:
    image, dataset = PHOTO.crop((0, 0, 32, 32)), open_dataset(str(photos), train_transform="pad_and_crop_flip")
    still = make_transform(dataset.train_transform, Augmentation(horizontal_flip=0), IMAGENET_MEAN)
    expected = pad_and_crop_flip(image, np.random.default_rng(3), 32, horizontal_flip=0)
    assert np.array_equal(still(image, np.random.default_rng(3), 32), expected)
    check_augmentation(Augmentation(horizontal_flip=0), dataset)
    with pytest.raises(ConfigError, match="--crop-area changes nothing with --train-transform pad_and_crop_flip"):
        check_augmentation(Augmentation(crop_area=(0.5, 1.0)), dataset)
