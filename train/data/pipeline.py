"""From a source to device-shaped batches: `train_batches`, `eval_batches`, and `Prefetch`, which takes them to devices.

What a batch holds is in `batches.py`. Grain makes one after the other ahead of time, in threads or processes.
"""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grain
import numpy as np

from repvgg_jax.errors import ConfigError, DataError
from repvgg_jax.machine import cores
from repvgg_jax.preprocess import Preprocessing

from .batches import EvaluationImages, Filler, HostBatch, TrainingImages, Unreadable
from .sources import Source
from .transforms import Transform
from .workers import Workers, processes_for

logger = logging.getLogger(__name__)

T = TypeVar("T")
Host = TypeVar("Host")


class BadImages:
    """The unreadable images met so far: each is named once in the log, and counted.

    Pass one object to several calls (every epoch's evaluation, say) to have each image named once in all.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def add(self, name: str, reason: str) -> None:
        """Record an image; the first time, log it as a warning."""
        with self._lock:
            is_new = name not in self._names
            self._names.add(name)
        if is_new:
            logger.warning("skipped an unreadable image: %s", reason)

    def __len__(self) -> int:
        return len(self._names)


class Closing(Iterator[T]):
    """An iterator that closes itself at its end, at an exception and at the end of a `with` statement."""

    closed = False

    def _take(self) -> T:
        raise NotImplementedError

    def __next__(self) -> T:
        if self.closed:
            raise StopIteration
        try:
            return self._take()
        # KeyboardInterrupt too: whoever waited here is not coming back for more.
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Drop what is ahead, and wait for what is being worked on right now. Idempotent."""
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Batches(Closing[HostBatch]):
    """Batches of `steps`, made ahead of time; an exception reaches the caller of `next` at the batch that it struck."""

    def __init__(
        self,
        images: TrainingImages | EvaluationImages,
        steps: range,
        *,
        preprocessing: Preprocessing,
        batch_size: int,
        local_device_count: int,
        num_workers: int | None,
        processes: int | None,
        process_index: int,
        process_count: int,
        bad_images: BadImages | None,
        prefetch: int,
    ) -> None:
        workers, devices = cores() if num_workers is None else num_workers, local_device_count * process_count
        if workers < 1 or prefetch < 1:
            raise ConfigError(f"need at least 1 worker and 1 batch ahead, got {num_workers} and {prefetch}")
        if batch_size < 1 or devices < 1 or batch_size % devices:
            raise ConfigError(f"a batch size of {batch_size} cannot be divided equally over {devices} devices")
        if not 0 <= process_index < process_count:
            raise ConfigError(f"there is no process {process_index} among {process_count}, from 0")
        self.bad_images = BadImages() if bad_images is None else bad_images
        self._devices, self._any_readable, self._unreadable = local_device_count, False, Unreadable()
        size = batch_size // process_count
        shape = preprocessing.image_size, preprocessing.image_size, preprocessing.channels
        # Each process takes a contiguous slice of the batch, so that it is the same one however many there are.
        rows = range(process_index * size, (process_index + 1) * size)
        count = processes_for(workers, processes, size * shape[0] * shape[1] * shape[2])
        self._filler = Filler(images, rows, shape, threads=-(-workers // count), shared=count > 1)
        dataset = grain.MapDataset.range(steps.start, steps.stop).map(self._filler)
        if count > 1:
            self._made: Any = Workers(dataset, count)
        else:
            self._made = iter(dataset.to_iter_dataset(grain.ReadOptions(prefetch, prefetch)))
        self._restore = contextlib.ExitStack()
        if opencv := sys.modules.get("cv2"):  # augmentations have it: no threads of its own while ours run
            self._restore.callback(opencv.setNumThreads, opencv.getNumThreads())
            opencv.setNumThreads(0)

    @property
    def skipped(self) -> int:
        """How many unreadable images have been met so far."""
        return len(self.bad_images)

    def _take(self) -> HostBatch:
        batch = next(self._made, None)
        if batch is None:
            if self._unreadable:
                raise self._unreadable.none_left()
            raise StopIteration
        unreadable = batch.pop("unreadable")
        for _, name, reason in unreadable:
            self.bad_images.add(name, reason)
        self._any_readable = self._any_readable or "mask" not in batch or bool(batch["mask"].any())
        self._unreadable = Unreadable() if self._any_readable else Unreadable(self._unreadable + unreadable)
        # np.asarray: of Grain's arrays in shared memory, plain views.
        return {name: np.asarray(array).reshape(self._devices, -1, *array.shape[1:]) for name, array in batch.items()}

    def close(self) -> None:
        super().close()
        self._made.close()
        self._filler.close()
        self._restore.close()


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Training steps in an epoch; the images of the incomplete last batch sit this epoch out.

    Raises:
      DataError: there are fewer images than one batch holds.
    """
    if images < batch_size:
        raise DataError(f"{images} training images do not fill one batch of {batch_size}; use a smaller batch size")
    return images // batch_size


def train_batches(
    source: Source,
    *,
    batch_size: int,
    local_device_count: int,
    transform: Transform,
    preprocessing: Preprocessing,
    seed: int,
    start_step: int = 0,
    num_workers: int | None = None,
    processes: int | None = None,
    strict: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    bad_images: BadImages | None = None,
    prefetch: int = 3,
) -> Batches:
    """Augmented, shuffled batches without end, starting with global step `start_step`.

    An unreadable image gives its place to the next readable one of the source.

    Args:
      source: the training images.
      batch_size: images per step, over all processes.
      local_device_count: devices of this process.
      transform: the augmentation, as from `make_transform` or `get_transform`.
      preprocessing: gives the size and the channels.
      seed: determines every epoch's order and every augmentation; 0 or more.
      start_step: steps already trained; batch k is the same whether or not batches 0 to k-1 were produced.
      num_workers: images that are decoded at a time, by a thread each; None takes one per CPU this process may use.
      processes: worker processes that have these threads, 1 for this process itself; None as in `processes_for`.
      strict: raise on an unreadable image instead of replacing it.
      process_index, process_count: which of how many JAX processes this is.
      bad_images: where unreadable images are recorded; None makes a new record.
      prefetch: batches prepared ahead by this process itself; worker processes prepare one each.

    Returns:
      An iterator of {"image": uint8 [devices, per_device, H, W, C], "label": int32 [devices, per_device]}.
      Close it, or use it in a `with` statement, to stop its threads and processes.

    Raises:
      ConfigError: the devices do not divide the batch, a number is negative, or there is no room for the processes.
      DataError: fewer images than one batch. From the iterator: no image is readable, or, if strict, one is
        not; or a worker process was killed.
    """
    if not 0 <= seed < 2**63 or start_step < 0:
        raise ConfigError(f"seed and start_step must be 0 or more (seed < 2^63), got {seed} and {start_step}")
    steps_per_epoch(len(source), batch_size)
    return Batches(
        TrainingImages(source, batch_size, transform, preprocessing, seed, strict),
        range(start_step, sys.maxsize),
        preprocessing=preprocessing,
        batch_size=batch_size,
        local_device_count=local_device_count,
        num_workers=num_workers,
        processes=processes,
        process_index=process_index,
        process_count=process_count,
        bad_images=bad_images,
        prefetch=prefetch,
    )


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    local_device_count: int,
    preprocessing: Preprocessing,
    num_workers: int | None = None,
    strict: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    bad_images: BadImages | None = None,
    prefetch: int = 3,
) -> Batches:
    """Every image of `source` exactly once, in order, through `eval_transform`.

    Every process gets equally many batches, as collectives need. Places beyond the last image, and unreadable
    images, are black with label 0 and mask 0. Threads of this process decode: an evaluation is over before worker
    processes would have started.

    Args:
      source: the images. The other arguments are as for `train_batches`.

    Returns:
      An iterator of {"image": uint8 [devices, per_device, H, W, C], "label": int32 [devices, per_device],
      "mask": float32 [devices, per_device], 1 where the image counts}.

    Raises:
      ConfigError: the devices do not divide the batch.
      DataError: from the iterator: no image of this process is readable, or, if strict, one is not.
    """
    return Batches(
        EvaluationImages(source, batch_size, preprocessing, strict),
        range(-(-len(source) // max(batch_size, 1))),
        preprocessing=preprocessing,
        batch_size=batch_size,
        local_device_count=local_device_count,
        num_workers=num_workers,
        processes=1,
        process_index=process_index,
        process_count=process_count,
        bad_images=bad_images,
        prefetch=prefetch,
    )


class Prefetch(Closing[T], Generic[Host, T]):
    """Takes batches and puts them on the device in a thread, ahead of time.

    `close` it before what it takes from, or use both in one `with` statement, the batches first.

    Args:
      batches: what to take from; only the thread does.
      put: starts the transfer of a batch and returns it as it is on the device, such as
        `functools.partial(jax.device_put, device=sharding)`; called in the thread.
      ahead: batches on the device, or on their way, that nobody has asked for yet; 1 is taken for 2.

    Raises:
      ConfigError: `ahead` is less than 1.
    """

    def __init__(self, batches: Iterator[Host], put: Callable[[Host], T], ahead: int = 2) -> None:
        if ahead < 1:
            raise ConfigError(f"need at least 1 batch ahead, got {ahead}")
        self._thread = grain.experimental.ThreadPrefetchDatasetIterator(_Put(batches, put), max(1, ahead - 1))
        self._thread.start_prefetch()

    def _take(self) -> T:
        return next(self._thread)

    def close(self) -> None:
        super().close()
        self._thread.close()


class _Put(Iterator[T], Generic[Host, T]):
    """What Grain takes for an iterator of its own: one whose state needs no saving, for it is the step."""

    def __init__(self, batches: Iterator[Host], put: Callable[[Host], T]) -> None:
        self._batches, self._put = batches, put

    def __next__(self) -> T:
        return self._put(next(self._batches))

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        del state
