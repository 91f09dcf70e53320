"""Operations on the pixels of one image, uint8 [H, W, C] with 1 or 3 channels: PIL's results at OpenCV's speed.

Every operation is (pixels, magnitude) -> pixels, and does not modify its argument. The operations of the AutoAugment
and RandAugment papers are in the tables `GEOMETRIC` and `COLOR`, under the papers' names.
"""

import math
from collections.abc import Callable
from typing import Final

import cv2
import numpy as np

# Maps positions in the result to positions in the source, in PIL's order: x' = a x + b y + c, y' = d x + e y + f.
Matrix = tuple[float, float, float, float, float, float]
Color = tuple[int, int, int]

NEAREST, BILINEAR, BICUBIC = cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC
BLACK: Final = (0, 0, 0)
_NO_FRACTIONS: Final = np.empty(0, np.uint16)  # makes remap take whole pixels

# Added before OpenCV rounds, so that the result is truncated as by PIL.
_CUT_OFF: Final = -0.499
_SMOOTH: Final = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's ImageFilter.SMOOTH


def apply(pixels: np.ndarray, name: str, magnitude: float, interpolation: int, fill: Color) -> np.ndarray:
    """Apply the operation called `name`.

    Args:
      pixels: uint8 [H, W, C].
      name: a key of `GEOMETRIC` or `COLOR`.
      magnitude: magnitude in the units of that table.
      interpolation: sampling of a geometric operation: `NEAREST`, `BILINEAR` or `BICUBIC`.
      fill: colour outside of the image, for a geometric operation.

    Returns:
      uint8 [H, W, C].
    """
    if name in GEOMETRIC:
        height, width = pixels.shape[:2]
        return affine(pixels, GEOMETRIC[name](magnitude, width, height), interpolation, fill)
    return COLOR[name](pixels, magnitude)


def affine(pixels: np.ndarray, matrix: Matrix, interpolation: int = NEAREST, fill: Color = BLACK) -> np.ndarray:
    """Apply PIL's `Image.transform(size, AFFINE, matrix)`."""
    height, width, channels = pixels.shape
    value = fill if channels == 3 else (luminance(fill),)
    if interpolation == NEAREST:
        places = _nearest(matrix, width, height)
        moved = cv2.remap(pixels, places, _NO_FRACTIONS, NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=value)
        return moved.reshape(pixels.shape)
    a, b, c, d, e, f = _from_middle(matrix)
    # OpenCV's coordinates in the source also count from the centre of the first pixel.
    inverse = np.array([[a, b, c - 0.5], [d, e, f - 0.5]])
    flags = interpolation | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, inverse, (width, height), flags=flags, borderValue=value).reshape(pixels.shape)


def _nearest(matrix: Matrix, width: int, height: int) -> np.ndarray:
    """Return PIL's source pixel (x, y) of each pixel in the result, int16 [H, W, 2], in its 16-bit fixed point.

    `warpAffine` chooses differently if a point is halfway between two pixels, as on every fifth row of some shears.
    """
    a, b, c, d, e, f = (math.floor(v * 65536 + 0.5) for v in _from_middle(matrix))
    x, y = np.arange(width, dtype=np.int32), np.arange(height, dtype=np.int32)[:, None]
    places = np.empty((height, width, 2), np.int16)
    places[..., 0] = (c + b * y + a * x) >> 16
    places[..., 1] = (f + e * y + d * x) >> 16
    return places


def _from_middle(matrix: Matrix) -> Matrix:
    """Return the matrix for coordinates in the result that count from the centre of the first pixel."""
    a, b, c, d, e, f = matrix
    return a, b, c + (a + b) / 2, d, e, f + (d + e) / 2


def luminance(color: Color) -> int:
    """Return the ITU-R 601-2 grey value of a colour, as PIL computes it for mode "L"."""
    return (color[0] * 19595 + color[1] * 38470 + color[2] * 7471 + 0x8000) >> 16


def _rotation(degrees: float, width: int, height: int) -> Matrix:
    """Return the matrix of a counterclockwise rotation about the centre."""
    angle, x, y = -math.radians(degrees), width / 2, height / 2
    cos, sin = math.cos(angle), math.sin(angle)
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


# Magnitudes: slope of a shear about the upper left corner, pixels of a translation, degrees of a rotation.
GEOMETRIC: Final[dict[str, Callable[[float, int, int], Matrix]]] = {
    "ShearX": lambda slope, width, height: (1, slope, 0, 0, 1, 0),
    "ShearY": lambda slope, width, height: (1, 0, 0, slope, 1, 0),
    "TranslateX": lambda shift, width, height: (1, 0, -shift, 0, 1, 0),
    "TranslateY": lambda shift, width, height: (1, 0, 0, 0, 1, -shift),
    "Rotate": _rotation,
}


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black: factor 0 gives black, 1 the image, and more than 1 a brighter image."""
    return _look_up(pixels, _blend_table(0, factor))


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the image's mean grey value."""
    return _look_up(pixels, _blend_table(int(cv2.mean(_grey(pixels))[0] + 0.5), factor))


def _blend_table(grey: int, factor: float) -> np.ndarray:
    """Return PIL's `Image.blend` of a grey value with each of the 256 values, in single precision as in PIL."""
    values = np.arange(256, dtype=np.float32)
    return grey + np.float32(factor) * (values - grey)


def saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the greyscale image; a greyscale image is returned unchanged."""
    if pixels.shape[2] == 1:
        return pixels
    return cv2.addWeighted(pixels, factor, cv2.cvtColor(_grey(pixels), cv2.COLOR_GRAY2RGB), 1 - factor, _CUT_OFF)


def sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blend with a smoothed image, whose outermost pixels are not smoothed."""
    smooth = pixels.copy()
    inner = smooth[1:-1, 1:-1]
    inner[...] = cv2.filter2D(pixels, -1, _SMOOTH)[1:-1, 1:-1].reshape(inner.shape)
    return cv2.addWeighted(pixels, factor, smooth, 1 - factor, _CUT_OFF).reshape(pixels.shape)


def hue(pixels: np.ndarray, turn: float) -> np.ndarray:
    """Shift every pixel's hue by `turn`, in turns; a greyscale image is returned unchanged."""
    if pixels.shape[2] == 1:
        return pixels
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)  # a turn has 256 steps, and uint8 wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def posterize(pixels: np.ndarray, bits: float) -> np.ndarray:
    """Keep the `bits` highest bits of each value."""
    return pixels & np.uint8(256 - 2 ** (8 - min(int(bits), 8)))


def solarize(pixels: np.ndarray, threshold: float) -> np.ndarray:
    """Invert the values from `threshold` on."""
    values = np.arange(256)
    return _look_up(pixels, np.where(values < threshold, values, 255 - values))


def solarize_add(pixels: np.ndarray, addition: float) -> np.ndarray:
    """Add `addition` to the values below 128."""
    values = np.arange(256)
    return _look_up(pixels, np.where(values < 128, values + int(addition), values))


def invert(pixels: np.ndarray, magnitude: float = 0) -> np.ndarray:
    """Replace every value by 255 minus the value."""
    return 255 - pixels


def autocontrast(pixels: np.ndarray, magnitude: float = 0) -> np.ndarray:
    """Stretch each channel to the range 0 to 255."""
    tables, values = [], np.arange(256)
    for channel in cv2.split(pixels):
        low, high = cv2.minMaxLoc(channel)[:2]
        scale = 255 / (high - low) if high > low else 1
        tables.append(values * scale - low * scale if high > low else values)
    return _look_up(pixels, np.stack(tables, -1))


def equalize(pixels: np.ndarray, magnitude: float = 0) -> np.ndarray:
    """Equalise each channel's histogram with a table of 256 values."""
    tables, values = [], np.arange(256)
    for counts in _histograms(pixels):
        present = np.flatnonzero(counts)
        step = int(counts.sum() - counts[present[-1]]) // 255
        below = np.cumsum(counts) - counts
        tables.append((step // 2 + below) // step if step else values)
    return _look_up(pixels, np.stack(tables, -1))


def _identity(pixels: np.ndarray, magnitude: float) -> np.ndarray:
    return pixels


# Magnitudes: factor minus 1 for Brightness, Color, Contrast and Sharpness, kept bits for Posterize, threshold for
# Solarize, addition for SolarizeAdd; the others have none.
COLOR: Final[dict[str, Callable[[np.ndarray, float], np.ndarray]]] = {
    "Identity": _identity,
    "Brightness": lambda pixels, change: brightness(pixels, 1 + change),
    "Color": lambda pixels, change: saturation(pixels, 1 + change),
    "Contrast": lambda pixels, change: contrast(pixels, 1 + change),
    "Sharpness": lambda pixels, change: sharpness(pixels, 1 + change),
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Invert": invert,
}


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Return the greyscale image, uint8 [H, W]."""
    return pixels[..., 0] if pixels.shape[2] == 1 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _histograms(pixels: np.ndarray) -> list[np.ndarray]:
    """Return each channel's histogram, int64 [256]."""
    counts = (cv2.calcHist([pixels], [c], None, [256], [0, 256]) for c in range(pixels.shape[2]))
    return [count.ravel().astype(np.int64) for count in counts]


def _look_up(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Replace each value by its entry in `table` ([256] or [256, C]; entries are truncated)."""
    table = np.clip(table, 0, 255).astype(np.uint8)
    return cv2.LUT(pixels, table.reshape(1, 256, -1)).reshape(pixels.shape)
