"""Calibration images from disk, prepared as evaluation prepares them."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from ..digits import training_scans
from ..errors import DataError
from ..preprocess import IMAGE_SUFFIXES, Preprocessing, eval_transform, open_image, to_mode

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
    if os.fspath(spec) == "digits" and not Path(spec).is_dir():
        scans, mode = training_scans(), "L" if preprocessing.channels == 1 else "RGB"
        pictures = (to_mode(Image.fromarray(scans[index]), mode) for index in _choice(len(scans), count))
    else:
        files = _image_files(Path(spec))
        pictures = (open_image(files[index], preprocessing.channels) for index in _choice(len(files), count))
    return np.stack([eval_transform(picture, preprocessing) for picture in pictures])


def _choice(total: int, count: int) -> list[int]:
    return np.random.default_rng(0).permutation(total)[:count].tolist()


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
