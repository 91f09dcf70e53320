"""Claim: batches reach the device ahead of time, in order, with bounded memory; any error ends their thread."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from repvgg_jax.errors import ConfigError, DataError
from tests.helpers.batches import SMALL, Numbers, same, training
from train.data import Prefetch, train_batches
from train.window import Window


def identity(batch: Any) -> Any:
    return batch


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("prefetch", "decode"))]


def until(condition: Any) -> bool:
    """Return whether the condition comes true within a few seconds."""
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_batches_come_in_order_and_end(ahead: int) -> None:
    with Prefetch(iter(range(20)), lambda number: number * 10, ahead) as batches:
        assert list(batches) == list(range(0, 200, 10))
        assert list(batches) == []
    assert not threads()


def test_training_batches_reach_the_device_unchanged() -> None:
    def open_batches() -> Any:
        return train_batches(Numbers(20), batch_size=8, local_device_count=1, seed=3, **SMALL)

    with open_batches() as batches, Prefetch(batches, jax.device_put) as on_device:
        taken = [next(on_device) for _ in range(6)]
        assert all(isinstance(batch["image"], jax.Array) for batch in taken)
    expected = training(Numbers(20), 6, **SMALL)
    assert same([{name: np.asarray(a) for name, a in batch.items()} for batch in taken], expected)
    assert not threads()


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_no_more_batches_than_asked_for_are_on_the_device(ahead: int) -> None:
    read: list[int] = []
    put: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    with Prefetch(numbers(), lambda number: put.append(number) or number, ahead) as batches:
        for taken in range(4):
            assert until(lambda taken=taken: len(put) == taken + ahead)
            time.sleep(0.02)
            assert len(put) == taken + ahead
            assert len(read) == len(put)
            assert next(batches) == taken


@pytest.mark.parametrize("error", [DataError("image 7 cannot be read"), ZeroDivisionError("seven")])
def test_an_exception_is_raised_at_its_batch_and_ends_the_thread(error: Exception) -> None:
    def failing() -> Iterator[int]:
        yield from range(3)
        raise error

    def failing_put(number: int) -> int:
        if number == 3:
            raise error
        return number

    for numbers, put in ((failing(), identity), (iter(range(9)), failing_put)):
        batches = Prefetch(numbers, put, 5)
        assert [next(batches) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(type(error), match=str(error)):
            next(batches)
        with pytest.raises(StopIteration):
            next(batches)
        assert not threads()


def test_close_does_not_wait_for_a_consumer_and_may_be_repeated() -> None:
    batches = Prefetch(iter(range(100)), identity, 2)
    assert next(batches) == 0
    batches.close()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)
    assert not threads()

    def interrupted() -> None:
        source = train_batches(Numbers(20), batch_size=4, local_device_count=1, seed=0, **SMALL)
        with source, Prefetch(source, identity) as batches:
            next(batches)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not threads()


def test_waiting_for_data_is_measured_and_computing_is_not() -> None:
    def slow() -> Iterator[int]:
        for number in range(6):
            time.sleep(0.1)
            yield number

    def data_wait(batches: Iterator[int], computing: float) -> float:
        """Return the share of five steps' time that a training loop would report as waiting."""
        window, metrics = Window(1), dict.fromkeys(("loss", "top1", "gradient_norm", "learning_rate"), 0.0)
        for step in range(6):  # the first step compiles, and is not counted
            window.next(batches)
            time.sleep(computing)
            window.add(step, metrics)
        return window.close()["data_wait"]

    with Prefetch(slow(), identity) as batches:
        assert data_wait(batches, 0.0) > 0.6
    with Prefetch(iter(range(100)), identity, 3) as batches:
        assert data_wait(batches, 0.05) < 0.4


def test_at_least_one_batch_is_ahead() -> None:
    with pytest.raises(ConfigError, match="at least 1 batch ahead"):
        Prefetch(iter([]), identity, 0)
