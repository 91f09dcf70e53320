"""From a source to device-shaped batches: order, decoding in threads, prefetching, unreadable images.

Which images a batch holds, and how they are augmented, is a pure function of (seed, step): neither the number
of worker threads, nor that of processes or devices, nor the step at which a run was resumed changes a pixel.
"""

import itertools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
from PIL import Image

from repvgg_jax.errors import ConfigError, DataError
from repvgg_jax.preprocess import Preprocessing, decode_image, eval_transform, to_mode
from train.data.sources import Example, Source
from train.data.transforms import Transform

logger = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
_Rendered = tuple[np.ndarray, int]

_ORDER, _AUGMENTATION = 0, 1  # which random numbers: of the epoch's order, of one image's augmentation
_PADDING = -1
_TASKS_PER_WORKER = 4  # a batch is cut into so many tasks per worker: few enough to be cheap, enough to even out


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
            known = name in self._reasons
            self._reasons.setdefault(name, reason)
        if not known:
            logger.warning("skipped an unreadable image: %s", reason)

    def __len__(self) -> int:
        return len(self._reasons)

    @property
    def names(self) -> list[str]:
        """Names of the unreadable images, sorted."""
        with self._lock:
            return sorted(self._reasons)


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
            raise ConfigError(f"process index {self.process_index} is not below the {self.process_count} processes")

    @property
    def local_size(self) -> int:
        """Images of a batch that this process provides."""
        return self.batch_size // self.process_count

    def positions(self, step: int) -> np.ndarray:
        """Places in the epoch, int64 [local_size], of this process's images at the epoch's step `step`."""
        first = step * self.batch_size + self.process_index * self.local_size
        return np.arange(first, first + self.local_size)

    def shard(self, batch: Batch) -> Batch:
        """[local_size, …] -> [local_device_count, per_device, …]."""
        return {name: array.reshape(self.local_device_count, -1, *array.shape[1:]) for name, array in batch.items()}


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
    strict: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    bad_images: BadImages | None = None,
    prefetch: int = 3,
) -> "Batches":
    """Augmented, shuffled batches without end, starting with global step `start_step`.

    An unreadable image gives its place to the next readable one of the source.

    Args:
        source: the training images.
        batch_size: images per step, over all processes.
        local_device_count: devices of this process.
        transform: the augmentation, as from `transforms.get_transform`.
        preprocessing: gives the size and the channels.
        seed: determines every epoch's order and every augmentation; non-negative.
        start_step: steps already trained; batch k is the same whether or not batches 0 to k-1 were produced.
        num_workers: decoding threads; None takes one per CPU that this process may use.
        strict: raise on an unreadable image instead of replacing it.
        process_index, process_count: which of how many processes this is.
        bad_images: where unreadable images are recorded; None makes a new record.
        prefetch: batches prepared ahead.

    Returns:
        An iterator of {"image": uint8 [devices, per_device, H, W, C], "label": int32 [devices, per_device]}.
        Close it, or use it in a `with` statement, to stop its threads.

    Raises:
        ConfigError: the devices do not divide the batch.
        DataError: fewer images than one batch. From the iterator: no image is readable, or, if strict, one is
            not.
    """
    layout = Layout(batch_size, local_device_count, process_index, process_count)
    steps = steps_per_epoch(len(source), batch_size)
    reader = _Reader(source, preprocessing.channels, strict, bad_images or BadImages())

    def plans() -> Iterator[_Plan]:
        first_epoch, first_step = divmod(start_step, steps)
        for epoch in itertools.count(first_epoch):
            order = _rng(seed, _ORDER, epoch).permutation(len(source))
            for step in range(first_step if epoch == first_epoch else 0, steps):
                positions = layout.positions(step)
                yield _Plan(epoch, positions, order[positions])

    def render(epoch: int, position: int, index: int) -> _Rendered:
        def augment(image: Image.Image) -> np.ndarray:
            # By place rather than by image: an image that stands in for another is not augmented alike twice.
            return transform(image, _rng(seed, _AUGMENTATION, epoch, position), preprocessing.image_size)

        for candidate in itertools.chain(range(index, len(source)), range(index)):
            rendered = reader(candidate, augment)
            if rendered is not None:
                return rendered
        raise DataError(f"none of the {len(source)} training images is readable; the first: {reader.first_reason}")

    return Batches(plans(), render, layout, preprocessing, reader.bad_images, num_workers, prefetch, masked=False)


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
) -> "Batches":
    """Every image of `source` exactly once, in order, through `eval_transform`.

    Every process gets equally many batches, as collectives need; places beyond the last image, and unreadable
    images, are black with label 0 and mask 0.

    Args:
        source: the images. The other arguments are as for `train_batches`.

    Returns:
        An iterator of {"image": uint8 [devices, per_device, H, W, C], "label": int32 [devices, per_device],
        "mask": float32 [devices, per_device], 1 where the image counts}.

    Raises:
        ConfigError: the devices do not divide the batch.
        DataError: from the iterator: no image of this process is readable, or, if strict, one is not.
    """
    layout = Layout(batch_size, local_device_count, process_index, process_count)
    reader = _Reader(source, preprocessing.channels, strict, bad_images or BadImages())

    def plans() -> Iterator[_Plan]:
        read = 0
        for step in range(-(-len(source) // batch_size)):
            positions = layout.positions(step)
            inside = positions < len(source)
            read += int(inside.sum())
            yield _Plan(0, positions, np.where(inside, positions, _PADDING))
        yield _Plan.check(lambda: reader.require_readable(read))

    def render(epoch: int, position: int, index: int) -> _Rendered | None:
        return reader(index, lambda image: eval_transform(image, preprocessing))

    return Batches(plans(), render, layout, preprocessing, reader.bad_images, num_workers, prefetch, masked=True)
