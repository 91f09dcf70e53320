"""Random-access sources of labelled images: an image folder and a synthetic source (for TFDS, see `tfds_source.py`).

A source does not deal with order, augmentation or devices. It is thread-safe and can be pickled.
"""

import os
from collections import Counter
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from repvgg_jax.errors import DataError
from repvgg_jax.image_files import SOME_SUFFIXES, describe_left_out, image_files


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled image.

    Attributes:
      image: an encoded image file, or uint8 pixels [H, W] or [H, W, C].
      label: index into the source's `class_names`.
      name: name of the image in messages; unique within its source.
    """

    image: bytes | np.ndarray
    label: int
    name: str


class Source(Protocol):
    """A sequence of examples with random access. `source[i]` raises DataError if example i is unreadable."""

    @property
    def class_names(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


def sample_of(source: Sized) -> list[int]:
    """Return the indices of 16 examples, or of all if there are fewer, evenly spaced over a source."""
    return np.unique(np.linspace(0, len(source) - 1, 16).round().astype(int)).tolist()


class FolderSource:
    """The images below `ROOT/CLASS/`, at any depth, in the order of torchvision's `ImageFolder`.

    `tfds.ImageFolder` is not used because it lists folders through `tf.io.gfile` and offers only `as_dataset`, so it
    needs TensorFlow and has no random access.

    Args:
      root: the folder of one split.

    Raises:
      DataError: the folder does not exist, or has no class folders or no images in them.

    Attributes:
      left_out: number of files below the class folders that are not images, by suffix.
      empty: names of the classes without images.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.class_names = class_folders(self.root)
        self.left_out: Counter[str] = Counter()
        self._paths: list[str] = []
        counts = []
        for name in self.class_names:
            paths, left_out = image_files(self.root / name)
            self._paths += paths
            self.left_out += left_out
            counts.append(len(paths))
        self.empty = [name for name, count in zip(self.class_names, counts, strict=True) if not count]
        if not self._paths:
            raise no_images(self.root / self.empty[0])
        self._labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def __getstate__(self) -> dict[str, Any]:
        # One string takes a third of the time of a list; each worker process gets the paths.
        return self.__dict__ | {"_paths": "\0".join(self._paths)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_paths": state["_paths"].split("\0")}

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int, /) -> Example:
        label = int(self._labels[index])
        path = self._paths[index]
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (a third of the time of `Path.read_bytes`)
                return Example(file.read(), label, path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def class_folders(root: Path) -> list[str]:
    """Return the sorted names of the class folders in `root`; hidden folders do not count.

    Raises:
      DataError: `root` cannot be listed, or holds no class folders.
    """
    try:
        with os.scandir(root) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot list the folder {root} ({error.strerror})") from error
    if not names:
        raise DataError(f"{root} holds no class folders; expected {root / 'CLASS' / 'IMAGE.jpg'}")
    return names


def no_images(folder: Path, or_remove: str = "it") -> DataError:
    """Return the error for a class folder without images; it says what the folder holds and what to do."""
    left_out = image_files(folder).left_out
    others = f", but {describe_left_out(left_out)}" if left_out else ""
    return DataError(f"class folder {folder} holds no images{others}; add some ({SOME_SUFFIXES}) or remove {or_remove}")


class SyntheticSource:
    """Random pixels for benchmarks, without reading or decoding; the same arguments give the same examples.

    Args:
      length: number of examples, which share a small pool of distinct images.
      image_size: height and width of the images.
      channels: 1 or 3.
      seed: seed, which should differ between splits.
    """

    _POOL, _CLASSES = 64, 1000

    def __init__(self, length: int, image_size: int, channels: int = 3, seed: int = 0) -> None:
        rng = np.random.Generator(np.random.Philox(seed))
        shape = (min(self._POOL, length), image_size, image_size, channels)
        self._images = rng.integers(0, 256, shape, dtype=np.uint8)
        self._labels = rng.integers(0, self._CLASSES, length, dtype=np.int32)
        self.class_names = [f"class {label}" for label in range(self._CLASSES)]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int, /) -> Example:
        return Example(self._images[index % len(self._images)], int(self._labels[index]), f"synthetic[{index}]")


@dataclass(frozen=True)
class UnopenedSource:
    """Placeholder for a split of which only the counts are needed, or for one without examples."""

    length: int
    class_names: list[str]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Example:
        raise IndexError(f"the data set is not open: no example {index}")
