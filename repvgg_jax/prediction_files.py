"""What `python -m repvgg_jax predict` writes: predictions as text, CSV or JSON; embeddings as .npy or CSV."""

import contextlib
import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, TextIO

import numpy as np

from .errors import ConfigError
from .files import atomic_path, check_target

Format = Literal["text", "csv", "json"]

EMBEDDING_SUFFIXES = (".npy", ".csv")


@dataclasses.dataclass(frozen=True)
class Guess:
    """A class that an image may be of: its index, its name (None if the weight file has none), its probability."""

    index: int
    name: str | None
    probability: float


WritePrediction = Callable[[str, Sequence[Guess]], None]
"""Writes an image's name and its most likely classes, the likeliest first."""

WriteEmbeddings = Callable[[Sequence[str], np.ndarray], None]
"""Writes images' names and embeddings, `[N, C]`."""


def prediction_writer(kind: Format, stream: TextIO) -> WritePrediction:
    """Return what writes predictions to a stream, after it has written the header if the format has one.

    * text: `IMAGE: NAME 89.1 %, NAME 2.6 %`, for people.
    * csv: columns `image,rank,class,name,probability`, a row for each of an image's classes.
    * json: a line for each image, `{"image": …, "predictions": [{"class": …, "name": …, "probability": …}, …]}`.
    """
    if kind == "text":

        def write(image: str, guesses: Sequence[Guess]) -> None:
            ranked = (f"{guess.name or f'class {guess.index}'} {100 * guess.probability:.1f} %" for guess in guesses)
            print(f"{image}: {', '.join(ranked)}", file=stream)

    elif kind == "csv":
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(("image", "rank", "class", "name", "probability"))

        def write(image: str, guesses: Sequence[Guess]) -> None:
            for rank, guess in enumerate(guesses, 1):
                rows.writerow((image, rank, guess.index, guess.name or "", _digits(guess.probability)))

    else:

        def write(image: str, guesses: Sequence[Guess]) -> None:
            predictions = [
                {"class": guess.index, "name": guess.name, "probability": _digits(guess.probability)}
                for guess in guesses
            ]
            print(json.dumps({"image": image, "predictions": predictions}), file=stream)

    return write


def _digits(probability: float) -> float:
    """Keep six significant digits: what float32 holds."""
    return float(f"{probability:.6g}")


def check_embedding_file(path: str) -> None:
    """Fail for a file that `embedding_writer` cannot write, as far as that shows beforehand.

    Raises:
      ConfigError: another suffix than .npy or .csv.
      RepVGGError: the folder does not exist or cannot be written to.
    """
    if Path(path).suffix not in EMBEDDING_SUFFIXES:
        raise ConfigError(f"--embeddings {path}: the name must end in {' or '.join(EMBEDDING_SUFFIXES)}")
    check_target(path)


@contextlib.contextmanager
def embedding_writer(path: str) -> Iterator[WriteEmbeddings]:
    """Yield what appends rows to a `.npy` file (float32 `[N, C]`) or a `.csv` file (columns `image,0,1,…`).

    The file appears when the block has succeeded; rows are not kept in memory.

    Raises:
      RepVGGError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        if Path(path).suffix == ".csv":
            with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                yield _CsvRows(file).append
        else:
            with temporary.open("wb") as file:
                rows = _NpyRows(file)
                yield rows.append
                rows.finish()


class _CsvRows:
    def __init__(self, file: TextIO):
        self._rows = csv.writer(file, lineterminator="\n")
        self._begun = False

    def append(self, images: Sequence[str], embeddings: np.ndarray) -> None:
        if not self._begun:
            self._rows.writerow(("image", *range(embeddings.shape[1])))
            self._begun = True
        for image, row in zip(images, embeddings, strict=True):
            self._rows.writerow((image, *(f"{number:.9g}" for number in row)))  # 9 digits are float32 to the bit


class _NpyRows:
    """The header says how many rows follow; NumPy leaves room in it for the number to grow."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._shape = (0, 0)

    def append(self, images: Sequence[str], embeddings: np.ndarray) -> None:
        del images
        if not self._shape[0]:
            self._write_header((0, embeddings.shape[1]))
        self._file.write(embeddings.astype("<f4").tobytes())
        self._shape = (self._shape[0] + len(embeddings), embeddings.shape[1])

    def finish(self) -> None:
        end = self._file.tell()
        self._file.seek(0)
        self._write_header(self._shape)
        assert self._file.tell() + 4 * self._shape[0] * self._shape[1] == end

    def _write_header(self, shape: tuple[int, int]) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
