"""Operations on the pixels of one image, uint8 [H, W, C] with 1 or 3 channels: PIL's results, at OpenCV's speed.

Every operation is (pixels, magnitude) -> pixels, and leaves its argument alone. Those of the AutoAugment and
RandAugment papers are in the tables `GEOMETRIC` and `COLOR`, under the papers' names.
"""

import math
from collections.abc import Callable
from typing import Final

import cv2
import numpy as np

# Places in the source for places in the result, in PIL's order: x' = a x + b y + c, y' = d x + e y + f.
Matrix = tuple[float, float, float, float, float, float]
Color = tuple[int, int, int]

NEAREST, BILINEAR, BICUBIC = cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC
BLACK: Final = (0, 0, 0)
_NO_FRACTIONS: Final = np.empty(0, np.uint16)  # of pixels, for remap

# Added before OpenCV rounds, it cuts fractions off as PIL does.
_CUT_OFF: Final = -0.499
_SMOOTH: Final = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's ImageFilter.SMOOTH


def apply(pixels: np.ndarray, name: str, magnitude: float, interpolation: int, fill: Color) -> np.ndarray:
    """The operation called `name`.

    Args:
      pixels: uint8 [H, W, C].
      name: a key of `GEOMETRIC` or `COLOR`.
      magnitude: see there.
      interpolation, fill: how a geometric operation samples, and the colour of what comes from outside.

    Returns:
      uint8 [H, W, C].
    """
    if name in GEOMETRIC:
        height, width = pixels.shape[:2]
        return affine(pixels, GEOMETRIC[name](magnitude, width, height), interpolation, fill)
    return COLOR[name](pixels, magnitude)


def affine(pixels: np.ndarray, matrix: Matrix, interpolation: int = NEAREST, fill: Color = BLACK) -> np.ndarray:
    """PIL's `Image.transform(size, AFFINE, matrix)`."""
    height, width, channels = pixels.shape
    value = fill if channels == 3 else (luminance(fill),)
    if interpolation == NEAREST:
        places = _nearest(matrix, width, height)
        moved = cv2.remap(pixels, places, _NO_FRACTIONS, NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=value)
        return moved.reshape(pixels.shape)
    a, b, c, d, e, f = _from_middle(matrix)
    # OpenCV's coordinates in the source, too, count from there.
    inverse = np.array([[a, b, c - 0.5], [d, e, f - 0.5]])
    flags = interpolation | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, inverse, (width, height), flags=flags, borderValue=value).reshape(pixels.shape)


def _nearest(matrix: Matrix, width: int, height: int) -> np.ndarray:
    """The pixel (x, y) that PIL takes for each in the result, int16 [H, W, 2], in its arithmetic of 1/65536 pixel.

    `warpAffine` decides otherwise where a point lies between two pixels, as every fifth row's do in some shears.
    """
    a, b, c, d, e, f = (math.floor(v * 65536 + 0.5) for v in _from_middle(matrix))
    x, y = np.arange(width, dtype=np.int32), np.arange(height, dtype=np.int32)[:, None]
    places = np.empty((height, width, 2), np.int16)
    places[..., 0] = (c + b * y + a * x) >> 16
    places[..., 1] = (f + e * y + d * x) >> 16
    return places


def _from_middle(matrix: Matrix) -> Matrix:
    """The matrix for coordinates in the result that count from the middle of the first pixel."""
    a, b, c, d, e, f = matrix
    return a, b, c + (a + b) / 2, d, e, f + (d + e) / 2


def luminance(color: Color) -> int:
    """ITU-R 601-2 grey of a colour, as PIL converts to "L"."""
    return (color[0] * 19595 + color[1] * 38470 + color[2] * 7471 + 0x8000) >> 16


def _rotation(degrees: float, width: int, height: int) -> Matrix:
    """Counterclockwise about the centre."""
    angle, x, y = -math.radians(degrees), width / 2, height / 2
    cos, sin = math.cos(angle), math.sin(angle)
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


# Shears by a slope about the upper left corner, translations by pixels, rotation by degrees.
GEOMETRIC: Final[dict[str, Callable[[float, int, int], Matrix]]] = {
    "ShearX": lambda slope, width, height: (1, slope, 0, 0, 1, 0),
    "ShearY": lambda slope, width, height: (1, 0, 0, slope, 1, 0),
    "TranslateX": lambda shift, width, height: (1, 0, -shift, 0, 1, 0),
    "TranslateY": lambda shift, width, height: (1, 0, 0, 0, 1, -shift),
    "Rotate": _rotation,
}


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """A blend with black: 0 gives black, 1 the image, more than 1 a brighter one."""
    return _look_up(pixels, _blend_table(0, factor))


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """A blend with the image's mean grey."""
    return _look_up(pixels, _blend_table(int(cv2.mean(_grey(pixels))[0] + 0.5), factor))


def _blend_table(grey: int, factor: float) -> np.ndarray:
    """PIL's `Image.blend` of one grey with every value, in its single precision."""
    values = np.arange(256, dtype=np.float32)
    return grey + np.float32(factor) * (values - grey)


def saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    """A blend with the grey image; a grey image stays as it is."""
    if pixels.shape[2] == 1:
        return pixels
    return cv2.addWeighted(pixels, factor, cv2.cvtColor(_grey(pixels), cv2.COLOR_GRAY2RGB), 1 - factor, _CUT_OFF)


def sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """A blend with a smoothed image, whose outermost pixels are not smoothed."""
    smooth = pixels.copy()
    inner = smooth[1:-1, 1:-1]
    inner[...] = cv2.filter2D(pixels, -1, _SMOOTH)[1:-1, 1:-1].reshape(inner.shape)
    return cv2.addWeighted(pixels, factor, smooth, 1 - factor, _CUT_OFF).reshape(pixels.shape)


def hue(pixels: np.ndarray, turn: float) -> np.ndarray:
    """Turn every pixel's hue by a share of the circle; a grey image stays as it is."""
    if pixels.shape[2] == 1:
        return pixels
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)  # a circle has 256 steps, and uint8 wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def posterize(pixels: np.ndarray, bits: float) -> np.ndarray:
    """Keep that many of each value's 8 bits, the highest."""
    return pixels & np.uint8(256 - 2 ** (8 - min(int(bits), 8)))


def solarize(pixels: np.ndarray, threshold: float) -> np.ndarray:
    """Invert the values from `threshold` on."""
    values = np.arange(256)
    return _look_up(pixels, np.where(values < threshold, values, 255 - values))


def solarize_add(pixels: np.ndarray, addition: float) -> np.ndarray:
    """Add to the values below 128."""
    values = np.arange(256)
    return _look_up(pixels, np.where(values < 128, values + int(addition), values))


def invert(pixels: np.ndarray, magnitude: float = 0) -> np.ndarray:
    """255 minus every value."""
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
    """Spread each channel's values so that their histogram is as flat as a table of 256 can make it."""
    tables, values = [], np.arange(256)
    for counts in _histograms(pixels):
        present = np.flatnonzero(counts)
        step = int(counts.sum() - counts[present[-1]]) // 255
        below = np.cumsum(counts) - counts
        tables.append((step // 2 + below) // step if step else values)
    return _look_up(pixels, np.stack(tables, -1))


def _identity(pixels: np.ndarray, magnitude: float) -> np.ndarray:
    return pixels


# Brightness, Color, Contrast and Sharpness by the factor minus 1, Posterize by the bits kept, Solarize by the
# threshold, SolarizeAdd by the addition; the others have no magnitude.
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
    """uint8 [H, W]."""
    return pixels[..., 0] if pixels.shape[2] == 1 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _histograms(pixels: np.ndarray) -> list[np.ndarray]:
    """How often each value occurs, int64 [256], for each channel."""
    counts = (cv2.calcHist([pixels], [c], None, [256], [0, 256]) for c in range(pixels.shape[2]))
    return [count.ravel().astype(np.int64) for count in counts]


def _look_up(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Replace each value by its entry in `table` ([256] or [256, C]; fractions are cut off)."""
    table = np.clip(table, 0, 255).astype(np.uint8)
    return cv2.LUT(pixels, table.reshape(1, 256, -1)).reshape(pixels.shape)
