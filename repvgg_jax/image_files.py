"""Which files of a folder are images: the one listing of training, evaluation, calibration and prediction."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .errors import DataError, system_errors
from .preprocess import IMAGE_SUFFIXES


class ImageFiles(NamedTuple):
    """The images of a folder.

    Attributes:
      paths: of the images, each beginning with the folder that was listed.
      left_out: how many other files there are, by suffix ("" for a name without one).
    """

    paths: list[str]
    left_out: Counter[str]


def image_files(folder: str | os.PathLike[str]) -> ImageFiles:
    """List the images in `folder` at any depth, in the order of torchvision's `ImageFolder`.

    An image is a file whose suffix is in `IMAGE_SUFFIXES`, in upper or lower case. Links are followed, except one to
    a folder that it lies in. Unlike in torchvision, names that begin with a dot do not count: they are editors' and
    file managers' (`._photo.jpg`, `.ipynb_checkpoints/`). A link to nothing does, so that its reader says so.

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
    """Return the paths of `image_files`.

    Raises:
      DataError: as `image_files`, or there is none.
    """
    paths = image_files(folder).paths
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return paths


def describe_left_out(left_out: Counter[str]) -> str:
    """Say what was left out, such as "3 files that are not images (2 .txt, 1 .csv)"."""
    total = left_out.total()
    kinds = [f"{count} {suffix or 'without a suffix'}" for suffix, count in left_out.most_common(5)]
    if len(left_out) > len(kinds):
        kinds.append("…")
    return f"{total} file{'s that are not images' if total > 1 else ' that is not an image'} ({', '.join(kinds)})"


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    with system_errors(DataError, f"cannot list the folder {folder}"), os.scandir(folder) as entries:
        yield from entries


def _inside(folder: str, link: str) -> bool:
    """Whether `folder` is where `link` leads to, or lies in it: following the link would not end."""
    here, there = Path(folder).resolve(), Path(link).resolve()
    return here.is_relative_to(there)
