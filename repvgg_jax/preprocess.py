"""Preprocessing of image files into network input: decoding, evaluation transform and normalisation.

The geometry matches torchvision's `Resize` and `CenterCrop` to the pixel, because the published accuracies were
measured with them. Images stay uint8 until `normalize`, which is intended to run on the device.
"""

import contextlib
import dataclasses
import functools
import io
import os
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from PIL import ExifTags, Image, ImageFile

from .errors import DataError, reason_of, system_errors

if TYPE_CHECKING:
    import jax

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

IMAGE_FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "PCX", "SGI", "QOI", "ICO"),
    "TGA",  # last, because its files have no signature
)
"""PIL's names of the image formats that are decoded, regardless of the file name. All others are refused: EPS, for
example, would start Ghostscript."""

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".webp"),
    *(".avif", ".avifs", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".pcx", ".sgi", ".rgb", ".rgba", ".bw", ".qoi", ".ico", ".tga", ".icb", ".vda", ".vst"),
)
"""File name suffixes of images, in lower case: PIL's suffixes for `IMAGE_FORMATS`, which include torchvision's. `.pfm`
is missing because its values have no fixed range."""


def in_grey(numbers: tuple[float, ...]) -> tuple[float]:
    """Return the mean or standard deviation for grey input: the average over the colour channels, as in timm."""
    return (sum(numbers) / len(numbers),)


_WHOLE_FROM = 320  # pixels: from this size on, the shorter side is not cropped for evaluation


def height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return an image size in pixels as (height, width). A single number means a square.

    Raises:
      ValueError: a size is not positive.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"image_size must be positive, not {image_size}")
    return height, width


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of images into network input; stored in the header of weight files.

    Attributes:
      image_size: height and width of the network's input in pixels.
      crop_fraction: fraction of the resized shorter side that the central crop keeps (0.875: 256 -> 224;
        1.0: the shorter side is resized to `image_size`).
      mean: mean of each channel (1 or 3), for pixel values in 0..1.
      std: standard deviation of each channel.

    Raises:
      ValueError: a field is out of range, or `mean` and `std` differ in length.
    """

    image_size: int = 224
    crop_fraction: float = 0.875
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must lie in (0, 1], got {self.crop_fraction}")
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise ValueError(f"mean and std need one number per channel (1 or 3), got {self.mean} and {self.std}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    @property
    def channels(self) -> int:
        """Number of channels: 1 (grey) or 3 (RGB)."""
        return len(self.mean)

    @property
    def resize_size(self) -> int:
        """Length of the shorter side before the central crop."""
        return round(self.image_size / self.crop_fraction)

    def at_size(self, image_size: int) -> "Preprocessing":
        """Return the preprocessing of the same net at another image size, by the authors' rule.

        At 320 pixels or more, the shorter side is resized to `image_size` (crop fraction 1); below that, to 8/7 of
        `image_size` (crop fraction 0.875, as in 224 of 256). If both sizes are below 320, the crop fraction is kept.
        """
        if image_size == self.image_size:
            return self
        crop = self.crop_fraction if self.image_size < _WHOLE_FROM else 0.875
        if image_size >= _WHOLE_FROM:
            crop = 1.0
        return dataclasses.replace(self, image_size=image_size, crop_fraction=crop)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Preprocessing":
        """Return the preprocessing for a dict from `to_dict`. Missing fields take their defaults; others are ignored.

        Raises:
          ValueError: a value is not valid for its field.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in fields.items() if name in names}
        try:
            for name in {"mean", "std"} & values.keys():
                values[name] = tuple(float(number) for number in values[name])
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a preprocessing description: {dict(fields)}") from error


# The transposition that turns an image upright, by EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: str | os.PathLike, channels: int = 3, *, exif: bool = False) -> Image.Image:
    """Read an image file and decode it with `decode_image`.

    Raises:
      DataError: the file cannot be read, or as `decode_image`.
    """
    with system_errors(DataError, f"{path}", ValueError):  # a name with a NUL
        data = Path(path).read_bytes()
    return decode_image(data, f"{path}", channels, exif=exif)


def decode_image(data: bytes, name: str, channels: int = 3, *, exif: bool = False) -> Image.Image:
    """Decode an image file as torchvision's `ImageFolder` does: drop alpha, ignore the EXIF orientation.

    One difference from torchvision: of 16-bit grey images, the high byte is kept, as PIL itself does for 16-bit colour;
    torchvision clips them to white. If there are several frames, the first one is decoded.

    Args:
      data: the file's bytes, in one of `IMAGE_FORMATS`.
      name: name of the image for errors and warnings.
      channels: 3 for RGB, 1 for grey.
      exif: rotate the image upright according to its EXIF orientation, as viewers do.

    Warns:
      Image.DecompressionBombWarning: the image has more than PIL's `MAX_IMAGE_PIXELS`.

    Returns:
      A loaded PIL image of mode "RGB" or "L".

    Raises:
      DataError: the bytes are not an image, are truncated, or are a decompression bomb.
    """
    mode = _pil_mode(channels)
    try:
        with _identify(data, name) as image:
            image.load()
            return to_mode(_upright(image) if exif else image, mode)
    except (MemoryError, DataError):
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{name}: refused as a decompression bomb ({error})") from error
    # On damaged bytes PIL's decoders raise almost anything: OSError, SyntaxError, struct.error, IndexError, …
    except Exception as error:
        raise DataError(f"{name}: cannot be read as an image ({_reason(data, error)})") from error


@functools.cache
def _openers() -> tuple[Any, ...]:
    """Return PIL's (factory, accept) pairs for the formats in `IMAGE_FORMATS` that it was built with."""
    Image.init()
    return tuple(Image.OPEN[kind] for kind in IMAGE_FORMATS if kind in Image.OPEN)


def _identify(data: bytes, name: str) -> ImageFile.ImageFile:
    """Open an image as `Image.open` does, but with its name in the warning about too many pixels.

    Raises:
      DataError: the image has more than twice `Image.MAX_IMAGE_PIXELS`.
      UnidentifiedImageError: the format is not in `IMAGE_FORMATS`.
    """
    for factory, accept in _openers():
        # After these errors, try the next format, as Image.open does.
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
            answer = accept is None or accept(data[:16])
            if not answer or isinstance(answer, str):  # a string means that PIL was built without the format
                continue
            image = factory(io.BytesIO(data), "")
            _check_pixels(image.size, name)
            return image
    raise Image.UnidentifiedImageError


def _check_pixels(size: tuple[int, int], name: str) -> None:
    limit, pixels = Image.MAX_IMAGE_PIXELS, size[0] * size[1]
    if limit is None or pixels <= limit:
        return
    if pixels > 2 * limit:
        raise DataError(f"{name}: refused as a decompression bomb ({size[0]}x{size[1]} pixels)")
    warnings.warn(
        f"{name}: {size[0]}x{size[1]} pixels, more than PIL's safety limit of {limit}",
        Image.DecompressionBombWarning,
        stacklevel=4,
    )


def _upright(image: Image.Image) -> Image.Image:
    # PIL's `exif_transpose` also rewrites the other tags, and raises if one of them is malformed.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data, on which PIL raises almost anything; the pixels are intact
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "no known image format"
    return reason_of(error)


def _pil_mode(channels: int) -> str:
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, got {channels}")
    return "L" if channels == 1 else "RGB"


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Return `image.convert(mode)` for mode "RGB" or "L"; 16-bit grey values are reduced to their high byte."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(wide >> 8, 0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        # The same colours as from P to RGB, but without PIL's warning about transparency stored as bytes.
        image = image.convert("RGBA")
    return image.convert(mode)


def eval_transform(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Apply torchvision's `Resize` of the shorter side (bilinear, antialiased) and `CenterCrop`.

    Args:
      image: PIL image of mode "RGB" or "L".
      preprocessing: provides `image_size` and `resize_size`.

    Returns:
      uint8 `[image_size, image_size, C]`, with C = 3 for "RGB" and 1 for "L".

    Raises:
      DataError: the image is so elongated that resizing it would exhaust memory.
    """
    width, height = image.size
    resized = _resized(width, height, preprocessing.resize_size)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and resized[0] * resized[1] > limit:
        raise DataError(f"an image of {width}x{height} pixels is too elongated to resize to {resized}")
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    # With crop_fraction <= 1, both sides are at least image_size, so torchvision's padding is never needed.
    size = preprocessing.image_size
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    return to_array(image.crop((left, top, left + size, top + size)))


def open_as_input(path: str | os.PathLike, preprocessing: Preprocessing, *, exif: bool = False) -> np.ndarray:
    """Read an image file and prepare it with `eval_transform`: uint8 `[image_size, image_size, C]`.

    Raises:
      DataError: as `open_image` and `eval_transform`; the message names the file.
    """
    image = open_image(path, preprocessing.channels, exif=exif)
    try:
        return eval_transform(image, preprocessing)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _resized(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Return the (width, height) whose shorter side is `shorter`; the longer one is rounded down, as in torchvision."""
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def to_array(image: Image.Image) -> np.ndarray:
    """Return a PIL image of mode "RGB" or "L" as uint8 `[H, W, C]`."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


@overload
def normalize(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray: ...
@overload
def normalize(images: "jax.Array", preprocessing: Preprocessing) -> "jax.Array": ...
def normalize(images: Any, preprocessing: Preprocessing) -> Any:
    """Return `(images / 255 - mean) / std`, in float32.

    Args:
      images: uint8 `[..., C]`; a NumPy or JAX array, also under `jit`.
      preprocessing: provides mean and std, C numbers each.

    Returns:
      float32 `[..., C]`, the same kind of array.

    Raises:
      ValueError: the last axis is not of length C.
    """
    if images.shape[-1] != preprocessing.channels:
        raise ValueError(f"images have {images.shape[-1]} channels, preprocessing {preprocessing.channels}")
    last = (1,) * (images.ndim - 1) + (-1,)
    mean = np.asarray(preprocessing.mean, np.float32).reshape(last)
    std = np.asarray(preprocessing.std, np.float32).reshape(last)
    return (images.astype(np.float32) / np.float32(255) - mean) / std
