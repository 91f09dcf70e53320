"""Claim: decoding only the crop of a JPEG file gives torchvision's crop, or the error that PIL gives."""

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from repvgg_jax.errors import DataError
from repvgg_jax.preprocess import decode_image, to_array
from tests.helpers.photos import PHOTO, encode
from tests.helpers.torchvision_reference import torchvision
from train.data import jpeg, pictures
from train.data.pictures import open_picture, resized_crop, to_pil
from train.data.transforms import random_crop_box, random_resized_crop_flip

TYPICAL = PHOTO.resize((500, 375), Image.Resampling.BICUBIC)  # a typical ImageNet size
SMALL = PHOTO.resize((100, 75), Image.Resampling.BICUBIC)


def torchvision_crop(data: bytes, box: tuple[int, int, int, int], size: int, mode: str = "RGB") -> np.ndarray:
    left, top, width, height = box
    image = Image.open(io.BytesIO(data)).convert(mode)
    cropped = torchvision.transforms.functional.resized_crop(image, top, left, height, width, [size, size])
    return to_array(cropped).astype(int)


def boxes(image: Image.Image, count: int, area: tuple[float, float] = (0.08, 1.0)) -> list[tuple[int, int, int, int]]:
    rng = np.random.default_rng(0)
    return [random_crop_box(image.width, image.height, rng, area) for _ in range(count)]


def detail(pixels: np.ndarray) -> float:
    """Return how much neighbouring pixels differ: much less in a blurred image, much more in an aliased one."""
    return float(
        np.abs(np.diff(pixels.astype(int), axis=0)).mean() + np.abs(np.diff(pixels.astype(int), axis=1)).mean()
    )


@pytest.fixture
def decoded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes that libjpeg-turbo decoded, in order."""
    shapes: list[tuple[int, ...]] = []
    decode = simplejpeg.decode_jpeg

    def spy(*arguments: Any, **options: Any) -> np.ndarray:
        pixels = decode(*arguments, **options)
        shapes.append(pixels.shape)
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    return shapes


def pil_must_not_open(*arguments: Any) -> Image.Image:
    raise AssertionError("went through PIL")


# Fidelity


@pytest.mark.parametrize(("size", "tolerance"), [(224, 0.8), (160, 1.2), (64, 1.7)])
def test_random_crops_of_a_photograph_equal_torchvisions_to_about_a_grey_level(size: int, tolerance: float) -> None:
    data = encode(TYPICAL, "JPEG", quality=92)
    means, biases, details = [], [], []
    for box in boxes(TYPICAL, 60):
        ours, theirs = resized_crop(open_picture(data, "x", 3), box, size), torchvision_crop(data, box, size)
        assert (ours.shape, ours.dtype) == ((size, size, 3), np.uint8)
        means.append(np.abs(ours - theirs).mean())
        biases.append((ours - theirs).mean())
        details.append(detail(ours) / detail(theirs))
    assert np.mean(means) < tolerance  # the photograph's standard deviation is 80
    assert max(means) < 5
    assert abs(np.mean(biases)) < 0.2
    assert 0.97 < np.mean(details) < 1.06
    assert 0.85 < min(details) < max(details) < 1.15


@pytest.mark.parametrize(
    "options",
    [dict(subsampling=0), dict(subsampling=1), dict(subsampling=2), dict(quality=100), dict(optimize=True)]
    + [dict(restart_marker_rows=1), dict(restart_marker_blocks=5), dict(progressive=True)],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_file_is_decoded_like_pil(
    options: dict[str, Any], mode: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(TYPICAL.convert(mode), "JPEG", **options)
    references = {box: torchvision_crop(data, box, 96, "RGB" if channels == 3 else "L") for box in boxes(TYPICAL, 8)}
    monkeypatch.setattr(jpeg, "decode_image", pil_must_not_open)
    for box, theirs in references.items():
        ours = resized_crop(open_picture(data, "x", channels), box, 96)
        assert ours.shape == (96, 96, channels)
        assert np.abs(ours - theirs).mean() < 3.0
        assert abs((ours - theirs).mean()) < 0.5


def test_exif_orientation_and_thumbnail_have_no_effect() -> None:
    thumbnail = encode(PHOTO.rotate(180).resize((160, 120)), "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail  # contains a whole JPEG
    plain = encode(TYPICAL, "JPEG", quality=92)
    rotated = encode(TYPICAL, "JPEG", quality=92, exif=exif)
    for data in (plain[:2] + segment + plain[2:], rotated):
        picture, reference = open_picture(data, "x", 3), open_picture(plain, "x", 3)
        assert isinstance(picture, jpeg.Jpeg)
        assert (picture.width, picture.height) == TYPICAL.size
        box = (40, 30, 300, 200)
        assert np.array_equal(resized_crop(picture, box, 64), resized_crop(reference, box, 64))


@pytest.mark.parametrize("quarters", [(1, 1), (3, 2), (4, 4), (7, 6), (13, 9)])
def test_large_images_are_decoded_at_a_reduced_size_and_match_torchvisions(
    quarters: tuple[int, int], decoded_sizes: list[tuple[int, ...]]
) -> None:
    size = 64
    image = PHOTO.resize((quarters[0] * 131 + 1, quarters[1] * 129 + 1), Image.Resampling.BICUBIC)
    data = encode(image, "JPEG", quality=92)
    for box in boxes(image, 30, area=(0.2, 1.0)):
        ours, theirs = resized_crop(open_picture(data, "x", 3), box, size), torchvision_crop(data, box, size)
        reduction = max(r for r in (1, 2, 4, 8) if r == 1 or min(box[2:]) >= r * size)
        assert decoded_sizes[-1][1] == -(-image.width // reduction)
        assert np.abs(ours - theirs).mean() < 4.0
        assert abs((ours - theirs).mean()) < 0.5
        assert 0.9 < detail(ours) / detail(theirs) < 1.1


@pytest.mark.parametrize("offset", range(4))
def test_a_crop_that_begins_inside_a_pixel_of_the_reduced_image_is_not_shifted(offset: int) -> None:
    """On a ramp, a shift by one source pixel changes values by one grey level; half a level is rounding."""
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (256, 256))
    for turned in (False, True):
        image = Image.fromarray(np.ascontiguousarray(ramp.T if turned else ramp))
        data = encode(image, "JPEG", quality=100)
        box = (offset, 3 - offset, 230 + offset, 231)
        difference = resized_crop(open_picture(data, "x", 1), box, 50) - torchvision_crop(data, box, 50, "L")
        assert abs(difference[2:-2, 2:-2].mean()) <= 0.55
        assert np.abs(difference).max() <= 2


# Decoding only what the crop needs


def test_rows_below_the_crop_are_not_decoded(decoded_sizes: list[tuple[int, ...]]) -> None:
    data = encode(TYPICAL, "JPEG", subsampling=2)
    whole = np.asarray(decode_image(data, "x"))
    for bottom in (1, 15, 16, 17, 200, 352, 353, 370, 375):
        picture = open_picture(data, "x", 3)
        ours = resized_crop(picture, (0, max(0, bottom - 40), 500, min(bottom, 40)), 224)
        assert ours.shape == (224, 224, 3)
        assert decoded_sizes[-1] == (min(375, -(-bottom // 16) * 16), 500, 3)
    rows = jpeg.open_jpeg(data, "x", 3)
    assert rows is not None
    upper = rows._decode(100, 1)
    assert upper is not None
    assert np.abs(upper.astype(int) - whole[: len(upper)]).mean() < 1.0


def test_the_size_is_known_before_anything_is_decoded(decoded_sizes: list[tuple[int, ...]]) -> None:
    picture = open_picture(encode(TYPICAL, "JPEG"), "x", 3)
    assert (picture.width, picture.height) == TYPICAL.size
    assert not decoded_sizes


# Files that only PIL can decode


@pytest.mark.parametrize(
    "data",
    [
        encode(TYPICAL.convert("CMYK"), "JPEG"),
        encode(TYPICAL, "PNG"),
        encode(TYPICAL, "WEBP"),
        encode(TYPICAL, "JPEG") + b"something after the end",
    ],
)
def test_other_files_equal_torchvisions_to_the_pixel(data: bytes) -> None:
    box = (13, 7, 301, 222)
    assert np.array_equal(resized_crop(open_picture(data, "x", 3), box, 96), torchvision_crop(data, box, 96))


def test_without_the_libraries_everything_equals_torchvisions_to_the_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(TYPICAL, "JPEG")
    monkeypatch.setattr(pictures, "jpeg", None)
    picture = open_picture(data, "x", 3)
    assert isinstance(picture, Image.Image)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        theirs = torchvision_crop(data, random_crop_box(*TYPICAL.size, rng), 96)
        expected = theirs[:, ::-1] if rng.random() < 0.5 else theirs
        assert np.array_equal(random_resized_crop_flip(picture, np.random.default_rng(seed), 96), expected)


def test_both_paths_take_the_same_crops_and_flips() -> None:
    data = encode(TYPICAL, "JPEG", quality=95)
    for seed in range(30):
        fast = random_resized_crop_flip(open_picture(data, "x", 3), np.random.default_rng(seed), 64)
        exact = random_resized_crop_flip(decode_image(data, "x"), np.random.default_rng(seed), 64)
        assert np.abs(fast.astype(int) - exact).mean() < 4.0


@pytest.mark.parametrize("channels", [1, 3])
def test_flipping_mirrors_the_crop(channels: int) -> None:
    data, box = encode(TYPICAL, "JPEG"), (31, 20, 300, 222)
    for picture in (open_picture(data, "x", channels), decode_image(data, "x", channels)):
        straight = resized_crop(picture, box, 96)
        assert np.array_equal(resized_crop(picture, box, 96, mirrored=True), straight[:, ::-1])


# Damage


def attempt(open_file: Callable[[bytes, str, int], pictures.Picture], data: bytes) -> str:
    """Return the outcome of cropping the middle: "fine", or the error."""
    try:
        picture = open_file(data, "x.jpg", 3)
        resized_crop(picture, (picture.width // 4, picture.height // 4, picture.width // 2, picture.height // 2), 32)
    except DataError as error:
        return str(error)
    return "fine"


@pytest.mark.parametrize("kept", [0.99, 0.9, 0.5, 0.1, 0.02])
@pytest.mark.parametrize("options", [{}, dict(progressive=True)])
def test_a_truncated_file_is_refused_whichever_part_the_crop_needs(kept: float, options: dict[str, Any]) -> None:
    data = encode(TYPICAL, "JPEG", **options)
    data = data[: int(kept * len(data))]
    message = attempt(open_picture, data)
    assert message == attempt(decode_image, data)
    assert message.startswith("x.jpg: cannot be read as an image")
    for top in (0, 200):
        with pytest.raises(DataError, match=r"x\.jpg: cannot be read as an image"):
            resized_crop(open_picture(data, "x.jpg", 3), (0, top, 20, 20), 16)


def test_a_false_size_in_the_header_does_not_bypass_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="decompression bomb"):
        open_picture(encode(SMALL, "JPEG"), "x", 3)


FILES = [
    encode(SMALL, "JPEG", quality=92),
    encode(SMALL, "JPEG", progressive=True),
    encode(SMALL.convert("L"), "JPEG"),
    encode(SMALL, "JPEG", subsampling=0, restart_marker_rows=1),
]


@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    st.floats(0, 1),
    st.floats(0, 0.2),
)
@settings(deadline=None, max_examples=300)
def test_damage_is_refused_only_if_pil_refuses_it(
    data: bytes, changes: list[tuple[float, int]], cut_at: float, cut: float
) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    first = int(cut_at * len(damaged))
    del damaged[first : first + int(cut * len(damaged))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, about the damage
        ours, theirs = attempt(open_picture, bytes(damaged)), attempt(decode_image, bytes(damaged))
    # The fast path may miss damage below the crop, but not a missing end of the file.
    assert ours in ("fine", theirs)
    if not damaged.endswith(b"\xff\xd9"):
        assert ours == theirs


def test_undecoded_files_become_pil_images_if_needed() -> None:
    data = encode(SMALL, "JPEG")
    assert np.array_equal(np.asarray(to_pil(open_picture(data, "x", 3))), np.asarray(decode_image(data, "x")))
    assert np.array_equal(np.asarray(to_pil(open_picture(data, "x", 1))), np.asarray(decode_image(data, "x", 1)))
    image = decode_image(data, "x")
    assert to_pil(image) is image
