"""Content of batches, and the threads that fill them. Worker processes run this code, so all of it can be pickled.

A batch is a function of its step: neither the number of threads, processes or devices nor the step at which a run was
resumed changes a pixel. Images are uint8 until the device normalises them.
"""

import functools
import itertools
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from repvgg_jax.errors import ConfigError, DataError
from repvgg_jax.machine import cores
from repvgg_jax.preprocess import Preprocessing, eval_transform, to_mode

from .pictures import Picture, open_picture, to_pil
from .sources import Source
from .transforms import Transform

HostBatch = dict[str, Any]
Rendered = tuple[np.ndarray, int]
"""An image, uint8 [H, W, C], and its label."""
Row = tuple[int, int, int]
"""The epoch, the position in it, and the index into the source."""

_ORDER, _AUGMENTATION = 0, 1
# Number of tasks per thread and batch: few enough to cost little, enough to balance slow images.
_TASKS_PER_THREAD = 4
# Number of batches in use: prepared ahead, in transfer to the device, and in computation.
_ARRAYS_KEPT = 8

_of_thread = threading.local()


def random_numbers(seed: int, *purpose: int) -> np.random.Generator:
    """Return a generator that depends only on `seed` and up to three numbers, valid until the thread's next call.

    Philox is a counter-based generator; the numbers choose the start in its sequence, at least 2^64 draws away from any
    other start. Setting a generator's state takes a third of the time of creating one.
    """
    if not hasattr(_of_thread, "philox"):
        _of_thread.philox = np.random.Philox(0)
        _of_thread.generator, _of_thread.state = np.random.Generator(_of_thread.philox), _of_thread.philox.state
    state = _of_thread.state["state"]
    state["key"][:] = seed, 0
    state["counter"][:] = (0, *purpose, 0, 0, 0)[:4]
    _of_thread.philox.state = _of_thread.state  # also empties its buffer of numbers
    return _of_thread.generator


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return the order of the source's images in an epoch.

    Grain's shuffle is not used: its orders of seed 0's second epoch and seed 1's first are the same.
    """
    return random_numbers(seed, _ORDER, epoch).permutation(np.arange(length, dtype=np.int32))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Common options of `train_batches` and `eval_batches`.

    Attributes:
      batch_size: images per step, over all JAX processes. Each process takes a contiguous slice of the batch, so the
        batch does not depend on the number of processes.
      local_device_count: number of devices of this process.
      preprocessing: size and channels of the images, and preprocessing in evaluation.
      num_workers: number of decoding threads; None takes one per CPU that this process may use.
      processes: number of worker processes with these threads; 1 uses this process itself; None as in `processes_for`.
      strict: raise on an unreadable image instead of replacing it or leaving its row empty.
      process_index: index of this JAX process.
      process_count: number of JAX processes.
      prefetch: number of batches that this process prepares ahead; each worker process also prepares some.

    Raises:
      ConfigError: the batch size is not divisible by the number of devices, or a number is too small.
    """

    batch_size: int
    local_device_count: int
    preprocessing: Preprocessing
    num_workers: int | None = None
    processes: int | None = None
    strict: bool = False
    process_index: int = 0
    process_count: int = 1
    prefetch: int = 3

    def __post_init__(self) -> None:
        devices = self.local_device_count * self.process_count
        if self.workers < 1 or self.prefetch < 1:
            raise ConfigError(f"need at least 1 worker and 1 batch ahead, got {self.num_workers} and {self.prefetch}")
        if self.processes is not None and self.processes < 1:
            raise ConfigError(f"need at least 1 process, this one, got {self.processes}")
        if self.batch_size < 1 or devices < 1 or self.batch_size % devices:
            raise ConfigError(f"a batch size of {self.batch_size} cannot be divided equally over {devices} devices")
        if not 0 <= self.process_index < self.process_count:
            raise ConfigError(f"there is no process {self.process_index} among {self.process_count}, from 0")

    @property
    def workers(self) -> int:
        """Number of decoding threads."""
        return cores() if self.num_workers is None else self.num_workers

    @property
    def rows(self) -> range:
        """Rows of a batch that this process provides."""
        size = self.batch_size // self.process_count
        return range(self.process_index * size, (self.process_index + 1) * size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of these rows' images."""
        size, channels = self.preprocessing.image_size, self.preprocessing.channels
        return len(self.rows), size, size, channels


class Unreadable(list[tuple[int, str, str]]):
    """Images of a batch that could not be read: index, name and reason of each."""

    def none_left(self) -> DataError:
        """Return the error of a source without any readable image."""
        images = {index: reason for index, _, reason in self}
        return DataError(f"none of the {len(images)} images can be read; the first: {images[min(images)]}")


@dataclass(frozen=True)
class Images:
    """The images of a source, divided into one batch per step."""

    source: Source
    options: Options
    masked: ClassVar[bool]
    """Whether rows of a batch may stay empty; a mask then marks the others."""

    def rows(self, step: int) -> list[Row]:
        """Return the images for this process's rows of a step's batch; fewer for the last batch of an evaluation."""
        raise NotImplementedError

    def render(self, row: Row, unreadable: Unreadable) -> Rendered | None:
        """Return an image with its label; None leaves its row empty."""
        raise NotImplementedError

    def _read(self, index: int, transform: Callable[[Picture], np.ndarray], unreadable: Unreadable) -> Rendered | None:
        """Return the transformed image and its label; or None, after adding it to `unreadable`.

        The image is read even if that failed before: some crops of a damaged file can be decoded and others not, and
        the content of a batch must not depend on earlier attempts.

        Raises:
          DataError: the image is unreadable, and `strict` is set.
        """
        name, channels = None, self.options.preprocessing.channels
        try:
            example = self.source[index]
            name = example.name
            if isinstance(example.image, bytes):
                return transform(open_picture(example.image, name, channels)), example.label
            pixels = example.image[..., 0] if example.image.shape[2:] == (1,) else example.image
            return transform(to_mode(Image.fromarray(pixels), "L" if channels == 1 else "RGB")), example.label
        except DataError as error:
            reason = str(error) if name is None or name in str(error) else f"{name}: {error}"
            if self.options.strict:
                raise DataError(reason) from error
            unreadable.append((index, name or reason, reason))
            return None


@dataclass(frozen=True)
class TrainingImages(Images):
    """Augmented images, in a new order every epoch; an unreadable one is replaced by the next readable one."""

    transform: Transform
    seed: int
    masked = False

    def rows(self, step: int) -> list[Row]:
        epoch, step_in_epoch = divmod(step, len(self.source) // self.options.batch_size)
        order = _order(self.seed, epoch, len(self.source))
        first = step_in_epoch * self.options.batch_size
        return [(epoch, first + row, int(order[first + row])) for row in self.options.rows]

    def render(self, row: Row, unreadable: Unreadable) -> Rendered:
        epoch, position, index = row

        def augment(image: Picture) -> np.ndarray:
            # By position, not by image, so that an image which also replaces another one is augmented differently.
            numbers = random_numbers(self.seed, _AUGMENTATION, epoch, position)
            return self.transform(image, numbers, self.options.preprocessing.image_size)

        for candidate in itertools.chain(range(index, len(self.source)), range(index)):
            rendered = self._read(candidate, augment, unreadable)
            if rendered is not None:
                return rendered
        raise unreadable.none_left()


@dataclass(frozen=True)
class EvaluationImages(Images):
    """Every image once, in order, through `eval_transform`; the row of an unreadable one stays empty."""

    masked = True

    def rows(self, step: int) -> list[Row]:
        first, rows = step * self.options.batch_size, self.options.rows
        return [(0, index, index) for index in range(first + rows.start, min(first + rows.stop, len(self.source)))]

    def render(self, row: Row, unreadable: Unreadable) -> Rendered | None:
        return self._read(row[2], lambda image: eval_transform(to_pil(image), self.options.preprocessing), unreadable)


class _Recycled:
    """Arrays that are reused once nothing else refers to them, because new memory costs a page fault per page.

    A batch, a view of it, or a JAX array that shares its memory refers to the array and so keeps its contents.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape, self._lock = shape, threading.Lock()
        self._arrays: list[np.ndarray] = []
        self._unheld = _holders([np.empty(0)])[0]

    def take(self) -> np.ndarray:
        """Return a uint8 array with arbitrary contents, to which nothing else refers."""
        with self._lock:
            for array, holders in zip(self._arrays, _holders(self._arrays), strict=True):
                if holders == self._unheld:
                    return array
            array = np.empty(self._shape, np.uint8)
            if len(self._arrays) < _ARRAYS_KEPT:
                self._arrays.append(array)
            return array


def _holders(arrays: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


@dataclass(frozen=True)
class Filler:
    """Function from a step to its batch, which a pool of threads fills; decoding does not hold Python's lock.

    Attributes:
      images: images of the batches.
      threads: number of threads in each process that fills batches.
      shared: whether batches are in memory that processes share.
    """

    images: Images
    threads: int
    shared: bool = False

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        if self.shared and (opencv := sys.modules.get("cv2")):  # as `Batches` does in the run's own process
            opencv.setNumThreads(0)
        return ThreadPoolExecutor(self.threads, thread_name_prefix="decode")

    @functools.cached_property
    def _memory(self) -> _Recycled:
        return _Recycled(self.images.options.shape)

    def __call__(self, step: int) -> HostBatch:
        """Return the batch of a step: image [rows, …], label [rows], mask [rows] if any, and the unreadable images."""
        rows, shape, unreadable = self.images.rows(step), self.images.options.shape, Unreadable()
        count = shape[0]
        size = -(-count // (self.threads * _TASKS_PER_THREAD))
        if self.shared:
            import grain

            images: Any = grain.multiprocessing.SharedMemoryArray(shape, np.uint8)
        else:
            images = self._memory.take()
        batch = {"image": images, "label": np.zeros(count, np.int32)}
        if self.images.masked:
            images.fill(0)
            batch["mask"] = np.zeros(count, np.float32)

        def fill(start: int) -> None:
            for place in range(start, min(start + size, len(rows))):
                rendered = self.images.render(rows[place], unreadable)
                if rendered is not None:
                    images[place], batch["label"][place] = rendered
                    if self.images.masked:
                        batch["mask"][place] = 1.0

        try:
            list(self._pool.map(fill, range(0, len(rows), size)))
        except Exception as error:
            if not self.shared:
                raise
            images.unlink_on_del()
            raise _picklable(error) from None
        return batch | {"unreadable": sorted(unreadable)}

    def close(self) -> None:
        """Wait for the images that are being decoded, and end the threads."""
        if "_pool" in self.__dict__:  # this process has filled batches
            self._pool.shutdown(wait=True, cancel_futures=True)


def _picklable(error: Exception) -> Exception:
    """Return an exception that can be sent to the run's own process; one that cannot be pickled would be lost."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
