"""Device-shaped batches of a source: `train_batches`, `eval_batches`, and `Prefetch`, which moves them to devices.

`batches.py` defines the content of a batch. Grain makes batches ahead of time, in threads or processes.
"""

import contextlib
import logging
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np

from repvgg_jax.errors import ConfigError, DataError

from .batches import EvaluationImages, Filler, HostBatch, Images, Options, TrainingImages, Unreadable
from .sources import Source
from .transforms import Transform
from .workers import Workers, processes_for

logger = logging.getLogger(__name__)

T = TypeVar("T")
Host = TypeVar("Host")


class BadImages:
    """The unreadable images so far, each of which is logged once and counted.

    Pass the same object to several calls, such as every epoch's evaluation, to log each image only once overall. Not
    thread-safe.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()

    def add(self, name: str, reason: str) -> None:
        """Record an image; log a warning the first time."""
        if name not in self._names:
            self._names.add(name)
            logger.warning("skipped an unreadable image: %s", reason)

    def __len__(self) -> int:
        return len(self._names)


class Closing(contextlib.ExitStack, Iterator[T]):
    """An iterator that closes itself at its end, at an exception and at the end of a `with` statement.

    As in any `ExitStack`, its callbacks release its resources, the last one first.
    """

    closed = False

    def _take(self) -> T:
        """Return the next element."""
        raise NotImplementedError

    def __next__(self) -> T:
        if self.closed:
            raise StopIteration
        try:
            return self._take()
        # Also KeyboardInterrupt: the caller will not ask for another element.
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Drop what was prepared ahead, and wait for work in progress. Idempotent."""
        super().close()

    def __exit__(self, *exception: Any) -> None:
        self.closed = True
        super().__exit__(*exception)


class Batches(Closing[HostBatch]):
    """Batches of `steps`, made ahead of time; an exception is raised by `next` at the batch in which it occurred.

    Raises:
      ConfigError: there is not enough shared memory for the requested worker processes.
    """

    def __init__(self, images: Images, steps: range, bad_images: BadImages | None = None) -> None:
        import grain  # here, so that recipes can be read where only JAX is installed

        super().__init__()
        options = images.options
        self.bad_images = BadImages() if bad_images is None else bad_images
        self._devices, self._any_readable, self._unreadable = options.local_device_count, False, Unreadable()
        count = processes_for(options.workers, options.processes, math.prod(options.shape))
        filler = Filler(images, threads=-(-options.workers // count), shared=count > 1)
        dataset = grain.MapDataset.range(steps.start, steps.stop).map(filler)
        ahead = grain.ReadOptions(num_threads=options.prefetch, prefetch_buffer_size=options.prefetch)
        self._made: Any = Workers(dataset, count) if count > 1 else iter(dataset.to_iter_dataset(ahead))
        if opencv := sys.modules.get("cv2"):  # used by augmentations: its own threads would compete with ours
            self.callback(opencv.setNumThreads, opencv.getNumThreads())
            opencv.setNumThreads(0)
        self.callback(filler.close)
        self.callback(self._made.close)

    @property
    def skipped(self) -> int:
        """Number of unreadable images so far."""
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
        # np.asarray makes plain views of Grain's arrays in shared memory.
        return {name: np.asarray(array).reshape(self._devices, -1, *array.shape[1:]) for name, array in batch.items()}


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Return the training steps per epoch; the images of an incomplete last batch are not used in that epoch.

    Raises:
      DataError: there are fewer images than one batch holds.
    """
    if images < batch_size:
        raise DataError(f"{images} training images do not fill one batch of {batch_size}; use a smaller batch size")
    return images // batch_size


def train_batches(source: Source, *, transform: Transform, seed: int, start_step: int = 0, **options: Any) -> Batches:
    """Return an endless iterator of augmented, shuffled batches, starting with global step `start_step`.

    An unreadable image is replaced by the next readable one of the source.

    Args:
      source: the training images.
      transform: the augmentation, from `make_transform` or `get_transform`.
      seed: seed of every epoch's order and every augmentation; 0 or more.
      start_step: number of steps already trained; batch k is the same whether or not batches 0 to k-1 were produced.
      options: fields of `Options`.

    Returns:
      An iterator of {"image": uint8 [devices, per_device, H, W, C], "label": int32 [devices, per_device]}.
      Close it, or use it in a `with` statement, to stop its threads and processes.

    Raises:
      ConfigError: a number is negative, or as from `Options` and `Batches`.
      DataError: there are fewer images than one batch. From the iterator: no image is readable, or, if strict, one is
        not; or a worker process was killed.
    """
    if not 0 <= seed < 2**63 or start_step < 0:
        raise ConfigError(f"seed and start_step must be 0 or more (seed < 2^63), got {seed} and {start_step}")
    chosen = Options(**options)
    steps_per_epoch(len(source), chosen.batch_size)
    return Batches(TrainingImages(source, chosen, transform, seed), range(start_step, sys.maxsize))


def eval_batches(source: Source, *, bad_images: BadImages | None = None, **options: Any) -> Batches:
    """Return an iterator over every image of `source` exactly once, in order, through `eval_transform`.

    Every JAX process gets the same number of batches, which collectives require. Rows after the last image, and
    unreadable images, are black with label 0 and mask 0.

    Args:
      source: the images.
      bad_images: record of unreadable images; None makes a new one.
      options: fields of `Options`. By default, `processes` is 1, because an evaluation would be over before worker
        processes had started.

    Returns:
      An iterator of {"image": uint8 [devices, per_device, H, W, C], "label": int32 [devices, per_device],
      "mask": float32 [devices, per_device], 1 where the image counts}.

    Raises:
      ConfigError: as from `Options`.
      DataError: from the iterator: no image of this process is readable, or, if strict, one is not.
    """
    options.setdefault("processes", 1)
    chosen = Options(**options)
    return Batches(EvaluationImages(source, chosen), range(-(-len(source) // chosen.batch_size)), bad_images)


class Prefetch(Closing[T], Generic[Host, T]):
    """Puts batches on the device in a thread, ahead of time.

    `close` it before its `batches`, or use both in one `with` statement, the batches first.

    Args:
      batches: iterator of batches, used only by the thread.
      put: function that starts the transfer of a batch and returns it as an array on the device, such as
        `functools.partial(jax.device_put, device=sharding)`; called in the thread.
      ahead: number of batches on the device, or in transfer, that are waiting to be used.

    Raises:
      ConfigError: `ahead` is less than 1.
    """

    def __init__(self, batches: Iterator[Host], put: Callable[[Host], T], ahead: int = 2) -> None:
        if ahead < 1:
            raise ConfigError(f"need at least 1 batch ahead, got {ahead}")
        super().__init__()
        self._batches, self._put = batches, put
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self.callback(self._thread.shutdown, cancel_futures=True)
        self._ahead = deque(self._thread.submit(self._next) for _ in range(ahead))

    def _next(self) -> T:
        return self._put(next(self._batches))

    def _take(self) -> T:
        batch = self._ahead.popleft().result()
        self._ahead.append(self._thread.submit(self._next))
        return batch
