"""Calibration images from disk, prepared as for evaluation."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from repvgg_jax.digits import training_scans
from repvgg_jax.errors import DataError, DataWarning
from repvgg_jax.image_files import some_image_files
from repvgg_jax.paths import is_folder, local_path
from repvgg_jax.preprocess import Preprocessing, eval_transform, open_as_input, to_mode

DEFAULT_COUNT = 256


def calibration_images(spec: str | os.PathLike, preprocessing: Preprocessing, count: int = DEFAULT_COUNT) -> np.ndarray:
    """Read a random but reproducible sample of a data set's images.

    Images are decoded one at a time. An image that cannot be read is replaced by another one.

    Args:
      spec: a folder that is searched for images recursively (only its `train/` subfolder, if there is one), or `digits`
        for the training images of scikit-learn's digits.
      preprocessing: size, crop and channels.
      count: number of images to read; all of them if there are fewer.

    Returns:
      uint8 `[N, image_size, image_size, C]`.

    Raises:
      DataError: the folder does not exist, contains no images, or none of its images can be read.

    Warns:
      DataWarning: one warning for each image that cannot be read, and one with the number of such images.
    """
    total, read = _data_set(spec, preprocessing)
    size = preprocessing.image_size
    pixels = np.empty((min(count, total), size, size, preprocessing.channels), np.uint8)
    failures: list[DataError] = []
    used = 0
    for index in np.random.default_rng(0).permutation(total).tolist():
        if used == len(pixels):
            break
        try:
            pixels[used] = read(index)
        except DataError as error:
            failures.append(error)
        else:
            used += 1
    if not used:
        raise DataError(f"none of {len(failures)} calibration images can be read; the first: {failures[0]}")
    for error in failures:
        warnings.warn(f"calibration image left out: {error}", DataWarning, stacklevel=2)
    if failures:
        summary = f"{len(failures)} calibration images could not be read; {used} others are used"
        warnings.warn(summary, DataWarning, stacklevel=2)
    return pixels[:used]


def _data_set(spec: str | os.PathLike, preprocessing: Preprocessing) -> tuple[int, Callable[[int], np.ndarray]]:
    """Return the number of images, and a function that reads and prepares the image at an index."""
    if os.fspath(spec) == "digits" and not is_folder(spec):
        scans, mode = training_scans(), "L" if preprocessing.channels == 1 else "RGB"
        return len(scans), lambda index: eval_transform(to_mode(Image.fromarray(scans[index]), mode), preprocessing)
    files = _image_files(local_path("calibration images", os.fspath(spec)))
    return len(files), lambda index: open_as_input(files[index], preprocessing)


def _image_files(folder: Path) -> list[str]:
    if not is_folder(folder):
        raise DataError(f"calibration images: {folder} is not a folder, and the only built-in data set is digits")
    return some_image_files(folder / "train" if (folder / "train").is_dir() else folder)
