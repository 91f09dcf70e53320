"""Options of the training augmentation, and the transform that they describe."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from repvgg_jax.errors import ConfigError
from repvgg_jax.extras import install_hint

from ..options import at_least, between, check_options, must, option
from .pictures import Picture, to_pil
from .transforms import OPTIONS, Transform, get_transform

AutoAugment = Literal["none", "autoaugment", "randaugment", "randaugment_plus"]

_rising_shares = must("be two rising shares of the image", lambda area: 0 < area[0] <= area[1] <= 1)

_Step = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of the training images. The 120-epoch recipe of the paper uses only crop and flip."""

    crop_area: tuple[float, float] = option((0.08, 1.0), _rising_shares)
    """Area of the random crop, as a fraction of the image's area: minimum and maximum (photographs only)."""
    horizontal_flip: float = option(0.5, between(0, 1))
    """Probability of a horizontal flip (photographs only)."""
    auto_augment: AutoAugment = "none"
    """autoaugment: AutoAugment's policy for ImageNet. randaugment: RandAugment as in torchvision. randaugment_plus:
    RandAugment as in the authors' RepVGGplus recipe, with random magnitudes below --randaugment-magnitude."""
    randaugment_ops: int = option(2, at_least(1))
    """Number of RandAugment operations per image."""
    randaugment_magnitude: int = option(9, between(0, 30))
    """Magnitude of RandAugment, from 0 to 30. The authors use 15 with randaugment_plus."""
    jitter_brightness: float = option(0.0, at_least(0))
    """Colour jitter as in torchvision: maximum change of the brightness factor."""
    jitter_contrast: float = option(0.0, at_least(0))
    """Colour jitter: maximum change of the contrast factor."""
    jitter_saturation: float = option(0.0, at_least(0))
    """Colour jitter: maximum change of the saturation factor."""
    jitter_hue: float = option(0.0, at_least(0), must("be at most 0.5, half a turn", lambda value: value <= 0.5))
    """Colour jitter: maximum shift of the hue, as a fraction of the colour circle."""
    random_erasing: float = option(0.0, between(0, 1))
    """Probability of erasing a random rectangle."""
    exact_crop: bool = False
    """Decode and crop with PIL. This gives exactly the pixels that torchvision gives, at a third of the speed."""

    def __post_init__(self) -> None:
        check_options(self)


def make_transform(base: str, augmentation: Augmentation, mean: Sequence[float]) -> Transform:
    """Return the transform that crops or resizes an image with `base` and then augments it.

    The order is crop, flip, colour jitter, AutoAugment or RandAugment, random erasing.

    Args:
      base: a key of `transforms.TRANSFORMS`, such as a data set's `train_transform`. `crop_area` and
        `horizontal_flip` affect only the transforms that `transforms.OPTIONS` lists them for.
      augmentation: the options of the augmentation.
      mean: mean colour in 0..1, one number per channel, with which random erasing paints.

    Returns:
      A pure function of (image, rng, size).

    Raises:
      ConfigError: there is no such base, or OpenCV is needed and not installed.
    """
    chosen = {name: getattr(augmentation, name) for name in OPTIONS[base]} if base in OPTIONS else {}
    transform = functools.partial(get_transform(base), **chosen)
    steps = _steps(augmentation, mean)
    if not steps and not augmentation.exact_crop:
        return transform

    def augmented(image: Picture, rng: np.random.Generator, size: int) -> np.ndarray:
        pixels = transform(to_pil(image) if augmentation.exact_crop else image, rng, size)
        for step in steps:
            pixels = step(pixels, rng)
        return pixels

    return augmented


def _steps(augmentation: Augmentation, mean: Sequence[float]) -> list[_Step]:
    jitter = {
        name: strength
        for name in ("brightness", "contrast", "saturation", "hue")
        if (strength := getattr(augmentation, f"jitter_{name}"))
    }
    if not jitter and augmentation.auto_augment == "none" and not augmentation.random_erasing:
        return []
    try:
        from . import augment
    except ImportError as error:
        raise ConfigError(f"augmentation beyond crop and flip needs {error.name}: {install_hint('train')}") from error
    steps: list[_Step] = []
    if jitter:
        steps.append(functools.partial(augment.color_jitter, **jitter))
    count, level = augmentation.randaugment_ops, augmentation.randaugment_magnitude
    if augmentation.auto_augment == "autoaugment":
        steps.append(augment.auto_augment)
    elif augmentation.auto_augment == "randaugment":
        steps.append(functools.partial(augment.rand_augment, count=count, level=level))
    elif augmentation.auto_augment == "randaugment_plus":
        steps.append(functools.partial(augment.rand_augment, count=count, level=level, kind=augment.REPVGGPLUS))
    if augmentation.random_erasing:
        fill = tuple(round(255 * value) for value in mean)
        steps.append(functools.partial(augment.random_erasing, probability=augmentation.random_erasing, fill=fill))
    return steps
