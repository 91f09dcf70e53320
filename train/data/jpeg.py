"""JPEG files, decoded only as far as a training crop needs them, by libjpeg-turbo (simplejpeg) and OpenCV.

Of a file's bytes those below the crop are not decoded, and an image much larger than the network's input is
decoded at 1/2, 1/4 or 1/8 of its size. Both libraries work outside Python's lock, so that one thread per core
keeps all cores busy. What this module does not know (progressive files are decoded whole; arithmetic coding,
CMYK, damaged or truncated files are left alone) goes to PIL, which gives the image or the error it always gave.
"""

import math
import struct
from typing import Final, NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from repvgg_jax.preprocess import decode_image

# `Batches` keeps every core busy with a thread of its own; OpenCV's threads would only get in their way.
cv2.setNumThreads(0)

_START, _END = b"\xff\xd8", b"\xff\xd9"
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_BEFORE_FRAME: Final = frozenset({0xC4, 0xCC, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})  # tables, comments, APPn
_FRAME: Final = struct.Struct(">BHHB")
_REDUCTIONS: Final = (8, 4, 2)
# Less smoothing than this (a scale of 1.22) changes the result by less than its rounding does.
_LEAST_VARIANCE: Final = 0.08


class Jpeg(NamedTuple):
    """A JPEG file whose header has been read and whose pixels have not.

    Attributes:
      data: the file.
      name: what to call it in an error.
      channels: 3 to decode to RGB, 1 to grey.
      width, height: the image's size.
      height_offset: where in `data` the height is written.
      row_height: rows that are decoded together, or 0 if only the whole image can be decoded.
    """

    data: bytes
    name: str
    channels: int
    width: int
    height: int
    height_offset: int
    row_height: int

    def to_pil(self) -> Image.Image:
        """The whole image, decoded by PIL.

        Raises:
          DataError: it cannot be decoded.
        """
        return decode_image(self.data, self.name, self.channels)

    def resized_crop(self, box: tuple[int, int, int, int], size: int) -> np.ndarray | None:
        """What is in `box` (left, top, width, height), resized by `resize` to uint8 [size, size, channels].

        None if the decoder gives up, and PIL has to look at the file.
        """
        left, top, width, height = box
        reduction = next((r for r in _REDUCTIONS if min(width, height) >= r * size), 1)
        pixels = self._decode(top + height, reduction)
        if pixels is None:
            return None
        if reduction == 1:
            return resize(pixels[top : top + height, left : left + width], size)
        return _resize_reduced(pixels, box, size, reduction)

    def _decode(self, bottom: int, reduction: int) -> np.ndarray | None:
        """uint8 [at least bottom / reduction, width / reduction, channels]; None if PIL has to look at it."""
        data: bytes | bytearray = self.data
        height = -(-bottom // self.row_height) * self.row_height if self.row_height else self.height
        whole = height >= self.height
        if whole:
            height = self.height
        else:
            # The decoder stops where the header says that the image ends.
            data = bytearray(data)
            data[self.height_offset : self.height_offset + 2] = height.to_bytes(2, "big")
        expected = (-(-height // reduction), -(-self.width // reduction), self.channels)
        try:
            pixels = simplejpeg.decode_jpeg(
                data,
                "RGB" if self.channels == 3 else "GRAY",
                # Chroma pixels are repeated, not interpolated: that changes a third of a grey level on average.
                fastupsample=True,
                min_height=expected[0] if reduction > 1 else 0,
                min_width=expected[1] if reduction > 1 else 0,
                # The bytes that follow a shortened image are an irregularity. Of others, PIL too forgives most.
                strict=whole,
            )
        except ValueError:
            return None
        return pixels if pixels.shape == expected else None


def open_jpeg(data: bytes, name: str, channels: int) -> Jpeg | None:
    """`data` as a `Jpeg`, or None where only PIL will do.

    A file must end as a JPEG does: one that was cut short is PIL's to refuse.
    """
    if not (data.startswith(_START) and data.endswith(_END)):
        return None
    position = len(_START)
    while position + 19 < len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in (_BASELINE, _EXTENDED, _PROGRESSIVE):
            return _from_frame(data, name, channels, position)
        if marker not in _BEFORE_FRAME:
            return None
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def _from_frame(data: bytes, name: str, channels: int, position: int) -> Jpeg | None:
    """From the frame header: marker (2 bytes), length (2), precision, height (2), width (2), components, each 3."""
    precision, height, width, components = _FRAME.unpack_from(data, position + 4)
    limit = Image.MAX_IMAGE_PIXELS  # beyond it, PIL warns or refuses
    if precision != 8 or components not in (1, 3) or not width or not height or (limit and width * height > limit):
        return None
    sampling = max(data[position + 11 + 3 * index] & 15 for index in range(components))
    row_height = 0 if data[position + 1] == _PROGRESSIVE else 8 * sampling
    return Jpeg(data, name, channels, width, height, position + 5, row_height)


def flip(pixels: np.ndarray) -> np.ndarray:
    """Mirror uint8 [H, W, C] left to right."""
    return _with_channels(cv2.flip(pixels, 1))


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 [H, W, C] to [size, size, C]: bilinear, and antialiased as PIL and torchvision do it.

    PIL widens the triangle that weighs the source pixels with the scale. OpenCV's never widens, so the source
    is smoothed first, by as much as gives the two together the variance of PIL's triangle.
    """
    height, width = pixels.shape[:2]
    pixels = _smooth(pixels, width / size, height / size)
    return _with_channels(cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR))


def _resize_reduced(pixels: np.ndarray, box: tuple[int, int, int, int], size: int, reduction: int) -> np.ndarray:
    """`resize` of the part of a reduced image that `box` (in the pixels of the whole image) covers."""
    left, top, width, height = (length / reduction for length in box)
    # The box may begin and end inside a pixel: sample where `resize` would, from the pixels it touches.
    x, y = int(left), int(top)
    covered = pixels[y : math.ceil(top + height), x : math.ceil(left + width)]
    unit_x, unit_y = width / size, height / size
    matrix = np.array([[unit_x, 0, left - x + (unit_x - 1) / 2], [0, unit_y, top - y + (unit_y - 1) / 2]])
    return _with_channels(
        cv2.warpAffine(
            _smooth(covered, unit_x, unit_y),
            matrix,
            (size, size),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
    )


def _smooth(pixels: np.ndarray, scale_x: float, scale_y: float) -> np.ndarray:
    """Smooth what linear interpolation at so many source pixels a step would alias.

    A triangle of half-width n, sampled at the pixels, has variance (n^2 - 1) / 6.
    """
    variances = (scale_x**2 - 1) / 6, (scale_y**2 - 1) / 6
    if max(variances) < _LEAST_VARIANCE:
        return pixels
    # Three taps, the fastest, can do variances below 2/3 (each neighbour's weight is half of it): a scale of 2.23.
    taps = 3 if max(variances) < 0.666 else 2 * math.ceil(2 * math.sqrt(max(variances))) + 1
    kernel_x, kernel_y = (_kernel(variance, taps) for variance in variances)
    return cv2.sepFilter2D(pixels, -1, kernel_x, kernel_y, borderType=cv2.BORDER_REPLICATE)


def _kernel(variance: float, taps: int) -> np.ndarray:
    """Weights of that variance: three exactly, more as a Gaussian."""
    variance = max(variance, 0.0)
    if taps == 3:
        return np.array([variance / 2, 1 - variance, variance / 2], np.float32)
    return cv2.getGaussianKernel(taps, max(math.sqrt(variance), 1e-2)).astype(np.float32)


def _with_channels(pixels: np.ndarray) -> np.ndarray:
    """OpenCV drops an axis of one channel; put it back."""
    return pixels[..., None] if pixels.ndim == 2 else pixels
