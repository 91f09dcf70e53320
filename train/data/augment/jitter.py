"""Colour jitter and random erasing, like torchvision's `ColorJitter` and `RandomErasing`."""

import math

import numpy as np

from . import ops


def color_jitter(
    pixels: np.ndarray,
    rng: np.random.Generator,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> np.ndarray:
    """Change brightness, contrast, saturation and hue by random amounts, in a random order.

    Args:
      pixels: uint8 [H, W, C], 1 or 3 channels.
      rng: source of randomness.
      brightness: x, with the factor uniform over [max(0, 1 - x), 1 + x]; 0 turns the change off.
      contrast: the same for contrast.
      saturation: the same for saturation.
      hue: the shift is uniform over [-x, x], in turns, with x at most 0.5; 0 turns the change off.

    Returns:
      uint8 [H, W, C].
    """
    changes = (
        (ops.brightness, brightness, 1.0),
        (ops.contrast, contrast, 1.0),
        (ops.saturation, saturation, 1.0),
        (ops.hue, hue, 0.0),
    )
    for number in rng.permutation(len(changes)):
        change, strength, neutral = changes[number]
        if strength:
            least = neutral - strength if change is ops.hue else max(0.0, neutral - strength)
            pixels = change(pixels, rng.uniform(least, neutral + strength))
    return pixels


def random_erasing(
    pixels: np.ndarray,
    rng: np.random.Generator,
    probability: float,
    fill: tuple[int, ...],
    area: tuple[float, float] = (0.02, 0.33),
    aspect: tuple[float, float] = (0.3, 3.3),
) -> np.ndarray:
    """Paint over a random rectangle.

    torchvision erases to 0 after normalisation, which is the mean colour before it.

    Args:
      pixels: uint8 [H, W, C].
      rng: source of randomness.
      probability: probability of erasing.
      fill: the colour, C numbers.
      area: range of the rectangle's share of the image's area.
      aspect: range of the rectangle's height divided by its width, uniform in the logarithm.

    Returns:
      uint8 [H, W, C]; the unchanged image if none of ten rectangles fits.
    """
    if rng.random() >= probability:
        return pixels
    height, width = pixels.shape[:2]
    for _ in range(10):
        target = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            painted = pixels.copy()
            painted[top : top + h, left : left + w] = fill
            return painted
    return pixels
