"""Claim: a description made of plain values becomes one transform; the default is only crop and flip."""

import dataclasses
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from repvgg_jax.errors import ConfigError
from repvgg_jax.preprocess import IMAGENET_MEAN, Preprocessing, decode_image
from tests.helpers.batches import same, training
from tests.helpers.photos import PHOTO, encode, write_photos
from train.data import augment
from train.data.augment import auto_augment, color_jitter, rand_augment, random_erasing
from train.data.augmentation import Augmentation, make_transform
from train.data.pictures import open_picture
from train.data.sources import FolderSource
from train.data.transforms import random_affine, random_resized_crop_flip

IMAGE = PHOTO.resize((160, 120), Image.Resampling.BICUBIC)
JPEG = encode(IMAGE, "JPEG", quality=95)
EVERYTHING = Augmentation(
    auto_augment="randaugment",
    jitter_brightness=0.4,
    jitter_contrast=0.4,
    jitter_saturation=0.4,
    jitter_hue=0.1,
    random_erasing=0.5,
)


def transformed(augmentation: Augmentation, seed: int = 0, base: str = "random_resized_crop_flip") -> np.ndarray:
    return make_transform(base, augmentation, IMAGENET_MEAN)(IMAGE, np.random.default_rng(seed), 48)


def test_the_default_is_crop_and_flip() -> None:
    for seed in range(20):
        expected = random_resized_crop_flip(IMAGE, np.random.default_rng(seed), 48)
        assert np.array_equal(transformed(Augmentation(), seed), expected)


def test_crop_area_and_flip_are_applied() -> None:
    whole = Augmentation(crop_area=(1.0, 1.0), horizontal_flip=0.0)
    crops = [transformed(whole, seed).astype(int) for seed in range(8)]
    # A crop of (almost) the whole area must have almost the aspect ratio of the image.
    assert np.mean([np.abs(crop - crops[0]).mean() for crop in crops]) < 20
    mirrored = [transformed(dataclasses.replace(whole, horizontal_flip=1.0), seed) for seed in range(8)]
    assert all(np.array_equal(a[:, ::-1], b) for a, b in zip(mirrored, crops, strict=True))


@pytest.mark.parametrize(
    ("options", "step"),
    [
        (dict(auto_augment="autoaugment"), auto_augment),
        (dict(auto_augment="randaugment"), rand_augment),
        (
            dict(auto_augment="randaugment", randaugment_ops=3, randaugment_magnitude=20),
            lambda pixels, rng: rand_augment(pixels, rng, 3, 20),
        ),
        (
            dict(auto_augment="randaugment_plus", randaugment_magnitude=15),
            lambda pixels, rng: rand_augment(pixels, rng, 2, 15, augment.REPVGGPLUS),
        ),
        (dict(jitter_contrast=0.3, jitter_hue=0.2), lambda pixels, rng: color_jitter(pixels, rng, 0, 0.3, 0, 0.2)),
        (dict(random_erasing=0.7), lambda pixels, rng: random_erasing(pixels, rng, 0.7, (124, 116, 104))),
    ],
)
def test_each_part_follows_the_crop(options: dict[str, Any], step: Any) -> None:
    changed = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        crop = random_resized_crop_flip(IMAGE, rng, 48)
        result = transformed(Augmentation(**options), seed)
        assert np.array_equal(result, step(crop, rng))
        changed += not np.array_equal(result, crop)
    assert changed >= 5


def test_the_parts_are_applied_in_order() -> None:
    rng = np.random.default_rng(5)
    pixels = random_resized_crop_flip(IMAGE, rng, 48)
    pixels = color_jitter(pixels, rng, 0.4, 0.4, 0.4, 0.1)
    pixels = random_erasing(rand_augment(pixels, rng), rng, 0.5, (124, 116, 104))
    assert np.array_equal(transformed(EVERYTHING, 5), pixels)


@pytest.mark.parametrize("kind", ["autoaugment", "randaugment", "randaugment_plus"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_augmentation_keeps_shape_and_type(kind: Any, channels: int) -> None:
    transform = make_transform(
        "random_resized_crop_flip", dataclasses.replace(EVERYTHING, auto_augment=kind), (0.5,) * channels
    )
    for seed in range(40):
        result = transform(open_picture(JPEG, "x", channels), np.random.default_rng(seed), 40)
        assert (result.shape, result.dtype) == ((40, 40, channels), np.uint8)


def test_digits_are_never_mirrored_but_may_be_augmented() -> None:
    expected = random_affine(IMAGE, np.random.default_rng(0), 48)
    always = Augmentation(horizontal_flip=1.0)
    assert np.array_equal(transformed(always, base="random_affine"), expected)
    erased = transformed(dataclasses.replace(always, random_erasing=1.0), base="random_affine")
    assert not np.array_equal(erased, expected)


def test_exact_crops_equal_pils() -> None:
    transform = make_transform("random_resized_crop_flip", Augmentation(exact_crop=True), IMAGENET_MEAN)
    for seed in range(8):
        result = transform(open_picture(JPEG, "x", 3), np.random.default_rng(seed), 48)
        expected = random_resized_crop_flip(decode_image(JPEG, "x"), np.random.default_rng(seed), 48)
        assert np.array_equal(result, expected)


def test_batches_with_all_augmentations_are_a_function_of_seed_and_step(tmp_path: Any) -> None:
    write_photos(tmp_path, 22)
    source = FolderSource(tmp_path)
    options: dict[str, Any] = dict(
        transform=make_transform("random_resized_crop_flip", EVERYTHING, IMAGENET_MEAN), preprocessing=Preprocessing(32)
    )
    reference = training(source, 6, num_workers=1, **options)
    assert same(training(source, 6, num_workers=4, **options), reference)
    assert same(training(source, 3, start_step=3, num_workers=2, **options), reference[3:])
    assert not same(training(source, 6, seed=4, **options), reference)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(horizontal_flip=1.5), "--horizontal-flip must lie between 0 and 1, not 1.5"),
        (dict(random_erasing=-0.1), "--random-erasing must lie between"),
        (dict(crop_area=(0.5, 0.2)), "--crop-area must be two rising shares"),
        (dict(crop_area=(0.0, 1.0)), "--crop-area must be two rising shares"),
        (dict(jitter_contrast=-1.0), "--jitter-"),
        (dict(jitter_hue=0.6), "--jitter-hue must be at most 0.5"),
        (dict(randaugment_ops=0), "--randaugment-ops must be at least 1"),
        (dict(randaugment_magnitude=31), "--randaugment-magnitude must lie between 0 and 30"),
    ],
)
def test_invalid_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augmentation(**options)


def test_without_opencv_the_default_works_and_the_rest_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name for name in sys.modules if name.startswith("train.data.augment.") or name == "train.data.augment"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sys.modules["train.data"], "augment")
    monkeypatch.setitem(sys.modules, "cv2", None)
    make_transform("random_resized_crop_flip", Augmentation(), IMAGENET_MEAN)
    with pytest.raises(ConfigError, match=r"needs cv2: pip install -e '\.\[train\]' in your checkout"):
        make_transform("random_resized_crop_flip", EVERYTHING, IMAGENET_MEAN)
