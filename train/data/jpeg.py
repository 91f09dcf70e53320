"""JPEG files, decoded only as far as a training crop needs them, by libjpeg-turbo (simplejpeg).

Of a file's bytes those below the crop are not decoded, and an image much larger than the network's input is
decoded at 1/2, 1/4 or 1/8 of its size. Decoding and resizing happen outside Python's lock, so that one thread per
core keeps all cores busy. What this module does not know (progressive files are decoded whole; arithmetic coding,
CMYK, damaged or truncated files are left alone) goes to PIL, which gives the image or the error it always gave.
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

    def resized_crop(self, box: tuple[int, int, int, int], size: int, mirrored: bool) -> np.ndarray | None:
        """What is in `box` (left, top, width, height), as `resize` has it: uint8 [size, size, channels].

        None if the decoder gives up, and PIL has to look at the file.
        """
        reduction = next((r for r in _REDUCTIONS if min(box[2:]) >= r * size), 1)
        pixels = self._decode(box[1] + box[3], reduction)
        if pixels is None:
            return None
        left, top, width, height = (length / reduction for length in box)
        # Pixels beside the crop do not count; of a smaller image, it may begin and end inside a pixel.
        x, y = int(left), int(top)
        covered = pixels[y : math.ceil(top + height), x : math.ceil(left + width)]
        return resize(covered, (left - x, top - y, width, height), size, mirrored=mirrored)

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
