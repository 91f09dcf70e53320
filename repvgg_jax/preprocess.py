"""From image files to network input: decoding, the evaluation transform, normalisation.

The geometry is torchvision's (`Resize`, `CenterCrop`), to the pixel, because the published accuracies were
measured with it. Images stay uint8 until `normalize`, which is meant to run on the device.
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
    "TGA",  # the last, because its files begin with nothing that tells them from others
)
"""PIL's names of the image formats that are decoded, whatever a file is called. Others are not: EPS, for one, would
start Ghostscript."""

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".webp"),
    *(".avif", ".avifs", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".pcx", ".sgi", ".rgb", ".rgba", ".bw", ".qoi", ".ico", ".tga", ".icb", ".vda", ".vst"),
)
"""What the names of image files end with, in lower case: PIL's suffixes of `IMAGE_FORMATS`, torchvision's among them.
Without `.pfm`, whose numbers have no fixed range."""


def in_grey(numbers: tuple[float, ...]) -> tuple[float]:
    """Return the mean or deviation of grey input: the mean over the colours, as timm has it."""
    return (sum(numbers) / len(numbers),)


_WHOLE_FROM = 320  # pixels: nothing is cropped off the shorter side of images evaluated at this size or a larger one


def height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return what one number, a square's side, or two say of an image's size, pixels.

    Raises:
      ValueError: a size that is not positive.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"image_size must be positive, not {image_size}")
    return height, width


@dataclass(frozen=True)
class Preprocessing:
    """What turns an image into network input; stored in the header of weight files.

    Attributes:
      image_size: height and width of the network's input.
      crop_fraction: share of the resized shorter side that the central crop keeps (0.875: 256 -> 224;
        1.0: the shorter side becomes `image_size` itself).
      mean: one number per channel, for pixel values in 0..1. Their count is the number of channels.
      std: as many.

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
        """1 (grey) or 3 (RGB)."""
        return len(self.mean)

    @property
    def resize_size(self) -> int:
        """Length of the shorter side before the central crop."""
        return round(self.image_size / self.crop_fraction)

    def at_size(self, image_size: int) -> "Preprocessing":
        """Return the preprocessing of the same net at another size, by the authors' rule.

        From 320 pixels on the shorter side is resized to `image_size` itself (crop fraction 1), below that to 8/7 of
        it (0.875, as 256 is to 224). A net with a crop of its own below 320 keeps it below 320.
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
        """Inverse of `to_dict`; absent fields take their defaults, unknown ones are ignored.

        Raises:
          ValueError: a value does not fit its field.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in fields.items() if name in known}
        try:
            for name in {"mean", "std"} & values.keys():
                values[name] = tuple(float(number) for number in values[name])
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a preprocessing description: {dict(fields)}") from error


# EXIF's numbers of how the stored image is turned, and what turns it back.
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
    """Read and decode an image file, as `decode_image` does.

    Raises:
      DataError: it cannot be read, or as `decode_image`.
    """
    with system_errors(DataError, f"{path}", ValueError):  # a name with a NUL
        data = Path(path).read_bytes()
    return decode_image(data, f"{path}", channels, exif=exif)


def decode_image(data: bytes, name: str, channels: int = 3, *, exif: bool = False) -> Image.Image:
    """Decode an image file as torchvision's `ImageFolder` does: alpha is dropped, EXIF orientation ignored.

    Unlike torchvision, which clips 16-bit grey images to white, keeps their high byte (as PIL itself does
    for 16-bit colour). Of several frames it decodes the first.

    Args:
      data: the file's bytes, in one of `IMAGE_FORMATS`.
      name: what to call the image in an error or a warning.
      channels: 3 for RGB, 1 for grey.
      exif: turn the image upright as its EXIF orientation says, as viewers do.

    Warns:
      Image.DecompressionBombWarning: the image has more than PIL's `MAX_IMAGE_PIXELS`.

    Returns:
      A loaded PIL image of mode "RGB" or "L".

    Raises:
      DataError: the bytes are not an image, are cut short, or unpack to a decompression bomb.
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
    # On damaged bytes PIL's decoders raise nearly anything: OSError, SyntaxError, struct.error, IndexError, …
    except Exception as error:
        raise DataError(f"{name}: cannot be read as an image ({_reason(data, error)})") from error


@functools.cache
def _openers() -> tuple[Any, ...]:
    """Return PIL's (factory, accept) of each of `IMAGE_FORMATS` that it was built with."""
    Image.init()
    return tuple(Image.OPEN[kind] for kind in IMAGE_FORMATS if kind in Image.OPEN)


def _identify(data: bytes, name: str) -> ImageFile.ImageFile:
    """Do what `Image.open` does, which cannot say the image's name when it warns of many pixels.

    Raises:
      DataError: it has more than twice `Image.MAX_IMAGE_PIXELS`.
      UnidentifiedImageError: it is in none of `IMAGE_FORMATS`.
    """
    for factory, accept in _openers():
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):  # as Image.open: try the next
            answer = accept is None or accept(data[:16])
            if not answer or isinstance(answer, str):  # a text says why PIL was built without the format
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
    # Not PIL's `exif_transpose`, which also writes the other tags back, and raises where one of them is odd.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data, on which PIL raises nearly anything; the pixels are whole
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
    """Return `image.convert(mode)` for mode "RGB" or "L", except that wide grey values lose their low byte."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(wide >> 8, 0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        # The same colours as P -> RGB, without PIL's warning about transparency given as bytes.
        image = image.convert("RGBA")
    return image.convert(mode)


def eval_transform(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Do torchvision's `Resize` of the shorter side (bilinear, antialiased) and `CenterCrop`.

    Args:
      image: PIL image of mode "RGB" or "L".
      preprocessing: gives `image_size` and `resize_size`.

    Returns:
      uint8 [image_size, image_size, C], C as the image's mode has it.

    Raises:
      DataError: the image is so elongated that resizing it would fill the memory.
    """
    width, height = image.size
    resized = _resized(width, height, preprocessing.resize_size)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and resized[0] * resized[1] > limit:
        raise DataError(f"an image of {width}x{height} pixels is too elongated to resize to {resized}")
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    # crop_fraction <= 1 leaves both sides at least image_size: torchvision's padding never comes into play.
    size = preprocessing.image_size
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    return to_array(image.crop((left, top, left + size, top + size)))


def open_as_input(path: str | os.PathLike, preprocessing: Preprocessing, *, exif: bool = False) -> np.ndarray:
    """Read an image file as `eval_transform` prepares it: uint8 [image_size, image_size, C].

    Raises:
      DataError: as `open_image` and `eval_transform`; the text names the file.
    """
    image = open_image(path, preprocessing.channels, exif=exif)
    try:
        return eval_transform(image, preprocessing)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _resized(width: int, height: int, shorter: int) -> tuple[int, int]:
    """Return (width, height) once the shorter side is `shorter`; the longer one truncates, as torchvision's does."""
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def to_array(image: Image.Image) -> np.ndarray:
    """Return uint8 [H, W, C] of a PIL image of mode "RGB" or "L"."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


@overload
def normalize(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray: ...
@overload
def normalize(images: "jax.Array", preprocessing: Preprocessing) -> "jax.Array": ...
def normalize(images: Any, preprocessing: Preprocessing) -> Any:
    """Return `(images / 255 - mean) / std`, in float32.

    Args:
      images: uint8 [..., C]; a NumPy or a JAX array, also under `jit`.
      preprocessing: gives mean and std, C numbers each.

    Returns:
      float32 [..., C], of the same kind of array.

    Raises:
      ValueError: the last axis is not C.
    """
    if images.shape[-1] != preprocessing.channels:
        raise ValueError(f"images have {images.shape[-1]} channels, preprocessing {preprocessing.channels}")
    last = (1,) * (images.ndim - 1) + (-1,)
    mean = np.asarray(preprocessing.mean, np.float32).reshape(last)
    std = np.asarray(preprocessing.std, np.float32).reshape(last)
    return (images.astype(np.float32) / np.float32(255) - mean) / std
