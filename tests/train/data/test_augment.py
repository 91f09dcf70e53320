"""Claim: AutoAugment, RandAugment, color jitter and random erasing give torchvision's pixels."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from tests.helpers.photos import PHOTO
from tests.helpers.torchvision_reference import torchvision
from train.data.augment import (
    REPVGGPLUS,
    auto_augment,
    color_jitter,
    jitter,
    ops,
    policies,
    rand_augment,
    random_erasing,
)

transforms = torchvision.transforms
functional = transforms.functional
NEAREST = transforms.InterpolationMode.NEAREST
CROP = PHOTO.crop((200, 120, 200 + 96, 120 + 80))

AUTO = transforms.AutoAugment()._augmentation_space(10, (80, 96))
RAND = transforms.RandAugment()._augmentation_space(31, (80, 96))
SPACES = ((AUTO, policies.AUTOAUGMENT_SPACE, 10), (RAND, policies.RANDAUGMENT.space, 31))

# PIL blends color and sharpness in single precision and truncates; near a whole number, rounding decides whether that
# subtracts one. The share of values where OpenCV gives the other result:
OFF_BY_ONE = {"Color": 0.03, "Sharpness": 0.005}


def pixels_of(image: Image.Image) -> np.ndarray:
    """Return read-only uint8 [H, W, C]: writing to it is an error."""
    array = np.array(image)
    array = array[..., None] if array.ndim == 2 else array
    array.flags.writeable = False
    return array


def assert_same(ours: np.ndarray, theirs: Image.Image, off_by_one: float = 0.0) -> None:
    difference = np.abs(ours.astype(int) - pixels_of(theirs))
    assert difference.max() <= (1 if off_by_one else 0)
    assert (difference > 0).mean() <= off_by_one


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", sorted({*AUTO, *RAND}))
def test_every_operation_at_every_magnitude_gives_torchvisions_pixels(name: str, mode: str) -> None:
    image = CROP.convert(mode)
    pixels = pixels_of(image)
    seen = set()
    for _, space, count in SPACES:
        if name not in space:
            continue
        for level in range(count):
            for sign in (1, -1) if space[name].signed else (1,):
                magnitude = sign * space[name](level, count - 1, pixels.shape)
                ours = ops.apply(pixels, name, magnitude, ops.NEAREST, ops.BLACK)
                theirs = transforms.autoaugment._apply_op(image, name, magnitude, NEAREST, None)
                assert_same(ours, theirs, OFF_BY_ONE.get(name, 0.0))
                seen.add(ours.tobytes())
    still = policies.AUTOAUGMENT_SPACE.get(name, policies.NONE) is policies.NONE or (name, mode) == ("Color", "L")
    assert len(seen) == 1 if still else len(seen) > 3


@pytest.mark.parametrize(("theirs", "ours", "count"), SPACES)
def test_the_magnitudes_equal_torchvisions(
    theirs: dict[str, Any], ours: dict[str, policies.Magnitude], count: int
) -> None:
    assert theirs.keys() == ours.keys()
    for name, (magnitudes, signed) in theirs.items():
        magnitude = ours[name]
        assert magnitude.signed == signed
        if magnitudes.ndim == 0:
            assert magnitude is policies.NONE
            continue
        expected = magnitudes.double().numpy()
        if name.startswith("Translate"):
            expected = expected.astype(int)  # as applied
        result = [magnitude(level, count - 1, (80, 96, 3)) for level in range(count)]
        np.testing.assert_allclose(result, expected, atol=2e-5)


def test_the_imagenet_policy_equals_torchvisions() -> None:
    theirs = transforms.AutoAugment(transforms.AutoAugmentPolicy.IMAGENET).policies
    ours = policies.AUTOAUGMENT_IMAGENET
    assert len(ours) == 25
    assert [[(name, chance, level or 0) for name, chance, level in steps] for steps in theirs] == [
        list(s) for s in ours
    ]


def test_autoaugment_gives_torchvisions_pixels_for_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = transforms.AutoAugment()
    chosen = Counter()
    for seed in range(150):
        rng = np.random.default_rng(seed)
        policy, chances, positive = int(rng.integers(25)), rng.random(2), rng.random(2) >= 0.5
        chosen[policy] += 1
        draws = policy, torch.tensor(chances), torch.tensor(positive)
        monkeypatch.setattr(theirs, "get_params", lambda count, draws=draws: draws)
        ours = auto_augment(pixels_of(CROP), np.random.default_rng(seed))
        difference = np.abs(ours.astype(int) - pixels_of(theirs(CROP)))
        # A value that is off by one before Solarize or Contrast may differ by more afterwards.
        assert (difference > 0).mean() < 0.05, (seed, policies.AUTOAUGMENT_IMAGENET[policy])
        assert difference.mean() < 0.1
    assert len(chosen) == 25


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls of `ops.apply`: (name, magnitude, interpolation, fill)."""
    calls: list[tuple[Any, ...]] = []
    apply = ops.apply

    def record(pixels: np.ndarray, *arguments: Any) -> np.ndarray:
        calls.append(arguments)
        return apply(pixels, *arguments)

    monkeypatch.setattr(ops, "apply", record)
    return calls


def test_randaugment_draws_all_operations_equally_at_torchvisions_magnitude(applied: list[tuple[Any, ...]]) -> None:
    for seed in range(1400):
        rand_augment(pixels_of(CROP)[:8, :8], np.random.default_rng(seed), count=2, level=9)
    assert len(applied) == 2800
    for name, (magnitudes, signed) in RAND.items():
        drawn = [magnitude for operation, magnitude, *_ in applied if operation == name]
        assert 150 < len(drawn) < 250
        if magnitudes.ndim and not name.startswith("Translate"):  # which depends on the size
            expected = float(magnitudes[9])
            np.testing.assert_allclose(np.abs(drawn), abs(expected), atol=1e-5)
        assert (min(drawn) < 0) == signed
        assert not signed or 0.35 < np.mean(np.array(drawn) > 0) < 0.65
    assert {(interpolation, fill) for *_, interpolation, fill in applied} == {(ops.NEAREST, (0, 0, 0))}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("augment", [auto_augment, rand_augment])
def test_augmentation_is_a_function_of_its_draws_and_does_not_modify_its_input(augment: Any, mode: str) -> None:
    pixels = pixels_of(CROP.convert(mode))
    results = [augment(pixels, np.random.default_rng(seed)) for seed in (*range(40), *range(40))]
    assert all(a.shape == pixels.shape and a.dtype == np.uint8 for a in results)
    assert all(np.array_equal(a, b) for a, b in zip(results[:40], results[40:], strict=True))
    assert len({a.tobytes() for a in results}) > 15


# The authors' RandAugment for RepVGGplus

AUTHORS = {  # as in their code: level -> PIL's argument
    "Rotate": lambda image, level: image.rotate(level / 10 * 30, Image.Resampling.BILINEAR, fillcolor=(128,) * 3),
    # `ImageOps.posterize` at the time; today it refuses to keep no bits.
    "Posterize": lambda image, level: image.point(lambda value: value & ~(2 ** (8 - int(level / 10 * 4)) - 1)),
    "Solarize": lambda image, level: ImageOps.solarize(image, int(level / 10 * 256)),
    "Color": lambda image, level: ImageEnhance.Color(image).enhance(level / 10 * 1.8 + 0.1),
    "Contrast": lambda image, level: ImageEnhance.Contrast(image).enhance(level / 10 * 1.8 + 0.1),
    "Brightness": lambda image, level: ImageEnhance.Brightness(image).enhance(level / 10 * 1.8 + 0.1),
    "Sharpness": lambda image, level: ImageEnhance.Sharpness(image).enhance(level / 10 * 1.8 + 0.1),
    "ShearX": lambda image, level: _authors_affine(image, (1, level / 10 * 0.3, 0, 0, 1, 0)),
    "ShearY": lambda image, level: _authors_affine(image, (1, 0, 0, level / 10 * 0.3, 1, 0)),
    "TranslateX": lambda image, level: _authors_affine(image, (1, 0, -level / 10 * 0.45 * image.width, 0, 1, 0)),
    "TranslateY": lambda image, level: _authors_affine(image, (1, 0, 0, 0, 1, -level / 10 * 0.45 * image.height)),
    "SolarizeAdd": lambda image, level: image.point(
        3 * [min(255, i + int(level / 10 * 110)) if i < 128 else i for i in range(256)]
    ),
    "AutoContrast": lambda image, level: ImageOps.autocontrast(image),
    "Equalize": lambda image, level: ImageOps.equalize(image),
    "Invert": lambda image, level: ImageOps.invert(image),
}


def _authors_affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(128,) * 3)


def test_the_operations_for_repvggplus_equal_the_authors() -> None:
    pixels = pixels_of(CROP)
    assert AUTHORS.keys() == REPVGGPLUS.space.keys()
    assert AUTHORS.keys() - ops.GEOMETRIC.keys() <= ops.COLOR.keys()
    for name, authors in AUTHORS.items():
        for level in range(15):
            magnitude = REPVGGPLUS.space[name](level, REPVGGPLUS.top, pixels.shape)
            ours = ops.apply(pixels, name, magnitude, ops.BILINEAR, REPVGGPLUS.fill)
            difference = np.abs(ours.astype(int) - pixels_of(authors(CROP, level)))
            if name in ops.GEOMETRIC:  # OpenCV blends the outermost pixels with the fill, PIL does not
                assert np.median(difference) <= 1, (name, level)
                assert difference.mean() < 1.0, (name, level)
            else:
                assert difference.max() <= (name in OFF_BY_ONE), (name, level)


def test_randaugment_for_repvggplus_draws_levels_interpolations_and_cutouts(applied: list[tuple[Any, ...]]) -> None:
    white = np.full((64, 64, 3), 255, np.uint8)
    holes = []
    for seed in range(1600):
        before = len(applied)
        result = rand_augment(white, np.random.default_rng(seed), count=1, level=15, kind=REPVGGPLUS)
        if len(applied) == before:
            assert set(map(tuple, result.reshape(-1, 3).tolist())) == {(255, 255, 255), (125, 122, 113)}
            holes.append((result != 255).all(-1).sum())
    assert 60 < len(holes) < 140, "one of sixteen"
    assert max(holes) > 50**2
    assert min(holes) < 8**2
    assert Counter(name for name, *_ in applied).keys() == REPVGGPLUS.space.keys()
    degrees = {round(abs(magnitude)) for name, magnitude, *_ in applied if name == "Rotate"}
    assert degrees == {3 * level for level in range(15)}
    geometric = Counter(interpolation for name, _, interpolation, _ in applied if name in ops.GEOMETRIC)
    assert geometric.keys() == {ops.BILINEAR, ops.BICUBIC}
    assert min(geometric.values()) > 150


def test_cutout_stays_inside_the_image() -> None:
    pixels = np.zeros((20, 30, 1), np.uint8)
    painted = [policies.cutout(pixels, np.random.default_rng(seed), 11) for seed in range(300)]
    areas = [(image == ops.luminance((125, 122, 113))).sum() for image in painted]
    assert (min(areas), max(areas)) == (25, 100)
    assert not pixels.any()


# Color jitter


def test_jitter_gives_torchvisions_pixels() -> None:
    for image in (CROP, CROP.convert("L")):
        pixels = pixels_of(image)
        for factor in (0.0, 0.3, 0.6, 1.0, 1.4, 2.3):
            assert_same(ops.brightness(pixels, factor), functional.adjust_brightness(image, factor))
            assert_same(ops.contrast(pixels, factor), functional.adjust_contrast(image, factor))
            assert_same(ops.saturation(pixels, factor), functional.adjust_saturation(image, factor), 0.03)


def test_hue_rotates_as_in_torchvision() -> None:
    for turn in (-0.5, -0.2, 0.0, 0.04, 0.1, 0.3, 0.5):
        ours = ops.hue(pixels_of(CROP), turn).astype(int)
        difference = np.abs(ours - pixels_of(functional.adjust_hue(CROP, turn)))
        # PIL's circle has 255 steps but wraps around at 256; saturation and value keep 8 bits in both.
        assert difference.mean() < 2.0, turn
        assert np.quantile(difference, 0.99) <= 10, turn
    grey = pixels_of(CROP.convert("L"))
    assert np.array_equal(ops.hue(grey, 0.3), grey)


def test_jitter_draws_factors_uniformly_and_the_order_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[float]] = {name: [] for name in ("brightness", "contrast", "saturation", "hue")}
    orders = set()
    order: list[str] = []
    for name in drawn:

        def spy(pixels: np.ndarray, factor: float, name: str = name) -> np.ndarray:
            drawn[name].append(factor)
            order.append(name)
            return pixels

        monkeypatch.setattr(ops, name, spy)
    for seed in range(600):
        order.clear()
        jitter.color_jitter(pixels_of(CROP), np.random.default_rng(seed), 0.4, 1.5, 0.2, 0.1)
        orders.add(tuple(order))
    assert len(orders) == 24
    for name, least, most in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0, 2.5),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        span = most - least
        assert least <= min(drawn[name]) < least + 0.02 * span
        assert most - 0.02 * span < max(drawn[name]) <= most
        assert abs(np.mean(drawn[name]) - (least + most) / 2) < 0.05 * span
    order.clear()
    color_jitter(pixels_of(CROP), np.random.default_rng(0), contrast=0.3)
    assert order == ["contrast"]


# Random erasing


def test_erasing_fills_torchvisions_rectangles() -> None:
    pixels = np.zeros((60, 60, 3), np.uint8)
    rectangles = []
    for seed in range(3000):
        painted = random_erasing(pixels, np.random.default_rng(seed), 1.0, (9, 8, 7))
        rows, columns = np.nonzero(painted[..., 0])
        top, left, height, width = rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1
        assert (painted[top : top + height, left : left + width] == (9, 8, 7)).all()
        assert height * width == len(rows)
        rectangles.append((top, left, height, width))
    torch.manual_seed(0)
    tensor = torch.zeros(3, 60, 60)
    erasing = transforms.RandomErasing
    theirs = [erasing.get_params(tensor, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(3000)]
    np.testing.assert_allclose(np.mean(rectangles, 0), np.mean(theirs, 0), atol=1.2)
    np.testing.assert_allclose(np.std(rectangles, 0), np.std(theirs, 0), atol=1.2)
    assert not pixels.any()


def test_erasing_happens_with_its_probability() -> None:
    pixels = np.zeros((32, 32, 1), np.uint8)
    erased = [random_erasing(pixels, np.random.default_rng(seed), 0.25, (5,)).any() for seed in range(2000)]
    assert 0.22 < np.mean(erased) < 0.28
    assert random_erasing(pixels, np.random.default_rng(0), 0.0, (5,)) is pixels
