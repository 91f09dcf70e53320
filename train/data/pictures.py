"""What a training transform takes: a PIL image, or a file of which only what is needed gets decoded.

The fast road for JPEG files (`jpeg.py`) is taken where simplejpeg is installed. PIL goes everywhere.
"""

from typing import Protocol

import numpy as np
from PIL import Image

from repvgg_jax.preprocess import decode_image, to_array

try:
    from . import jpeg
except ImportError:
    jpeg = None

CropBox = tuple[int, int, int, int]  # left, top, width, height, whole pixels


class Undecoded(Protocol):
    """An image file whose size is known and whose pixels are not."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    def to_pil(self) -> Image.Image:
        """The whole image, decoded by PIL; raises DataError."""
        ...

    def resized_crop(self, box: CropBox, size: int, mirrored: bool) -> np.ndarray | None:
        """As the function of that name; None if the image has to go through PIL."""
        ...


Picture = Image.Image | Undecoded


def open_picture(data: bytes, name: str, channels: int) -> Picture:
    """An image file (its bytes), decoded only if it has to be.

    Args:
      data, name, channels: as for `decode_image`.

    Raises:
      DataError: as from `decode_image`. A damaged file may also raise it later, when it is decoded.
    """
    undecoded = jpeg.open_jpeg(data, name, channels) if jpeg else None
    return undecoded or decode_image(data, name, channels)


def to_pil(picture: Picture) -> Image.Image:
    """The whole picture as PIL decodes it, of mode "RGB" or "L".

    Raises:
      DataError: it cannot be decoded.
    """
    return picture if isinstance(picture, Image.Image) else picture.to_pil()


def resized_crop(picture: Picture, box: CropBox, size: int, *, mirrored: bool = False) -> np.ndarray:
    """torchvision's `resized_crop` (bilinear, antialiased), uint8 [size, size, C], then perhaps its `hflip`.

    To the pixel for a PIL image; for a JPEG file nearly so (`jpeg.py`).

    Raises:
      DataError: the picture cannot be decoded.
    """
    if not isinstance(picture, Image.Image):
        pixels = picture.resized_crop(box, size, mirrored)
        if pixels is not None:
            return pixels
        picture = picture.to_pil()
    left, top, width, height = box
    # Cropped first, as torchvision does: `resize(box=...)` would filter across the box's edges and mix in
    # pixels from outside the crop.
    crop = picture.crop((left, top, left + width, top + height))
    pixels = to_array(crop.resize((size, size), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels
