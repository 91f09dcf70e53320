"""Calibration images from disk, prepared as evaluation prepares them."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ..digits import training_scans
from ..errors import DataError
from ..preprocess import IMAGE_SUFFIXES, Preprocessing, decode_image, eval_transform, to_mode

DEFAULT_COUNT = 256


def calibration_images(spec: str | os.PathLike, preprocessing: Preprocessing, count: int = DEFAULT_COUNT) -> np.ndarray:
    """Some images of a data set, the same ones every time.

    Args:
      spec: a folder with images at any depth, of which those under `train/` are taken if there is such a folder; or
        `digits`, for training images of scikit-learn's.
      preprocessing: size, crop and channels.
      count: how many; all if there are fewer.

    Returns:
      uint8 `[N, image_size, image_size, C]`.

    Raises:
      DataError: no such folder, no image in it, or one that cannot be read.
    """
    mode = "L" if preprocessing.channels == 1 else "RGB"
    load: Callable[[int], Image.Image]
    if os.fspath(spec) == "digits" and not Path(spec).is_dir():
        scans = training_scans()
        total = len(scans)

        def load_scan(index: int) -> Image.Image:
            return to_mode(Image.fromarray(scans[index]), mode)

        load = load_scan
    else:
        files = _image_files(Path(spec))
        total = len(files)

        def load_file(index: int) -> Image.Image:
            return decode_image(_read(files[index]), f"{files[index]}", preprocessing.channels)

        load = load_file

    chosen = np.random.default_rng(0).permutation(total)[:count]
    return np.stack([eval_transform(load(index), preprocessing) for index in chosen.tolist()])


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(
            f"calibration images: {folder} is no folder, and no data set of that name is built in but digits"
        )
    inside = folder / "train" if (folder / "train").is_dir() else folder
    files = sorted(path for path in inside.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"calibration images: {inside} holds none ({', '.join(IMAGE_SUFFIXES)})")
    return files


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
