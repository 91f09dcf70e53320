"""JPEG files, decoded by libjpeg-turbo (simplejpeg) only as far as a training crop needs them.

Rows below the crop are not decoded, and an image much larger than the network's input is decoded at 1/2, 1/4 or 1/8 of
its size. Decoding and resizing release Python's lock, so one thread per core keeps all cores busy. Progressive files
are decoded completely. Files with arithmetic coding or CMYK, and damaged or truncated files, are left to PIL, which
returns the image or raises its usual error.
"""

import math
import struct
from typing import Final, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from repvgg_jax.preprocess import decode_image

from .resize import resize

_START, _END = b"\xff\xd8", b"\xff\xd9"
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_BEFORE_FRAME: Final = frozenset({0xC4, 0xCC, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})  # tables, comments, APPn
_FRAME: Final = struct.Struct(">BHHB")
_REDUCTIONS: Final = (8, 4, 2)


class Jpeg(NamedTuple):
    """A JPEG file of which only the header has been read.

    Attributes:
      data: content of the file.
      name: name of the file in errors.
      channels: 3 to decode to RGB, 1 to decode to grey.
      width, height: size of the image.
      height_offset: position of the height in `data`.
      row_height: number of rows that are decoded together; 0 if only the whole image can be decoded.
    """

    data: bytes
    name: str
    channels: int
    width: int
    height: int
    height_offset: int
    row_height: int

    def to_pil(self) -> Image.Image:
        """Decode the whole image with PIL.

        Raises:
          DataError: the image cannot be decoded.
        """
        return decode_image(self.data, self.name, self.channels)

    def resized_crop(self, box: tuple[int, int, int, int], size: int, mirrored: bool) -> np.ndarray | None:
        """Decode `box` (left, top, width, height) and resize it with `resize`, to uint8 [size, size, channels].

        Return None if the decoder fails, and PIL has to decode the file.
        """
        reduction = next((r for r in _REDUCTIONS if min(box[2:]) >= r * size), 1)
        pixels = self._decode(box[1] + box[3], reduction)
        if pixels is None:
            return None
        left, top, width, height = (length / reduction for length in box)
        # Pixels outside of the crop do not count. In a reduced image, the crop may begin and end inside a pixel.
        x, y = int(left), int(top)
        covered = pixels[y : math.ceil(top + height), x : math.ceil(left + width)]
        return resize(covered, (left - x, top - y, width, height), size, mirrored=mirrored)

    def _decode(self, bottom: int, reduction: int) -> np.ndarray | None:
        """Decode to uint8 [at least bottom / reduction, width / reduction, channels]; None if PIL has to decode it."""
        data: bytes | bytearray = self.data
        height = -(-bottom // self.row_height) * self.row_height if self.row_height else self.height
        whole = height >= self.height
        if whole:
            height = self.height
        else:
            # The decoder stops at the height in the header.
            data = bytearray(data)
            data[self.height_offset : self.height_offset + 2] = height.to_bytes(2, "big")
        expected = (-(-height // reduction), -(-self.width // reduction), self.channels)
        try:
            pixels = simplejpeg.decode_jpeg(
                data,
                "RGB" if self.channels == 3 else "GRAY",
                # Chroma pixels are repeated, not interpolated, which changes a third of a grey level on average.
                fastupsample=True,
                min_height=expected[0] if reduction > 1 else 0,
                min_width=expected[1] if reduction > 1 else 0,
                # The bytes after a shortened image are an error in strict mode. PIL tolerates most other errors, too.
                strict=whole,
            )
        except ValueError:
            return None
        return pixels if pixels.shape == expected else None


def open_jpeg(data: bytes, name: str, channels: int) -> Jpeg | None:
    """Return `data` as a `Jpeg`, or None if only PIL can decode it.

    PIL also gets files without a JPEG's end marker, which were cut short, and refuses them.
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
    """Read a frame header: marker (2 bytes), length (2), precision (1), height (2), width (2), components (3 each)."""
    precision, height, width, components = _FRAME.unpack_from(data, position + 4)
    limit = Image.MAX_IMAGE_PIXELS  # beyond it, PIL warns or refuses
    if precision != 8 or components not in (1, 3) or not width or not height or (limit and width * height > limit):
        return None
    sampling = max(data[position + 11 + 3 * index] & 15 for index in range(components))
    row_height = 0 if data[position + 1] == _PROGRESSIVE else 8 * sampling
    return Jpeg(data, name, channels, width, height, position + 5, row_height)
