"""Claim: batches are a function of seed and step, include every image when they should, and survive unreadable ones."""

import logging
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from repvgg_jax.errors import ConfigError, DataError
from repvgg_jax.preprocess import Preprocessing, decode_image, eval_transform
from tests.helpers.batches import SMALL, SMALL_EVAL, Numbers, evaluation, flat, numbers, same, training
from tests.helpers.photos import write_photos
from train.data import BadImages, Batches, Example, eval_batches, train_batches
from train.data.sources import FolderSource
from train.data.transforms import random_resized_crop_flip


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 22 training and 13 evaluation photographs of two classes."""
    write_photos(tmp_path / "photos" / "train", 22)
    write_photos(tmp_path / "photos" / "val", 13, offset=5)
    return tmp_path / "photos"


# Training batches: a function of seed and step


def test_training_batches_do_not_depend_on_the_number_of_workers(photos: Path) -> None:
    source = FolderSource(photos / "train")
    reference = training(source, 7, num_workers=1)
    assert all(batch["image"].shape == (1, 8, 16, 16, 3) for batch in reference)
    assert reference[0]["image"].dtype == np.uint8
    assert reference[0]["label"].dtype == np.int32
    for workers in (2, 5):
        assert same(training(source, 7, num_workers=workers, prefetch=workers), reference)


@pytest.mark.parametrize("start", [1, 2, 3, 5])
def test_resuming_at_a_step_continues_bit_for_bit(photos: Path, start: int) -> None:
    source = FolderSource(photos / "train")
    assert same(training(source, 7 - start, start_step=start), training(source, 7)[start:])


def test_devices_and_processes_only_split_the_same_batch(photos: Path) -> None:
    source = FolderSource(photos / "train")
    whole = training(source, 4)
    assert np.array_equal(flat(training(source, 4, local_device_count=4), "image"), flat(whole, "image"))
    halves = [training(source, 4, local_device_count=2, process_count=2, process_index=index) for index in (0, 1)]
    assert halves[0][0]["image"].shape == (2, 2, 16, 16, 3)
    for name in ("image", "label"):
        joined = [np.concatenate([left[name], right[name]]) for left, right in zip(*halves, strict=True)]
        assert np.array_equal(flat([{name: batch} for batch in joined], name), flat(whole, name))


def test_every_epoch_uses_each_image_at_most_once_in_a_new_order() -> None:
    shown = numbers(training(Numbers(20), 4, **SMALL))
    first, second = shown[:16], shown[16:]
    assert len(set(first)) == len(set(second)) == 16
    assert first != second
    assert shown != numbers(training(Numbers(20), 4, **SMALL, seed=4))


def test_the_same_image_is_augmented_differently_in_every_epoch(photos: Path) -> None:
    images = flat(training(FolderSource(photos / "train"), 22, batch_size=1), "image")
    again = flat(training(FolderSource(photos / "train"), 22, batch_size=1, start_step=22), "image")
    assert len({image.tobytes() for image in np.concatenate([images, again])}) == 44


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=8, local_device_count=3), "batch size of 8 cannot be divided equally over 3 devices"),
        (dict(batch_size=8, process_count=2, local_device_count=8), "over 16 devices"),
        (dict(process_count=2, process_index=2), "no process 2 among 2"),
        (dict(num_workers=0), "at least 1 worker"),
        (dict(processes=0), "at least 1 process"),
        (dict(seed=-1), "seed and start_step must be 0 or more"),
    ],
)
def test_impossible_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        training(Numbers(20), 1, **(SMALL | options))


def test_fewer_images_than_a_batch_is_an_error() -> None:
    with pytest.raises(DataError, match="5 training images do not fill one batch of 8"):
        training(Numbers(5), 1, **SMALL)


# Evaluation batches: every image exactly once


@pytest.mark.parametrize(
    ("images", "batch_size", "devices"), [(1, 1, 1), (1, 8, 4), (7, 8, 2), (8, 8, 8), (13, 6, 3), (33, 8, 4)]
)
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_uses_every_image_exactly_once(images: int, batch_size: int, devices: int, processes: int) -> None:
    shown, steps = [], set()
    for index in range(processes):
        options: dict[str, Any] = dict(process_count=processes, process_index=index)
        batches = evaluation(
            Numbers(images), **SMALL_EVAL, batch_size=batch_size * processes, local_device_count=devices, **options
        )
        steps.add(len(batches))
        assert all(batch["mask"].shape == (devices, batch_size // devices) for batch in batches)
        mask = flat(batches, "mask")
        assert mask.dtype == np.float32
        shown += np.array(numbers(batches))[mask == 1].tolist()
        assert np.array_equal(flat(batches, "label")[mask == 1], np.array(numbers(batches))[mask == 1] % 2)
        assert not flat(batches, "image")[mask == 0].any()
    assert sorted(shown) == list(range(images))
    assert len(steps) == 1, "every process takes part in the same number of steps"


def test_evaluation_is_in_order_and_does_not_depend_on_the_number_of_workers(photos: Path) -> None:
    source = FolderSource(photos / "val")
    batches = evaluation(source, num_workers=1)
    assert same(evaluation(source, num_workers=4), batches)
    for index, image in enumerate(flat(batches, "image")[:13]):
        data = source[index].image
        assert isinstance(data, bytes)
        assert np.array_equal(image, eval_transform(decode_image(data, ""), Preprocessing(16)))


# Unreadable images


def test_training_replaces_an_unreadable_image_by_the_next_readable_one() -> None:
    whole = numbers(training(Numbers(20), 5, **SMALL))
    stand_in = {6: 7, 18: 0, 19: 0}
    for workers in (1, 4):
        broken = numbers(training(Numbers(20, unreadable=(6, 18, 19)), 5, **SMALL, num_workers=workers))
        assert broken == [stand_in.get(number, number) for number in whole]


def test_a_corrupt_file_is_named_once_and_counted(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    corrupt = photos / "train" / "garden" / "004.jpg"
    corrupt.write_bytes(corrupt.read_bytes()[:500])
    options: dict[str, Any] = dict(batch_size=11, local_device_count=1, preprocessing=Preprocessing(16), seed=0)
    with caplog.at_level(logging.WARNING):
        with train_batches(FolderSource(photos / "train"), transform=random_resized_crop_flip, **options) as batches:
            for _ in range(6):
                next(batches)
        assert batches.skipped == 1
    assert [str(corrupt) in record.getMessage() for record in caplog.records] == [True]


def test_a_corrupt_file_is_masked_in_evaluation_and_named_only_once(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "val" / "pagoda" / "003.jpg").write_bytes(b"not an image")
    bad_images = BadImages()
    for _ in range(2):
        batches = evaluation(FolderSource(photos / "val"), bad_images=bad_images)
        assert flat(batches, "mask").sum() == 12
    assert len(bad_images) == len(caplog.records) == 1


def test_strict_fails_on_an_unreadable_image(photos: Path) -> None:
    (photos / "train" / "pagoda" / "003.jpg").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"pagoda.003\.jpg: cannot be read as an image"):
        training(FolderSource(photos / "train"), 3, strict=True)
    with pytest.raises(DataError, match="number 5 cannot be read"):
        evaluation(Numbers(9, unreadable=(5,)), **SMALL_EVAL, strict=True)


def test_no_readable_image_is_an_error_and_not_an_endless_loop() -> None:
    source = Numbers(20, unreadable=tuple(range(20)))
    for attempt in (lambda: training(source, 1, **SMALL), lambda: evaluation(source, **SMALL_EVAL)):
        with pytest.raises(DataError, match="none of the 20 images can be read; the first: number 0 cannot be read"):
            attempt()


def test_an_unforeseen_exception_in_a_worker_reaches_the_caller() -> None:
    source = Numbers(20, unreadable=(6,), error=ZeroDivisionError)
    for attempt in (lambda: training(source, 5, **SMALL), lambda: evaluation(source, **SMALL_EVAL)):
        with pytest.raises(ZeroDivisionError, match="number 6"):
            attempt()


# Memory


def test_memory_of_dropped_batches_is_reused() -> None:
    with train_batches(Numbers(40), batch_size=4, local_device_count=2, seed=0, **SMALL) as batches:
        addresses = {next(batches)["image"].ctypes.data for _ in range(40)}
        assert len(addresses) <= 7


@pytest.mark.parametrize("keep", [lambda batch: batch, lambda batch: batch["image"][1, :1, 2:], jax.device_put])
def test_any_part_of_a_batch_that_is_kept_keeps_its_contents(keep: Any) -> None:
    with train_batches(Numbers(40), batch_size=4, local_device_count=2, seed=0, **SMALL) as batches:
        kept = [keep(next(batches)) for _ in range(3)]
        before = jax.tree.map(lambda array: np.array(array), kept)
        for _ in range(30):
            next(batches)
        jax.tree.map(np.testing.assert_array_equal, kept, before)


# Threads end


def decoding_threads() -> list[str]:
    """Return our threads and Grain's, after up to a second: Grain does not wait for its own, which are idle."""
    deadline, names = time.monotonic() + 1, ["decode"]
    while names and time.monotonic() < deadline:
        names = [
            thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "grain-prefetch"))
        ]
    return names


def test_no_thread_survives_close_exhaustion_or_an_exception() -> None:
    def open_batches(**options: Any) -> Batches:
        return train_batches(Numbers(20, **options), batch_size=4, local_device_count=1, seed=0, **SMALL)

    batches = open_batches()
    next(batches)
    assert decoding_threads()
    batches.close()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)
    assert not decoding_threads()

    def interrupted() -> None:
        with open_batches() as batches:
            next(batches)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not decoding_threads()

    batches = open_batches(unreadable=tuple(range(20)), error=RuntimeError)
    with pytest.raises(RuntimeError):
        next(batches)
    assert not decoding_threads()

    evaluated = eval_batches(Numbers(9), batch_size=4, local_device_count=1, **SMALL_EVAL)
    assert len(list(evaluated)) == 3
    assert not decoding_threads()


def test_batches_are_prepared_ahead_but_not_without_bound() -> None:
    read: list[int] = []

    class Counting(Numbers):
        def __getitem__(self, index: int, /) -> Example:
            read.append(index)
            return super().__getitem__(index)

    with train_batches(Counting(200), batch_size=4, local_device_count=1, seed=0, prefetch=3, **SMALL) as batches:
        next(batches)
        deadline = time.monotonic() + 5
        while len(read) < 16 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(read) == 16, "the batch that was taken and three more"


def test_opencvs_threads_are_off_only_while_ours_run() -> None:
    import cv2

    from train.data import augment

    assert augment
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        options: dict[str, Any] = dict(batch_size=8, local_device_count=1, preprocessing=Preprocessing(4, 1.0))
        with eval_batches(Numbers(16), **options) as batches:
            next(batches)
            assert cv2.getNumThreads() == 1
            with eval_batches(Numbers(8), **options) as inner:
                next(inner)
            assert cv2.getNumThreads() == 1
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)
