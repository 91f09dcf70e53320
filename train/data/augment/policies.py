"""AutoAugment's ImageNet policy and RandAugment as tables, which `auto_augment` and `rand_augment` apply.

Sources: Cubuk et al. 2018 (arXiv 1805.09501, table 9) and 2019 (arXiv 1909.13719), with the magnitudes of torchvision's
`AutoAugment` and `RandAugment`; for `REPVGGPLUS`, the training code of the RepVGG authors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from . import ops


@dataclass(frozen=True)
class Magnitude:
    """Linear mapping from a level (0, 1, …) to an operation's magnitude.

    Attributes:
      least, most: magnitudes at level 0 and at the top level.
      signed: whether the sign is drawn at random.
      side: 0 if the magnitudes are shares of the image's height, 1 if of its width, None if of neither.
      whole: function that rounds the magnitude to an integer; None if it is not rounded.
    """

    least: float
    most: float
    signed: bool = False
    side: int | None = None
    whole: Callable[[float], int] | None = None

    def __call__(self, level: float, top: int, shape: tuple[int, ...]) -> float:
        """Return the magnitude, without its sign, at `level` on a scale from 0 to `top`, for an image of this shape.

        Levels above `top` extrapolate.
        """
        value = self.least + (self.most - self.least) * level / top
        if self.side is not None:
            value *= shape[self.side]
        return value if self.whole is None else self.whole(value)


NONE: Final = Magnitude(0, 0)
_SHEAR: Final = Magnitude(0, 0.3, signed=True)
_BLEND: Final = Magnitude(0, 0.9, signed=True)

# Every operation of the two papers except Identity, with its range.
_PAPERS: Final[Mapping[str, Magnitude]] = {
    "ShearX": _SHEAR,
    "ShearY": _SHEAR,
    "TranslateX": Magnitude(0, 150 / 331, signed=True, side=1, whole=int),
    "TranslateY": Magnitude(0, 150 / 331, signed=True, side=0, whole=int),
    "Rotate": Magnitude(0, 30, signed=True),
    "Brightness": _BLEND,
    "Color": _BLEND,
    "Contrast": _BLEND,
    "Sharpness": _BLEND,
    "Posterize": Magnitude(8, 4, whole=round),
    "Solarize": Magnitude(255, 0),
    "AutoContrast": NONE,
    "Equalize": NONE,
    "Invert": NONE,
}

AUTOAUGMENT_TOP: Final = 9
AUTOAUGMENT_SPACE: Final = _PAPERS

# Operation, probability, level. A sub-policy is two such steps; one sub-policy is drawn per image.
Step = tuple[str, float, int]
AUTOAUGMENT_IMAGENET: Final[tuple[tuple[Step, Step], ...]] = (
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
    (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 0), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 0)),
    (("Posterize", 0.8, 5), ("Equalize", 1.0, 0)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 0), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 0)),
    (("Equalize", 0.0, 0), ("Equalize", 0.8, 0)),
    (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 0)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 0)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 0)),
    (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
    (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
)


@dataclass(frozen=True)
class RandAugment:
    """A kind of RandAugment.

    Attributes:
      space: the operations, all with the same probability.
      top: level at which their magnitudes reach `most`.
      draws_level: whether each operation's level is drawn at random below the given level.
      interpolations: interpolations, one of which is drawn for each geometric operation.
      fill: colour outside of the image.
      cutout: whether painting over a square (40 pixels at `top`) is a further operation.
    """

    space: Mapping[str, Magnitude]
    top: int
    draws_level: bool = False
    interpolations: tuple[int, ...] = (ops.NEAREST,)
    fill: ops.Color = ops.BLACK
    cutout: bool = False


RANDAUGMENT: Final = RandAugment(
    {"Identity": NONE, **{name: magnitude for name, magnitude in _PAPERS.items() if name != "Invert"}}, top=30
)

# "raug15", used for RepVGGplus: levels 0 to 14 on a scale to 10, no Identity, stronger at the low end.
_FACTOR: Final = Magnitude(-0.9, 0.9)
REPVGGPLUS: Final = RandAugment(
    {
        "AutoContrast": NONE,
        "Equalize": NONE,
        "Invert": NONE,
        "Rotate": Magnitude(0, 30, signed=True),
        "Posterize": Magnitude(0, 4, whole=int),
        "Solarize": Magnitude(0, 256, whole=int),
        "SolarizeAdd": Magnitude(0, 110, whole=int),
        "Color": _FACTOR,
        "Contrast": _FACTOR,
        "Brightness": _FACTOR,
        "Sharpness": _FACTOR,
        "ShearX": _SHEAR,
        "ShearY": _SHEAR,
        "TranslateX": Magnitude(0, 0.45, signed=True, side=1),
        "TranslateY": Magnitude(0, 0.45, signed=True, side=0),
    },
    top=10,
    draws_level=True,
    interpolations=(ops.BILINEAR, ops.BICUBIC),
    fill=(128, 128, 128),
    cutout=True,
)
_CUTOUT: Final = Magnitude(0, 40)
_CUTOUT_COLOR: Final = (125, 122, 113)


def auto_augment(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply AutoAugment with the ImageNet policy, as torchvision does (nearest neighbour, black outside).

    Args:
      pixels: uint8 [H, W, C], 1 or 3 channels.
      rng: source of randomness.

    Returns:
      uint8 [H, W, C].
    """
    policy = AUTOAUGMENT_IMAGENET[rng.integers(len(AUTOAUGMENT_IMAGENET))]
    chances, signs = rng.random(2), rng.random(2) < 0.5
    for (name, probability, level), chance, negative in zip(policy, chances, signs, strict=True):
        if chance < probability:
            magnitude = AUTOAUGMENT_SPACE[name]
            value = magnitude(level, AUTOAUGMENT_TOP, pixels.shape)
            pixels = ops.apply(pixels, name, -value if magnitude.signed and negative else value, ops.NEAREST, ops.BLACK)
    return pixels


def rand_augment(
    pixels: np.ndarray, rng: np.random.Generator, count: int = 2, level: int = 9, kind: RandAugment = RANDAUGMENT
) -> np.ndarray:
    """Apply RandAugment: `count` operations, drawn with replacement.

    Args:
      pixels: uint8 [H, W, C], 1 or 3 channels.
      rng: source of randomness.
      count: number of operations.
      level: level of all operations, 0 to `kind.top`; with `kind.draws_level`, each level is drawn below it.
      kind: `RANDAUGMENT` (torchvision's) or `REPVGGPLUS` (the authors').

    Returns:
      uint8 [H, W, C].
    """
    names = list(kind.space)
    for _ in range(count):
        choice = int(rng.integers(len(names) + kind.cutout))
        at = int(rng.integers(level)) if kind.draws_level and level else level
        if choice == len(names):
            pixels = cutout(pixels, rng, max(2, int(_CUTOUT(at, kind.top, pixels.shape))))
            continue
        name = names[choice]
        magnitude = kind.space[name]
        value = magnitude(at, kind.top, pixels.shape)
        if magnitude.signed and rng.random() < 0.5:
            value = -value
        interpolation = ops.NEAREST
        if name in ops.GEOMETRIC:
            interpolation = kind.interpolations[int(rng.integers(len(kind.interpolations)))]
        pixels = ops.apply(pixels, name, value, interpolation, kind.fill)
    return pixels


def cutout(pixels: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Paint a square with sides of `size` pixels at a random place in ImageNet's mean colour."""
    height, width, channels = pixels.shape
    y, x, half = int(rng.integers(height)), int(rng.integers(width)), size // 2
    painted = pixels.copy()
    color = _CUTOUT_COLOR if channels == 3 else (ops.luminance(_CUTOUT_COLOR),)
    painted[max(0, y - half) : y + half, max(0, x - half) : x + half] = color
    return painted
