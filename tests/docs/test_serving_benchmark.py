"""Claim: the serving benchmark's batches give every request its own answer, and an error to each that shares it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from benchmarks.serving import Batcher


def test_concurrent_requests_share_a_batch_and_each_gets_its_own_answer():
    sizes, gate = [], threading.Event()

    def predict(images: np.ndarray) -> np.ndarray:
        gate.wait(10)  # so that the others wait meanwhile
        sizes.append(len(images))
        return 2 * images[:, 0, 0]

    batcher = Batcher(predict, 4)
    with ThreadPoolExecutor(9) as pool:
        answers = [pool.submit(batcher, np.full((2, 2, 3), number)) for number in range(9)]
        gate.set()
        for number, answer in enumerate(answers):
            np.testing.assert_array_equal(answer.result(timeout=10), [2 * number] * 3)
    assert sum(sizes) == 9
    assert max(sizes) <= 4


def test_an_error_reaches_every_request_of_its_batch_and_the_next_batch_is_served():
    def predict(images: np.ndarray) -> np.ndarray:
        if images.max() > 5:
            raise ValueError("too bright")
        return images[:, 0, 0]

    batcher = Batcher(predict, 1)
    with pytest.raises(ValueError, match="too bright"):
        batcher(np.full((2, 2, 3), 6))
    np.testing.assert_array_equal(batcher(np.full((2, 2, 3), 1)), [1, 1, 1])
