"""The tensors in a file, described before any of them is read: every reader's common result."""

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
    """A run of bytes in a file, and their checksum.

    Attributes:
      offset, size: where they are, in bytes from the start of the file.
      crc32: what the file says their CRC-32 is; None if it does not say.
      start: the CRC-32 to go on from.
    """

    offset: int
    size: int
    crc32: int | None = None
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its file.

    Attributes:
      shape: sizes.
      dtype: of its elements, as numpy has it.
      offset: of its first element, in bytes from the start of the file.
      strides: in elements.
      record: the bytes with a checksum that it is part of; None if the file has no checksums.
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
        """Elements from the first to the last in the file, both included."""
        steps = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        return 1 + steps if self.size else 0


@dataclasses.dataclass
class TensorFile:
    """An open weight file. Tensors are read one by one, into a buffer that the thread's next read overwrites.

    Attributes:
      path: its name, for messages.
      handle: the open file, unbuffered.
      tensors: what it holds, by key.
      metadata: text entries of a safetensors header.
      notes: what a user should hear about the file.
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
          WeightsError: the file ends before the tensor does, cannot be read, or its checksum says that it is damaged.
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
                got = self.handle.readinto(view)
                if not got:
                    raise WeightsError(f"{self.path} was cut short while it was read")
                view = view[got:]

    def _checksum(self, record: Record) -> int:
        """Return the CRC-32 of a record of which a tensor is only a part."""
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
      ValueError: it is none, or longer than any weight's.
    """
    if not isinstance(value, list | tuple) or len(value) > MAX_DIMENSIONS:
        raise ValueError("a tensor's shape is not a list of sizes")
    if not all(type(n) is int and 0 <= n < 2**40 for n in value):
        raise ValueError("a tensor has absurd sizes")
    return tuple(value)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share their place: a dimension's steps are no longer than what lies within one."""
    reach = 0
    for step, n in sorted(zip(tensor.strides, tensor.shape, strict=True)):
        if n > 1:
            if step <= reach:
                return True
            reach += (n - 1) * step
    return False


def check_disjoint(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check that every tensor has bytes of its own.

    Raises:
      WeightsError: two tensors share or overlap storage.
    """
    ordered = sorted((t.offset, t.offset + t.span * t.dtype.itemsize, name) for name, t in tensors.items() if t.size)
    for (_, end, name), (start, _, other) in itertools.pairwise(ordered):
        if start < end:
            raise WeightsError(f"cannot read {path}: {shown(name)} and {shown(other)} share or overlap storage")
