"""Listing of the image files in a folder, shared by training, evaluation, calibration and prediction."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .errors import DataError, system_errors
from .preprocess import IMAGE_SUFFIXES

SOME_SUFFIXES = ".jpg, .png, .webp, …"
"""The suffixes that error messages give as examples; `IMAGE_SUFFIXES` has all."""


class ImageFiles(NamedTuple):
    """The images of a folder.

    Attributes:
      paths: paths of the images, each starting with the folder that was listed.
      left_out: number of other files by suffix ("" for names without one).
    """

    paths: list[str]
    left_out: Counter[str]


def image_files(folder: str | os.PathLike[str]) -> ImageFiles:
    """List the images in `folder` at any depth, in the order of torchvision's `ImageFolder`.

    An image is a file whose suffix is in `IMAGE_SUFFIXES`, in upper or lower case. Links are followed, except a link to
    a folder that contains it. Unlike torchvision, skips names that begin with a dot, which editors and file managers
    create (`._photo.jpg`, `.ipynb_checkpoints/`). Broken links are listed, so that reading them reports an error.

    Raises:
      DataError: `folder`, or a folder in it, cannot be listed.
    """
    folders: dict[str, list[str]] = {}
    left_out: Counter[str] = Counter()
    waiting = [os.fspath(folder)]
    while waiting:
        current = waiting.pop()
        images = folders[current] = []
        for entry in _entries(current):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if not (entry.is_symlink() and _inside(current, entry.path)):
                    waiting.append(entry.path)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES) and (entry.is_file() or entry.is_symlink()):
                images.append(entry.name)
            else:
                left_out[Path(entry.name).suffix.lower()] += 1
    paths = [os.path.join(parent, name) for parent in sorted(folders) for name in sorted(folders[parent])]  # noqa: PTH118
    return ImageFiles(paths, left_out)


def some_image_files(folder: str | os.PathLike[str]) -> list[str]:
    """Return the paths of `image_files`, or raise an error if there are none.

    Raises:
      DataError: as `image_files`, or there are no images.
    """
    paths = image_files(folder).paths
    if not paths:
        raise DataError(f"{folder} holds no images ({SOME_SUFFIXES})")
    return paths


def describe_left_out(left_out: Counter[str]) -> str:
    """Describe the files that were left out, as in "3 files that are not images (2 .txt, 1 .csv)"."""
    total = left_out.total()
    kinds = [f"{count} {suffix or 'without a suffix'}" for suffix, count in left_out.most_common(5)]
    if len(left_out) > len(kinds):
        kinds.append("…")
    return f"{total} file{'s that are not images' if total > 1 else ' that is not an image'} ({', '.join(kinds)})"


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    with system_errors(DataError, f"cannot list the folder {folder}"), os.scandir(folder) as entries:
        yield from entries


def _inside(folder: str, link: str) -> bool:
    """Return whether `link` leads to `folder` or one of its parents: following it would loop forever."""
    here, there = Path(folder).resolve(), Path(link).resolve()
    return here.is_relative_to(there)
