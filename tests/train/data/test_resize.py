"""Claim: resizing equals PIL's to the bit, with and without a compiler, on every processor."""

import platform

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from repvgg_jax import compiler
from tests.helpers.photos import PHOTO
from train.data import resize as resizing
from train.data.resize import Box, resize

RNG = np.random.default_rng(0)


def pil(pixels: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Resize rows, then columns, with PIL."""
    left, top, width, height = box
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    rows = image.resize((size, image.height), Image.Resampling.BILINEAR, (left, 0, left + width, image.height))
    both = rows.resize((size, size), Image.Resampling.BILINEAR, (0, top, size, top + height))
    return np.asarray(both).reshape(size, size, -1)


@pytest.fixture(params=["", "x86-64", "x86-64-v2", "x86-64-v3"])
def architecture(request, monkeypatch, tmp_path) -> None:
    """The function compiled for this machine, and for older ones."""
    options = [f"-march={request.param}"] if request.param else []
    if options and platform.machine() != "x86_64":
        pytest.skip("not an x86-64 processor")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    function = resizing._compiled.__wrapped__(*options)
    if function is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(resizing, "_compiled", lambda: function)


def sides(rng: np.random.Generator, length: int) -> tuple[float, float]:
    """Return start and extent of a part, in eighths of a pixel; half of them begin and end between pixels."""
    first, last = sorted(rng.choice(np.arange(8 * length + 1), 2, replace=False) / 8)
    return (float(first), float(last - first)) if rng.random() < 0.5 else (0.0, float(length))


def test_the_result_equals_pils_on_every_architecture(architecture) -> None:
    rng = np.random.default_rng(1)
    for case in range(300):
        channels, size = (1, 3)[case % 2], int(rng.integers(1, 300))
        height, width = rng.integers(1, 400, 2)
        pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
        (left, across), (top, down) = sides(rng, width), sides(rng, height)
        box = (left, top, across, down)
        expected = pil(pixels, box, size)
        assert np.array_equal(resize(pixels, box, size), expected), (height, width, size, box)
        assert np.array_equal(resize(pixels, box, size, mirrored=True), expected[:, ::-1])


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.sampled_from([1, 3]), st.integers(0, 1000))
@settings(deadline=None, max_examples=200)
def test_the_result_is_the_same_with_and_without_a_compiler(height, width, size, channels, seed) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
    (left, across), (top, down) = sides(rng, width), sides(rng, height)
    for mirrored in (False, True):
        here = resize(pixels, (left, top, across, down), size, mirrored=mirrored)
        assert np.array_equal(here, resizing._by_pil(pixels, (left, top, across, down), size, mirrored))


def test_the_compiled_function_can_be_switched_off(monkeypatch) -> None:
    monkeypatch.setenv(compiler.SWITCH, "0")
    assert resizing._native() is None
    pixels = RNG.integers(0, 256, (20, 30, 3), np.uint8)
    assert np.array_equal(resize(pixels, (0, 0, 30, 20), 7), pil(pixels, (0, 0, 30, 20), 7))


def test_pixels_outside_a_crop_have_no_effect() -> None:
    """A crop is a view: its rows are not contiguous, and its last pixel may be the last of the memory."""
    photo = np.asarray(PHOTO)
    for top, left in ((0, 0), (11, 17), (photo.shape[0] - 90, photo.shape[1] - 120)):
        crop = photo[top : top + 90, left : left + 120]
        assert np.array_equal(resize(crop, (0, 0, 120, 90), 64), pil(np.ascontiguousarray(crop), (0, 0, 120, 90), 64))


def test_pils_own_order_differs_by_at_most_one_grey_level() -> None:
    for width, height in ((53, 223), (300, 200), (200, 300)):
        crop = PHOTO.resize((width, height))
        whole = np.asarray(crop.resize((128, 128), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(resize(np.asarray(crop), (0, 0, width, height), 128) - whole).max() <= 1
