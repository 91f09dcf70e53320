"""The machinery under `pipeline.py`: reading an image, filling batches in threads, shaping them for devices."""

import contextlib
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image

from repvgg_jax.errors import ConfigError, DataError
from repvgg_jax.machine import cores
from repvgg_jax.preprocess import Preprocessing, to_mode

from .pictures import Picture, open_picture
from .sources import Example, Source

logger = logging.getLogger(__name__)

HostBatch = dict[str, np.ndarray]
Rendered = tuple[np.ndarray, int]

PADDING = -1
# A batch is cut into so many tasks per worker: few enough to cost little, enough to even out slow images.
_TASKS_PER_WORKER = 4
# Batches that a training loop holds at a time: being put on the device, and being computed with.
_BATCHES_OUT = 4


class BadImages:
    """The unreadable images met so far: each is named once in the log, and counted.

    Pass one object to several calls (every epoch's evaluation, say) to have each image named once in all.
    """

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Record an image; the first time, log it as a warning."""
        with self._lock:
            is_new = name not in self._reasons
            self._reasons.setdefault(name, reason)
        if is_new:
            logger.warning("skipped an unreadable image: %s", reason)

    def __len__(self) -> int:
        return len(self._reasons)


class SourceReader:
    """Reads images of one source for a transform to decode, and remembers which could not be."""

    def __init__(self, source: Source, channels: int, strict: bool, bad_images: BadImages | None) -> None:
        self.bad_images = BadImages() if bad_images is None else bad_images
        self.unreadable: dict[int, str] = {}
        self._source, self._channels, self._strict = source, channels, strict

    def __call__(self, index: int, transform: Callable[[Picture], np.ndarray]) -> Rendered | None:
        """The transformed image `index` (uint8 [H, W, C]) and its label, or None if it is unreadable.

        It is read even if it could not be before: of a damaged file some crops can be decoded and others not, and
        what a batch holds must not depend on what was tried earlier.

        Raises:
          DataError: it is unreadable, and the reader is strict.
        """
        name = None
        try:
            example = self._source[index]
            name = example.name
            return transform(_open(example, self._channels)), example.label
        except DataError as error:
            reason = str(error) if name is None or name in str(error) else f"{name}: {error}"
            if self._strict:
                raise DataError(reason) from error
            self.unreadable[index] = reason
            self.bad_images.add(name or reason, reason)
            return None


def _open(example: Example, channels: int) -> Picture:
    if isinstance(example.image, bytes):
        return open_picture(example.image, example.name, channels)
    pixels = example.image[..., 0] if example.image.shape[2:] == (1,) else example.image
    return to_mode(Image.fromarray(pixels), "L" if channels == 1 else "RGB")


@dataclass(frozen=True)
class Layout:
    """How a global batch is laid out over processes and their devices.

    Attributes:
      batch_size: images in a batch, over all processes.
      local_device_count: devices of each process.
      process_index, process_count: which of how many processes this is. Every process takes a contiguous
        slice of the global batch, so that it is the same batch however many there are.

    Raises:
      ConfigError: the devices do not divide the batch.
    """

    batch_size: int
    local_device_count: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        devices = self.local_device_count * self.process_count
        if self.batch_size < 1 or devices < 1 or self.batch_size % devices:
            raise ConfigError(f"a batch size of {self.batch_size} cannot be divided equally over {devices} devices")
        if not 0 <= self.process_index < self.process_count:
            raise ConfigError(f"there is no process {self.process_index} among {self.process_count}, from 0")

    @property
    def local_size(self) -> int:
        """Images of a batch that this process provides."""
        return self.batch_size // self.process_count

    def positions(self, step: int) -> np.ndarray:
        """Places in the epoch, int64 [local_size], of this process's images at the epoch's step `step`."""
        first = step * self.batch_size + self.process_index * self.local_size
        return np.arange(first, first + self.local_size)

    def to_devices(self, batch: HostBatch) -> HostBatch:
        """[local_size, …] -> [local_device_count, per_device, …], without a copy."""
        return {name: array.reshape(self.local_device_count, -1, *array.shape[1:]) for name, array in batch.items()}


@dataclass(frozen=True)
class BatchIndices:
    """What a batch is to hold: for each place in the epoch, an index into the source or PADDING."""

    epoch: int
    positions: np.ndarray
    indices: np.ndarray


class _Recycled:
    """Arrays that are used again once nobody else holds them, because fresh memory costs a page fault for every page.

    Whoever keeps a batch, a view of it or a JAX array that shares its memory, holds the array and keeps its contents.

    Args:
      shape: of the arrays, uint8.
      kept: so many are kept for use again.
    """

    def __init__(self, shape: tuple[int, ...], kept: int) -> None:
        self._shape, self._kept = shape, kept
        self._arrays: list[np.ndarray] = []
        self._unheld = _holders([np.empty(0)])[0]

    def take(self) -> np.ndarray:
        """An array that only the caller holds, with any contents."""
        for array, holders in zip(self._arrays, _holders(self._arrays), strict=True):
            if holders == self._unheld:
                return array
        array = np.empty(self._shape, np.uint8)
        if len(self._arrays) < self._kept:
            self._arrays.append(array)
        return array


def _holders(arrays: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


# (epoch, position, index) -> image and label; None masks the image out.
Render = Callable[[int, int, int], Rendered | None]


class Batches(Iterator[HostBatch]):
    """Iterator of batches that a pool of threads fills ahead of time.

    `close` it, or use it in a `with` statement, to stop the threads. An exception in a worker closes it too and
    reaches the caller of `next` at the batch that it struck.

    Args:
      contents: what the batches hold, in order.
      render: makes one image; called from the threads.
      layout, preprocessing: the shape of a batch.
      bad_images: where `render` records unreadable images.
      num_workers: threads; None takes one per CPU that this process may use.
      prefetch: batches in preparation at a time.
      masked: whether batches carry a mask.

    Raises:
      ConfigError: no workers, or no prefetching.
    """

    def __init__(
        self,
        contents: Iterator[BatchIndices],
        render: Render,
        *,
        layout: Layout,
        preprocessing: Preprocessing,
        bad_images: BadImages,
        num_workers: int | None,
        prefetch: int,
        masked: bool,
    ) -> None:
        self.bad_images = bad_images
        self._workers = cores() if num_workers is None else num_workers
        if self._workers < 1 or prefetch < 1:
            raise ConfigError(f"need at least 1 worker and 1 batch ahead, got {num_workers} and {prefetch}")
        self._contents, self._render, self._prefetch, self._masked = contents, render, prefetch, masked
        self._layout, self._preprocessing = layout, preprocessing
        self._pending: deque[tuple[HostBatch, list[Future[None]]]] = deque()
        self._stop = threading.Event()
        side = preprocessing.image_size
        self._images = _Recycled((layout.local_size, side, side, preprocessing.channels), prefetch + _BATCHES_OUT)
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        self._restore = contextlib.ExitStack()
        self._restore.enter_context(_opencv_without_threads())

    @property
    def skipped(self) -> int:
        """How many unreadable images have been met so far."""
        return len(self.bad_images)

    def __next__(self) -> HostBatch:
        if self._stop.is_set():
            raise StopIteration
        try:
            self._submit()
            if not self._pending:
                self.close()
                raise StopIteration
            batch, tasks = self._pending.popleft()
            for task in tasks:
                task.result()
            # Refill the place of the finished batch now, not at the next call: so the workers are never idle.
            self._submit()
        # KeyboardInterrupt too: whoever waited here is not coming back for another batch.
        except BaseException:
            self.close()
            raise
        return self._layout.to_devices(batch)

    def close(self) -> None:
        """Drop what is pending and wait for the images being decoded right now. Idempotent."""
        self._stop.set()
        self._pending.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._restore.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self) -> None:
        while len(self._pending) < self._prefetch:
            wanted = next(self._contents, None)
            if wanted is None:
                return
            batch, count = self._empty_batch(), len(wanted.indices)
            size = -(-count // (self._workers * _TASKS_PER_WORKER))
            starts = range(0, count, size)
            tasks = [self._pool.submit(self._fill, batch, wanted, start, min(start + size, count)) for start in starts]
            self._pending.append((batch, tasks))

    def _empty_batch(self) -> HostBatch:
        images, count = self._images.take(), self._layout.local_size
        batch = {"image": images, "label": np.zeros(count, np.int32)}
        if self._masked:  # not every place will be filled
            images.fill(0)
            batch["mask"] = np.zeros(count, np.float32)
        return batch

    def _fill(self, batch: HostBatch, wanted: BatchIndices, start: int, stop: int) -> None:
        for row in range(start, stop):
            if self._stop.is_set():
                return
            index = int(wanted.indices[row])
            if index == PADDING:
                continue
            rendered = self._render(wanted.epoch, int(wanted.positions[row]), index)
            if rendered is None:
                continue
            batch["image"][row], batch["label"][row] = rendered
            if self._masked:
                batch["mask"][row] = 1.0


@contextlib.contextmanager
def _opencv_without_threads() -> Iterator[None]:
    """OpenCV, where augmentations have imported it, without threads of its own: every core is busy with ours."""
    opencv = sys.modules.get("cv2")
    if opencv is None:
        yield
        return
    before = opencv.getNumThreads()
    opencv.setNumThreads(0)
    try:
        yield
    finally:
        opencv.setNumThreads(before)
