"""Claim: worker processes make the same batches as threads, and never hang: killed, failing, or short of memory."""

import gc
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from collections import namedtuple
from itertools import islice
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from repvgg_jax.errors import ConfigError, DataError
from repvgg_jax.preprocess import Preprocessing
from tests.helpers.batches import SMALL, Numbers, numbers, same, training
from tests.helpers.photos import write_photos
from train.data import Augmentation, Prefetch, make_transform, train_batches, workers
from train.data.sources import FolderSource

TWO: dict[str, Any] = dict(processes=2, num_workers=2)


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Check that neither processes nor the shared memory that they sent survive a test."""
    names = []

    class Recorded(shared_memory.SharedMemory):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            names.append(self.name)

    monkeypatch.setattr(shared_memory, "SharedMemory", Recorded)
    yield
    assert not multiprocessing.active_children()
    gc.collect()
    deadline = time.monotonic() + 5
    while any(left := [name for name in names if Path("/dev/shm", name).exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def test_batches_depend_neither_on_worker_processes_nor_on_the_start_step(tmp_path: Path) -> None:
    write_photos(tmp_path, 22)
    augmentation = Augmentation(auto_augment="randaugment", random_erasing=0.5, jitter_hue=0.1)
    options: dict[str, Any] = dict(transform=make_transform("random_resized_crop_flip", augmentation, (0.5,) * 3))
    reference = training(FolderSource(tmp_path), 7, **options)
    assert same(training(FolderSource(tmp_path), 7, **options, **TWO), reference)
    resumed = training(FolderSource(tmp_path), 4, **options, start_step=3, processes=3)
    assert same(resumed, reference[3:])


def test_each_hosts_worker_processes_make_its_share_of_the_batch() -> None:
    whole = numbers(training(Numbers(20), 2, **SMALL))
    halves = [training(Numbers(20), 2, **SMALL, **TWO, process_count=2, process_index=index) for index in (0, 1)]
    assert [number for pair in zip(*halves, strict=True) for half in pair for number in numbers([half])] == whole


def test_an_unreadable_image_is_replaced_named_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    source = Numbers(20, unreadable=(6, 18))
    with train_batches(source, batch_size=8, local_device_count=1, seed=3, **SMALL, **TWO) as batches:
        taken = list(islice(batches, 6))
        assert batches.skipped == 2
    lines = [record.getMessage() for record in caplog.records]
    assert sorted(lines) == [f"skipped an unreadable image: number {number} cannot be read" for number in (18, 6)]
    assert same(taken, training(source, 6, **SMALL))


def test_an_error_reaches_the_caller() -> None:
    with pytest.raises(DataError, match="number 6 cannot be read"):
        training(Numbers(20, unreadable=(6,)), 5, **SMALL, **TWO, strict=True)
    with pytest.raises(ZeroDivisionError, match="number 6"):
        training(Numbers(20, unreadable=(6,), error=ZeroDivisionError), 5, **SMALL, **TWO)
    with pytest.raises(DataError, match="none of the 20 images can be read; the first: number 0 cannot be read"):
        training(Numbers(20, unreadable=tuple(range(20))), 1, **SMALL, **TWO)


class NotPicklableError(Exception):
    """An exception that holds something that cannot be pickled."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


@pytest.mark.slow
def test_an_error_that_cannot_be_pickled_reaches_the_caller_too() -> None:
    with pytest.raises(RuntimeError, match="NotPicklableError: number 6 cannot be read"):
        training(Numbers(20, unreadable=(6,), error=NotPicklableError), 5, **SMALL, **TWO)


@pytest.mark.parametrize("killer", [signal.SIGKILL, pytest.param(signal.SIGBUS, marks=pytest.mark.slow)])
def test_a_killed_worker_process_is_an_error_not_a_hang(killer: signal.Signals) -> None:
    with train_batches(Numbers(20), batch_size=8, local_device_count=1, seed=3, **SMALL, **TWO) as batches:
        next(batches)
        victim = multiprocessing.active_children()[0]
        assert victim.pid is not None
        os.kill(victim.pid, killer)
        start = time.monotonic()
        with pytest.raises(DataError, match=f"a worker process was ended by {killer.name}"):
            list(islice(batches, 50))
        assert time.monotonic() - start < 30
        with pytest.raises(StopIteration):
            next(batches)


def test_signals_that_stop_a_command_do_not_reach_worker_processes() -> None:
    with train_batches(Numbers(20), batch_size=8, local_device_count=1, seed=3, **SMALL, **TWO) as batches:
        for process in multiprocessing.active_children():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                assert process.pid is not None
                os.kill(process.pid, number)  # while it is starting
        taken = list(islice(batches, 5))
    assert same(taken, training(Numbers(20), 5, **SMALL))


def test_an_interrupt_during_a_batch_ends_the_processes() -> None:
    def interrupted() -> None:
        source = train_batches(Numbers(20), batch_size=4, local_device_count=1, seed=0, **SMALL, **TWO)
        with source, Prefetch(source, jax.device_put) as batches:
            next(batches)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


def test_any_part_of_a_batch_that_is_kept_keeps_its_contents() -> None:
    kept, before = [], []
    with train_batches(Numbers(40), batch_size=8, local_device_count=1, seed=0, **SMALL, **TWO) as batches:
        # Each way has its own batches: one that is kept in two ways would survive if one of them did not keep it.
        for keep in (lambda batch: batch, lambda batch: batch["image"][0, :1, 2:], jax.device_put):
            for _ in range(3):
                kept.append(keep(next(batches)))
                before.append(jax.tree.map(lambda array: np.array(array), kept[-1]))
        for _ in range(20):
            next(batches)
    jax.tree.map(np.testing.assert_array_equal, kept, before)


def test_too_little_shared_memory_is_reported_before_it_kills(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room = namedtuple("room", "total used free")(64 << 20, 0, 64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    options: dict[str, Any] = dict(SMALL, batch_size=512, local_device_count=1, seed=0)
    options["preprocessing"] = Preprocessing(224)
    with pytest.raises(
        ConfigError, match=r"2 worker processes need 882 MiB of shared memory, and /dev/shm has 64; give"
    ):
        train_batches(Numbers(1000), **options, **TWO)
    with caplog.at_level(logging.WARNING), train_batches(Numbers(1000), **options, num_workers=16):
        assert "decoding in threads of one process" in caplog.text


def test_worker_processes_follow_the_cores_and_too_many_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 64)
    assert [workers.processes_for(count, None, 0) for count in (1, 8, 15, 16, 64)] == [1, 1, 1, 2, 8]
    assert [workers.processes_for(64, count, 0) for count in (1, 3)] == [1, 3]
    assert not caplog.records
    monkeypatch.setattr(workers, "cores", lambda: 2)
    workers.processes_for(2, 4, 0)
    assert "4 worker processes share 2 cores" in caplog.text


def test_a_million_file_names_are_cheap_to_send_to_a_worker(tmp_path: Path) -> None:
    write_photos(tmp_path, 4)
    source = FolderSource(tmp_path)
    source._paths = [f"{tmp_path}/class/{number}.jpg" for number in range(1_000_000)]
    start = time.process_time()
    restored = pickle.loads(pickle.dumps(source))
    assert time.process_time() - start < 2
    assert restored._paths == source._paths
