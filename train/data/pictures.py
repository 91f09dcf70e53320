"""Inputs of a training transform: PIL images, or files of which only the needed part is decoded.

If simplejpeg is installed, `jpeg.py` decodes JPEG files faster; PIL decodes everything else.
"""

from typing import TYPE_CHECKING, Union

import numpy as np
from PIL import Image

from repvgg_jax.preprocess import decode_image, to_array

try:
    from . import jpeg
except ImportError:
    jpeg = None

if TYPE_CHECKING:
    from .jpeg import Jpeg

CropBox = tuple[int, int, int, int]  # left, top, width, height, whole pixels
Picture = Union[Image.Image, "Jpeg"]


def open_picture(data: bytes, name: str, channels: int) -> Picture:
    """Return an image file (its bytes) as a picture, decoded only if necessary.

    Args:
      data: content of the file.
      name: name of the image in errors.
      channels: 3 for RGB, 1 for grey.

    Raises:
      DataError: as from `decode_image`. A damaged file may raise it later, when it is decoded.
    """
    undecoded = jpeg.open_jpeg(data, name, channels) if jpeg else None
    return undecoded or decode_image(data, name, channels)


def to_pil(picture: Picture) -> Image.Image:
    """Return the whole picture as a PIL image of mode "RGB" or "L".

    Raises:
      DataError: the picture cannot be decoded.
    """
    return picture if isinstance(picture, Image.Image) else picture.to_pil()


def resized_crop(picture: Picture, box: CropBox, size: int, *, mirrored: bool = False) -> np.ndarray:
    """Apply torchvision's `resized_crop` (bilinear, antialiased), and its `hflip` if `mirrored`.

    The result is uint8 [size, size, C]. It is exact for a PIL image and nearly so for a JPEG file (see `jpeg.py`).

    Raises:
      DataError: the picture cannot be decoded.
    """
    if not isinstance(picture, Image.Image):
        pixels = picture.resized_crop(box, size, mirrored)
        if pixels is not None:
            return pixels
        picture = picture.to_pil()
    left, top, width, height = box
    # Cropped first, like torchvision: `resize(box=...)` would filter across the box's edges and mix in pixels from
    # outside the crop.
    crop = picture.crop((left, top, left + width, top + height))
    pixels = to_array(crop.resize((size, size), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels
