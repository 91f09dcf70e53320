"""A part of an image resized to a square, as PIL's bilinear `Image.resize(size, box=…)` does it.

In C++ (`resize.cc`), compiled the first time it is needed, because no library is fast enough to feed an accelerator:
OpenCV takes twice the time and does not widen its filter when it shrinks, fast_image_resize (cykooz-resizer) takes
twice, PIL eleven times. Where there is no compiler, PIL does it, with the same result to the bit.
"""

import ctypes
import functools
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from repvgg_jax.compiler import load_library, switched_on

SOURCE = Path(__file__).parent / "resize.cc"

Box = tuple[float, float, float, float]  # left, top, width, height

_compiling = threading.Lock()


def resize(pixels: np.ndarray, box: Box, size: int, *, mirrored: bool = False) -> np.ndarray:
    """The part of an image that `box` covers, antialiased; what is outside of `pixels` does not count.

    PIL itself may walk the columns before the rows, which makes a grey level's difference here and there.

    Args:
      pixels: uint8 `[H, W, C]`, C 1 or 3; each row's pixels follow each other.
      box: left, top, width and height in pixels, inside the image, that need not be whole.
      size: height and width of the result.
      mirrored: left to right.

    Returns:
      uint8 `[size, size, C]`.
    """
    function = _native()
    if function is None:
        return _by_pil(pixels, box, size, mirrored)
    height, width, channels = pixels.shape
    assert pixels.dtype == np.uint8
    assert pixels.strides[1:] == (channels, 1)
    out = np.empty((size, size, channels), np.uint8)
    corners = (ctypes.c_double * 4)(*box)
    data, stride = pixels.ctypes.data, pixels.strides[0]
    function(data, stride, height, width, channels, corners, size, mirrored, out.ctypes.data)
    return out


def _by_pil(pixels: np.ndarray, box: Box, size: int, mirrored: bool) -> np.ndarray:
    left, top, width, height = box
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
    # In two steps: rows first, whatever PIL would find faster.
    image = image.resize((size, image.height), Image.Resampling.BILINEAR, (left, 0, left + width, image.height))
    image = image.resize((size, size), Image.Resampling.BILINEAR, (0, top, size, top + height))
    resized = np.asarray(image).reshape(size, size, -1)
    return np.ascontiguousarray(resized[:, ::-1]) if mirrored else resized


def _native() -> Callable[..., None] | None:
    """The function of `resize.cc`, which does not hold Python's lock; None where there is none."""
    if not switched_on():
        return None
    with _compiling:  # one of the decoding threads does
        return _compiled()


@functools.cache
def _compiled(*options: str) -> Callable[..., None] | None:
    # Sums of products that are rounded only once would not be PIL's.
    library = load_library(SOURCE, "resizing functions", "-ffp-contract=off", *options)
    if library is None:
        return None
    function = library.repvgg_resize
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    function.argtypes = [pointer, ctypes.c_int64, number, number, number, pointer, number, number, pointer]
    function.restype = None
    return function
