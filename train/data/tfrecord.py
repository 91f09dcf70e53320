"""Random access to TFRecord files without TensorFlow.

A TFRecord file is a sequence of records: length (uint64, little endian), CRC of the length (4 bytes), the bytes, CRC of
the bytes (4 bytes). Following the lengths gives the offset of every record.
"""

import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from repvgg_jax.errors import DataError

_HEADER = struct.Struct("<Q4x")
_FOOTER_BYTES = 4


def record_spans(path: Path) -> np.ndarray:
    """Return the offset and length of every complete record of a TFRecord file.

    Args:
      path: the file. Its checksums are not verified; a damaged image fails when it is decoded.

    Returns:
      int64 [records, 2]; for a truncated file, the records before its end.

    Raises:
      OSError: the file cannot be read.
    """
    size, position, spans = path.stat().st_size, 0, []
    with path.open("rb") as file:
        while position + _HEADER.size <= size:
            file.seek(position)
            (length,) = _HEADER.unpack(file.read(_HEADER.size))
            start = position + _HEADER.size
            position = start + length + _FOOTER_BYTES
            if position <= size:
                spans.append((start, length))
    return np.array(spans, np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class Shard:
    """`take` records of the file `path`, starting with record number `skip`."""

    path: Path
    skip: int
    take: int


class TFRecordFiles:
    """The records of several TFRecord files as one sequence of bytes; thread-safe and picklable.

    A file is indexed on the first access to one of its records, so ImageNet's 1024 shards need not all be scanned
    before the first batch. Files are opened for each read, so a thousand descriptors need not be held.

    Args:
      shards: the files in order, with the records to use of each.

    Raises:
      DataError: the record is missing or unreadable (raised on access).
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = list(shards)
        self._ends = list(accumulate(shard.take for shard in shards))
        self._spans: list[np.ndarray | None] = [None] * len(shards)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int, /) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        shard = self._shards[number]
        row = shard.skip + index - (self._ends[number] - shard.take)
        try:
            return self._read(number, row)
        except OSError as error:
            raise DataError(f"{shard.path}: cannot be read ({error.strerror})") from error

    def _read(self, number: int, row: int) -> bytes:
        shard, spans = self._shards[number], self._spans[number]
        if spans is None:
            # Not locked: if two threads scan the same file at the same time, they get the same spans.
            spans = self._spans[number] = record_spans(shard.path)
        if row >= len(spans):
            expected = shard.skip + shard.take
            raise DataError(f"{shard.path}: cut short, {len(spans)} records of {expected}; prepare it again")
        offset, length = (int(number) for number in spans[row])
        with shard.path.open("rb", buffering=0) as file:
            file.seek(offset)
            return file.read(length)
