"""Claim: an image reaches the network with torchvision's pixels, whatever its file format and mode."""

import io
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from repvgg_jax.errors import ConfigError, DataError
from repvgg_jax.preprocess import Preprocessing, decode_image, eval_transform, normalize
from tests.helpers.photos import PHOTO, encode
from train.data import get_transform
from train.data.transforms import affine, random_affine, random_crop_box, random_resized_crop_flip

# Decoding and the evaluation transform: torchvision's pixels


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG")]
    + [("LA", "PNG"), ("1", "PNG"), ("P", "GIF"), ("RGB", "WEBP"), ("F", "TIFF")],
)
def test_every_image_mode_decodes_as_in_torchvision(mode: str, kind: str) -> None:
    image = PHOTO.convert("RGB").resize((64, 48)).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = encode(image, kind)
    reference = Image.open(io.BytesIO(data)).convert("RGB")  # torchvision's pil_loader
    grey = Image.open(io.BytesIO(data)).convert("L")
    assert np.array_equal(np.asarray(decode_image(data, "x")), np.asarray(reference))
    assert np.array_equal(np.asarray(decode_image(data, "x", channels=1)), np.asarray(grey))


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparent_colours_keeps_its_colours_without_a_warning() -> None:
    image = PHOTO.resize((64, 48)).convert("P")
    data = encode(image, "PNG", transparency=bytes(range(256)))
    assert np.array_equal(np.asarray(decode_image(data, "x")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_high_byte(kind: str) -> None:
    wide = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    image = decode_image(encode(Image.fromarray(wide), kind), "x")
    assert np.array_equal(np.asarray(image)[..., 0], wide >> 8)


def test_exif_orientation_is_ignored_as_in_torchvision() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(PHOTO, "JPEG", exif=exif), "x").size == PHOTO.size


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"no image at all", "no known image format"),
        (encode(PHOTO, "JPEG")[:9000], "truncated"),
        (encode(PHOTO.resize((64, 48)), "PNG")[:4000], "cannot be read as an image"),
    ],
)
def test_an_unreadable_image_is_one_line_that_names_it(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        decode_image(data, "holiday/7.jpg")
    assert str(caught.value).startswith("holiday/7.jpg: ")
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"x\.png: refused as a decompression bomb"):
        decode_image(encode(PHOTO.resize((64, 48)), "PNG"), "x.png")


def test_an_image_too_elongated_to_resize_is_refused() -> None:
    with pytest.raises(DataError, match="1x20000 pixels is too elongated"):
        eval_transform(Image.new("RGB", (1, 20000)), Preprocessing(224))


def torchvision_eval(image: Image.Image, resize: int, crop: int) -> np.ndarray:
    """Resize(resize) and CenterCrop(crop), as torchvision documents them."""
    width, height = image.size
    short, long = min(image.size), max(image.size)
    longer = int(resize * long / short)
    resized = image.resize((resize, longer) if width <= height else (longer, resize), Image.Resampling.BILINEAR)
    left, top = round((resized.width - crop) / 2.0), round((resized.height - crop) / 2.0)
    pixels = np.asarray(resized)[top : top + crop, left : left + crop]
    return pixels if pixels.ndim == 3 else pixels[..., None]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("size", "fraction", "resize"), [(224, 0.875, 256), (320, 1.0, 320), (33, 0.875, 38)])
def test_eval_transform_gives_torchvisions_pixels(mode: str, size: int, fraction: float, resize: int) -> None:
    preprocessing = Preprocessing(size, fraction)
    assert preprocessing.resize_size == resize
    for box in [
        (0, 0, 640, 427),
        (3, 5, 304, 426),
        (0, 0, 31, 400),
        (9, 9, 17, 16),
        (0, 0, 256, 256),
        (0, 0, 257, 256),
    ]:
        image = PHOTO.crop(box).convert(mode)
        assert np.array_equal(eval_transform(image, preprocessing), torchvision_eval(image, resize, size))


def test_normalize_agrees_in_numpy_jax_and_jit() -> None:
    preprocessing = Preprocessing()
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    expected = (images / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    compiled = jax.jit(lambda x: normalize(x, preprocessing))
    for result in (normalize(images, preprocessing), normalize(jnp.asarray(images), preprocessing), compiled(images)):
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, atol=2e-6)
    with pytest.raises(ValueError, match="1 channels"):
        normalize(images[..., :1], preprocessing)


def test_preprocessing_survives_json() -> None:
    for preprocessing in (Preprocessing(), Preprocessing(32, 1.0, (0.3,), (0.4,))):
        assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


@pytest.mark.parametrize(
    "fields",
    [{"image_size": 0}, {"crop_fraction": 0}, {"mean": [0.5]}, {"std": [0, 1, 1]}, {"mean": 3}, {"image_size": "x"}],
)
def test_preprocessing_refuses_invalid_values(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"image_size|crop_fraction|mean|std|preprocessing"):
        Preprocessing.from_dict(fields)


# Augmentation


def test_random_resized_crop_is_crop_then_resize_then_flip() -> None:
    flips = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        left, top, width, height = random_crop_box(*PHOTO.size, rng)
        crop = np.asarray(PHOTO)[top : top + height, left : left + width]
        expected = np.asarray(Image.fromarray(crop).resize((64, 64), Image.Resampling.BILINEAR))
        flip = rng.random() < 0.5
        flips += flip
        result = random_resized_crop_flip(PHOTO, np.random.default_rng(seed), 64)
        assert np.array_equal(result, expected[:, ::-1] if flip else expected)
    assert 10 < flips < 30


def test_random_crops_have_torchvisions_areas_and_aspects() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(500, 375, rng) for _ in range(4000)])
    left, top, width, height = boxes.T
    assert (left.min(), top.min(), (left + width).max(), (top + height).max()) == (0, 0, 500, 375)
    areas, aspects = width * height / (500 * 375), width / height
    assert 0.079 < areas.min() < 0.09
    assert 0.95 < areas.max() <= 1
    assert 0.74 < aspects.min() < 0.76
    assert 1.32 < aspects.max() < 1.35
    # Means of 20,000 draws of torchvision 0.28's RandomResizedCrop.get_params on this size.
    np.testing.assert_allclose(boxes.mean(0), [108.5, 51.9, 282.5, 270.7], atol=5)


@pytest.mark.parametrize(("size", "box"), [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10))])
def test_a_crop_that_never_fits_falls_back_to_the_centre(size: tuple[int, int], box: tuple[int, ...]) -> None:
    assert random_crop_box(*size, np.random.default_rng(0), area=(1.0, 1.0)) == box


@pytest.mark.parametrize("size", [32, 48, 30])
@pytest.mark.parametrize("channels", [1, 3])
def test_affine_at_identity_is_the_evaluation_transform(size: int, channels: int) -> None:
    scans, _ = load_digits(return_X_y=True)
    for scan in scans[:20]:
        image = Image.fromarray((scan * 15).astype(np.uint8).reshape(8, 8)).convert("L" if channels == 1 else "RGB")
        expected = eval_transform(image, Preprocessing(size, 1.0)).astype(int)
        difference = np.abs(affine(image, size) - expected)
        assert difference.max() <= 2
        assert difference.mean() < 0.6


def test_affine_rotates_clockwise_scales_and_shifts_about_the_centre() -> None:
    image = PHOTO.resize((8, 8))
    plain = affine(image, 32).astype(int)
    assert np.abs(affine(image, 32, rotation=np.pi / 2) - np.rot90(plain, -1)).max() <= 1
    assert np.abs(affine(image, 32, shift=(0.25, 0.5))[16:, 8:] - plain[:16, :-8]).max() <= 1
    assert np.abs(affine(image, 32, scale=2.0) - affine(image, 64)[16:48, 16:48].astype(int)).max() <= 1


def test_random_affine_never_mirrors() -> None:
    corner = np.zeros((8, 8), np.uint8)
    corner[1:3, 1:3] = 255
    results = [random_affine(Image.fromarray(corner), np.random.default_rng(seed), 32)[..., 0] for seed in range(200)]
    for result in results:
        rows, columns = np.nonzero(result > 128)
        assert rows.mean() < 16
        assert columns.mean() < 16
    assert len({result.tobytes() for result in results}) == 200


def test_an_unknown_augmentation_is_an_error() -> None:
    with pytest.raises(ConfigError, match="unknown augmentation 'mixup'; choose from random_resized_crop_flip"):
        get_transform("mixup")
