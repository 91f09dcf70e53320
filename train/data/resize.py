"""Resize a part of an image to a square, like PIL's bilinear `Image.resize(size, box=…)`.

This is C++ code (`resize.cc`), compiled on first use, because no library is fast enough to feed an accelerator: OpenCV
takes twice the time and does not widen its filter when it shrinks an image, fast_image_resize (cykooz-resizer) takes
twice the time, and PIL eleven times. Without a compiler, PIL is used, with the same result to the bit.
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
    """Resize the part of an image that `box` covers, with antialiasing; the filter does not extend beyond `pixels`.

    PIL itself may process columns before rows, which causes occasional differences of one grey level.

    Args:
      pixels: uint8 `[H, W, C]`, C 1 or 3; the pixels of each row are contiguous.
      box: left, top, width and height in pixels, inside the image; fractions are allowed.
      size: height and width of the result.
      mirrored: mirror the result left to right.

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
    # In two steps, so that rows come first, whichever order PIL would choose.
    image = image.resize((size, image.height), Image.Resampling.BILINEAR, (left, 0, left + width, image.height))
    image = image.resize((size, size), Image.Resampling.BILINEAR, (0, top, size, top + height))
    resized = np.asarray(image).reshape(size, size, -1)
    return np.ascontiguousarray(resized[:, ::-1]) if mirrored else resized


def _native() -> Callable[..., None] | None:
    """Return the function of `resize.cc`, which releases Python's lock; None if it is not available."""
    if not switched_on():
        return None
    with _compiling:  # only one of the decoding threads compiles
        return _compiled()


@functools.cache
def _compiled(*options: str) -> Callable[..., None] | None:
    # Fused multiply-adds, which round only once, would give results that differ from PIL's.
    library = load_library(SOURCE, "resizing functions", "-ffp-contract=off", *options)
    if library is None:
        return None
    function = library.repvgg_resize
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    function.argtypes = [pointer, ctypes.c_int64, number, number, number, pointer, number, number, pointer]
    function.restype = None
    return function
