"""Training transforms to the input size: pure functions (image, rng, size) -> uint8 [size, size, C].

All randomness comes from `rng`, so an image's augmentation depends only on the seed and on its place in the epoch. To
add a transform, write the function and add it to `TRANSFORMS`, and to `OPTIONS` if it takes some. An image is a PIL
image of mode "RGB" or "L", or an undecoded file. Augmentations of the resized image are in `augmentation.py`.
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import Image

from repvgg_jax.errors import ConfigError
from repvgg_jax.preprocess import to_array

from .pictures import Picture, resized_crop, to_pil

Transform = Callable[[Picture, np.random.Generator, int], np.ndarray]

ASPECT: Final = (3 / 4, 4 / 3)  # random_resized_crop_flip: width divided by height
# random_affine: enough to hide the difference between two writers, too little to turn one digit into another.
MAX_ROTATION: Final = math.radians(15)
SCALE: Final = (0.85, 1.15)
MAX_SHEAR: Final = math.radians(10)
MAX_TRANSLATION: Final = 0.1


def random_resized_crop_flip(
    image: Picture,
    rng: np.random.Generator,
    size: int,
    *,
    crop_area: tuple[float, float] = (0.08, 1.0),
    horizontal_flip: float = 0.5,
) -> np.ndarray:
    """Apply torchvision's `RandomResizedCrop(size)` (bilinear, antialiased) and `RandomHorizontalFlip()`.

    Args:
      image: PIL image of mode "RGB" or "L", or an undecoded file, of which only the crop is decoded.
      rng: source of randomness.
      size: height and width of the result.
      crop_area: range of the crop's share of the image's area.
      horizontal_flip: probability of a horizontal flip.

    Returns:
      uint8 [size, size, C].

    Raises:
      DataError: the file cannot be decoded.
    """
    box = random_crop_box(image.width, image.height, rng, crop_area)
    return resized_crop(image, box, size, mirrored=bool(rng.random() < horizontal_flip))


def pad_and_crop_flip(
    image: Picture, rng: np.random.Generator, size: int, *, horizontal_flip: float = 0.5
) -> np.ndarray:
    """Shift by up to an eighth of the side and flip; for CIFAR, that is the usual padding by 4 black pixels and crop.

    Args:
      image: PIL image of mode "RGB" or "L", or an undecoded file; if its size is not `size`, it is first resized.
      rng: source of randomness.
      size: height and width of the result.
      horizontal_flip: probability of a horizontal flip.

    Returns:
      uint8 [size, size, C].
    """
    margin = size // 8
    padded = np.pad(as_is(image, rng, size), ((margin, margin), (margin, margin), (0, 0)))
    top, left = (int(offset) for offset in rng.integers(2 * margin + 1, size=2))
    crop = padded[top : top + size, left : left + size]
    return crop[:, ::-1] if rng.random() < horizontal_flip else crop


def random_crop_box(
    width: int, height: int, rng: np.random.Generator, area: tuple[float, float] = (0.08, 1.0)
) -> tuple[int, int, int, int]:
    """Return the crop of torchvision's `RandomResizedCrop`, which needs the image's size but not its pixels.

    Args:
      width: width of the image.
      height: height of the image.
      rng: source of randomness.
      area: range of the crop's share of the image's area.

    Returns:
      (left, top, width, height) of a crop inside the image. If ten random crops do not fit, the largest central one
      with an aspect ratio in `ASPECT`.
    """
    log_aspect = math.log(ASPECT[0]), math.log(ASPECT[1])
    for _ in range(10):
        # The numbers of `rng.uniform`, in a third of the time.
        target = width * height * (area[0] + (area[1] - area[0]) * rng.random())
        ratio = math.exp(log_aspect[0] + (log_aspect[1] - log_aspect[0]) * rng.random())
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, w, h
    w, h = width, height
    if width / height < ASPECT[0]:
        h = round(width / ASPECT[0])
    elif width / height > ASPECT[1]:
        w = round(height * ASPECT[1])
    return (width - w) // 2, (height - h) // 2, w, h


def random_affine(image: Picture, rng: np.random.Generator, size: int) -> np.ndarray:
    """Apply a small random rotation, scaling, shear and shift, but no flip; for small images such as digits.

    The image is sampled once, bilinearly, from its original pixels. There is no antialiasing, so it should not be much
    larger than `size`. Areas outside the image are black.

    Args:
      image: PIL image of mode "RGB" or "L", or an undecoded file.
      rng: source of randomness.
      size: height and width of the result.

    Returns:
      uint8 [size, size, C].
    """
    rotation = rng.uniform(-MAX_ROTATION, MAX_ROTATION)
    scale = math.exp(rng.uniform(math.log(SCALE[0]), math.log(SCALE[1])))
    shear = rng.uniform(-MAX_SHEAR, MAX_SHEAR)
    shift_x, shift_y = rng.uniform(-MAX_TRANSLATION, MAX_TRANSLATION, size=2)
    return affine(to_pil(image), size, rotation=rotation, scale=scale, shear=shear, shift=(shift_x, shift_y))


def affine(
    image: Image.Image,
    size: int,
    *,
    rotation: float = 0.0,
    scale: float = 1.0,
    shear: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """Rotate (clockwise, radians), scale and shear (radians) about the centre, then shift (in image sides).

    With the default parameters, it equals `eval_transform` at crop fraction 1: pixel centres are at the same positions,
    and values agree to two grey levels (PIL truncates here, and rounds twice in `resize`).

    Returns:
      uint8 [size, size, C].
    """
    # PIL takes the inverse mapping, from a position in the result to one in the image.
    unit = min(image.size) / size / scale
    cos, sin, skew = math.cos(rotation), math.sin(rotation), math.tan(shear)
    a, b = unit * (cos + skew * sin), unit * (sin - skew * cos)
    c, d = -unit * sin, unit * cos
    x0, y0 = size * (0.5 + shift[0]), size * (0.5 + shift[1])
    matrix = (a, b, image.width / 2 - a * x0 - b * y0, c, d, image.height / 2 - c * x0 - d * y0)
    transformed = image.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return to_array(transformed)


def as_is(image: Picture, rng: np.random.Generator, size: int) -> np.ndarray:
    """Return the image without augmentation, resized to a square if its size differs; for benchmarks.

    Returns:
      uint8 [size, size, C].
    """
    del rng
    whole = to_pil(image)
    if whole.size != (size, size):
        whole = whole.resize((size, size), Image.Resampling.BILINEAR)
    return to_array(whole)


TRANSFORMS: dict[str, Transform] = {
    "random_resized_crop_flip": random_resized_crop_flip,
    "pad_and_crop_flip": pad_and_crop_flip,
    "random_affine": random_affine,
    "as_is": as_is,
}

OPTIONS: dict[str, tuple[str, ...]] = {
    "random_resized_crop_flip": ("crop_area", "horizontal_flip"),
    "pad_and_crop_flip": ("horizontal_flip",),
}
"""Options of `Augmentation` that a transform takes, under their names."""


def get_transform(name: str) -> Transform:
    """Return the training transform called `name`.

    Raises:
      ConfigError: there is no such transform.
    """
    if name not in TRANSFORMS:
        raise ConfigError(f"unknown augmentation {name!r}; choose from {', '.join(TRANSFORMS)}")
    return TRANSFORMS[name]
