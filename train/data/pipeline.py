"""From a source to device-shaped batches: which images each holds, how augmented, in which order.

That is a pure function of (seed, step): neither the number of worker threads, processes or devices, nor the
step at which a run was resumed changes a pixel. Images are uint8 until the device normalises them.
"""

import itertools
import threading
from collections.abc import Iterator

import numpy as np

from repvgg_jax.errors import ConfigError, DataError
from repvgg_jax.preprocess import Preprocessing, eval_transform

from .batches import PADDING, BadImages, Batches, BatchIndices, Layout, Rendered, SourceReader
from .pictures import Picture, to_pil
from .sources import Source
from .transforms import Transform

_ORDER, _AUGMENTATION = 0, 1


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
      num_workers: decoding threads; None takes one per CPU that this process may use.
      strict: raise on an unreadable image instead of replacing it.
      process_index, process_count: which of how many processes this is.
      bad_images: where unreadable images are recorded; None makes a new record.
      prefetch: batches prepared ahead.

    Returns:
      An iterator of {"image": uint8 [devices, per_device, H, W, C], "label": int32 [devices, per_device]}.
      Close it, or use it in a `with` statement, to stop its threads.

    Raises:
      ConfigError: the devices do not divide the batch, or a number is negative.
      DataError: fewer images than one batch. From the iterator: no image is readable, or, if strict, one is
        not.
    """
    if not 0 <= seed < 2**63 or start_step < 0:
        raise ConfigError(f"seed and start_step must be 0 or more (seed < 2^63), got {seed} and {start_step}")
    layout = Layout(batch_size, local_device_count, process_index, process_count)
    steps = steps_per_epoch(len(source), batch_size)
    reader = SourceReader(source, preprocessing.channels, strict, bad_images)
    numbers = RandomNumbers()

    def contents() -> Iterator[BatchIndices]:
        first_epoch, first_step = divmod(start_step, steps)
        for epoch in itertools.count(first_epoch):
            order = random_numbers(seed, _ORDER, epoch).permutation(len(source))
            for step in range(first_step if epoch == first_epoch else 0, steps):
                positions = layout.positions(step)
                yield BatchIndices(epoch, positions, order[positions])

    def render(epoch: int, position: int, index: int) -> Rendered:
        def augment(image: Picture) -> np.ndarray:
            # By place, not by image: one that also stands in for another is not augmented alike twice.
            return transform(image, numbers(seed, _AUGMENTATION, epoch, position), preprocessing.image_size)

        for candidate in itertools.chain(range(index, len(source)), range(index)):
            rendered = reader(candidate, augment)
            if rendered is not None:
                return rendered
        raise _none_readable(reader)

    return Batches(
        contents(),
        render,
        layout=layout,
        preprocessing=preprocessing,
        bad_images=reader.bad_images,
        num_workers=num_workers,
        prefetch=prefetch,
        masked=False,
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
    reader = SourceReader(source, preprocessing.channels, strict, bad_images)
    places = [layout.positions(step) for step in range(-(-len(source) // batch_size))]
    images_here = sum(int(np.count_nonzero(positions < len(source))) for positions in places)

    def contents() -> Iterator[BatchIndices]:
        for positions in places:
            yield BatchIndices(0, positions, np.where(positions < len(source), positions, PADDING))

    def render(epoch: int, position: int, index: int) -> Rendered | None:
        rendered = reader(index, lambda image: eval_transform(to_pil(image), preprocessing))
        if len(reader.unreadable) == images_here:
            raise _none_readable(reader)
        return rendered

    return Batches(
        contents(),
        render,
        layout=layout,
        preprocessing=preprocessing,
        bad_images=reader.bad_images,
        num_workers=num_workers,
        prefetch=prefetch,
        masked=True,
    )


def random_numbers(seed: int, *purpose: int) -> np.random.Generator:
    """A generator that depends on `seed` and up to three numbers, and on nothing that ran before.

    Philox is a counter-based generator: the numbers say where in its one long sequence to begin, 2^64 draws
    away from every other place, which costs less than hashing them into a new seed.
    """
    return RandomNumbers()(seed, *purpose)


class RandomNumbers(threading.local):
    """`random_numbers` from one generator for each thread, good until the thread's next call.

    Setting a generator's state takes a third of the time that making one takes, and asks the system for nothing.
    """

    def __init__(self) -> None:
        self._philox = np.random.Philox(0)
        self._generator = np.random.Generator(self._philox)
        self._state = self._philox.state

    def __call__(self, seed: int, *purpose: int) -> np.random.Generator:
        state = self._state["state"]
        state["key"][:] = seed, 0
        state["counter"][:] = (0, *purpose, 0, 0, 0)[:4]
        self._philox.state = self._state  # its buffer of numbers drawn ahead is empty
        return self._generator


def _none_readable(reader: SourceReader) -> DataError:
    first = reader.unreadable[min(list(reader.unreadable))]  # list: other threads may be adding
    return DataError(f"none of the {len(reader.unreadable)} images can be read; the first: {first}")
