"""Common result of all readers: descriptions of a file's tensors, each of which is read on demand."""

import dataclasses
import io
import itertools
import math
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import WeightsError, shown, system_errors
from ..net.leaves import Shape

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MAX_DIMENSIONS = 8
CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Record:
    """A range of bytes in a file, and its checksum.

    Attributes:
      offset: position of the first byte, from the start of the file.
      size: number of bytes.
      crc32: the CRC-32 stated in the file; None if there is none.
      start: initial value of the CRC-32.
    """

    offset: int
    size: int
    crc32: int | None = None
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Location of a tensor in its file.

    Attributes:
      shape: size of each dimension.
      dtype: numpy dtype of the elements.
      offset: position of the first element, in bytes from the start of the file.
      strides: in elements.
      record: the checksummed bytes that contain the tensor; None if the file has no checksums.
    """

    shape: Shape
    dtype: np.dtype
    offset: int
    strides: Shape
    record: Record | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Number of elements in the file from the tensor's first to its last, inclusive."""
        steps = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        return 1 + steps if self.size else 0


@dataclasses.dataclass
class TensorFile:
    """An open weight file. Tensors are read one at a time, into a buffer that the thread's next read overwrites.

    Attributes:
      path: the file's name, for messages.
      handle: the open file, unbuffered.
      tensors: its tensors, by key.
      metadata: text entries of a safetensors header.
      notes: remarks about the file to show the user.
    """

    path: Path
    handle: io.FileIO
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    _local: threading.local = dataclasses.field(default_factory=threading.local)
    _sound: set[Record] = dataclasses.field(default_factory=set)

    def read(self, tensor: Tensor) -> np.ndarray:
        """Return the tensor's values; valid until the same thread's next `read`.

        Raises:
          WeightsError: the file is truncated or cannot be read, or the checksum does not match.
        """
        count = tensor.span * tensor.dtype.itemsize
        buffer: np.ndarray = getattr(self._local, "buffer", np.empty(0, np.uint8))
        if buffer.size < count:
            buffer = self._local.buffer = np.empty(count, np.uint8)
        self._fill(buffer.data[:count], tensor.offset)
        record = tensor.record
        if record is not None and record not in self._sound:
            if (record.offset, record.size) == (tensor.offset, count):
                self._compare(record, zlib.crc32(buffer.data[:count], record.start))
            else:
                self._compare(record, self._checksum(record))
        values = buffer[:count].view(tensor.dtype)
        strides = [step * tensor.dtype.itemsize for step in tensor.strides]
        return np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)

    def _fill(self, view: memoryview, offset: int) -> None:
        with self._lock, system_errors(WeightsError, f"cannot read {self.path}"):
            self.handle.seek(offset)
            while len(view):
                count = self.handle.readinto(view)
                if not count:
                    raise WeightsError(f"{self.path} was cut short while it was read")
                view = view[count:]

    def _checksum(self, record: Record) -> int:
        """Return the CRC-32 of a record that is larger than the tensor being read."""
        chunk, crc = bytearray(min(CHUNK_BYTES, record.size)), record.start
        for start in range(0, record.size, CHUNK_BYTES):
            view = memoryview(chunk)[: record.size - start]
            self._fill(view, record.offset + start)
            crc = zlib.crc32(view, crc)
        return crc

    def _compare(self, record: Record, crc: int) -> None:
        if crc != record.crc32:
            key = next((key for key, tensor in self.tensors.items() if tensor.record == record), "a tensor")
            what = f"{shown(key)} is damaged, its CRC-32 does not match"
            raise WeightsError(f"cannot read {self.path}: {what}; fetch or copy the file again")
        self._sound.add(record)


def contiguous_strides(shape: Shape) -> Shape:
    """Return row-major strides, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def sizes(value: Any) -> Shape:
    """Return `value` as a tuple of non-negative integers.

    Raises:
      ValueError: `value` is not a list of such integers, or has more dimensions than any weight.
    """
    if not isinstance(value, list | tuple) or len(value) > MAX_DIMENSIONS:
        raise ValueError("a tensor's shape is not a list of sizes")
    if not all(type(n) is int and 0 <= n < 2**40 for n in value):
        raise ValueError("a tensor has absurd sizes")
    return tuple(value)


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether two elements may share memory: some dimension's stride does not exceed the inner extent."""
    reach = 0
    for step, n in sorted(zip(tensor.strides, tensor.shape, strict=True)):
        if n > 1:
            if step <= reach:
                return True
            reach += (n - 1) * step
    return False


def check_disjoint(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check that no two tensors share bytes.

    Raises:
      WeightsError: two tensors share or overlap storage.
    """
    ordered = sorted((t.offset, t.offset + t.span * t.dtype.itemsize, name) for name, t in tensors.items() if t.size)
    for (_, end, name), (start, _, other) in itertools.pairwise(ordered):
        if start < end:
            raise WeightsError(f"cannot read {path}: {shown(name)} and {shown(other)} share or overlap storage")
