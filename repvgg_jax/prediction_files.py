"""Output formats of `python -m repvgg_jax predict`: text, CSV or JSON for predictions, .npy or CSV for embeddings."""

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
    """A predicted class: its index, its name (None if the weight file has no names) and its probability."""

    index: int
    name: str | None
    probability: float


WritePrediction = Callable[[str, Sequence[Guess]], None]
"""Writes an image's name and its most likely classes, most likely first."""

WriteEmbeddings = Callable[[Sequence[str], np.ndarray], None]
"""Writes the names of N images and their embeddings, `[N, C]`."""


def prediction_writer(kind: Format, stream: TextIO) -> WritePrediction:
    """Write the format's header, if it has one, to a stream, and return a function that writes predictions to it.

    * text: `IMAGE: NAME 89.1 %, NAME 2.6 %`, for people.
    * csv: columns `image,rank,class,name,probability`, one row per image and class.
    * json: one line per image, `{"image": …, "predictions": [{"class": …, "name": …, "probability": …}, …]}`.
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
    """Round to six significant digits, the precision of float32."""
    return float(f"{probability:.6g}")


def check_embedding_file(path: str) -> None:
    """Check in advance, as far as possible, that `embedding_writer` can write a file.

    Raises:
      ConfigError: the suffix is neither .npy nor .csv.
      RepVGGError: the folder does not exist or cannot be written to.
    """
    if Path(path).suffix not in EMBEDDING_SUFFIXES:
        raise ConfigError(f"--embeddings {path}: the name must end in {' or '.join(EMBEDDING_SUFFIXES)}")
    check_target(path)


@contextlib.contextmanager
def embedding_writer(path: str) -> Iterator[WriteEmbeddings]:
    """Yield a function that appends rows to a `.npy` file (float32 `[N, C]`) or a `.csv` file (columns `image,0,1,…`).

    The file appears once the block has succeeded. Rows are not kept in memory.

    Raises:
      RepVGGError: the file cannot be written.
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
            self._rows.writerow((image, *(f"{number:.9g}" for number in row)))  # 9 digits identify every float32


class _NpyRows:
    """Writes the number of rows into the header at the end; NumPy reserves space there for it to grow."""

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
