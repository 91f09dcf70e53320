"""Batches of small images, and a source of numbered ones."""

from itertools import islice
from typing import Any

import numpy as np

from repvgg_jax.errors import DataError
from repvgg_jax.preprocess import Preprocessing
from train.data import Example, eval_batches, get_transform, train_batches
from train.data.sources import Source
from train.data.transforms import random_resized_crop_flip


def training(source: Source, count: int, **options: Any) -> list[dict[str, np.ndarray]]:
    """Return the first `count` training batches of 8 small images."""
    defaults: dict[str, Any] = dict(batch_size=8, local_device_count=1, seed=3, num_workers=2)
    defaults |= dict(transform=random_resized_crop_flip, preprocessing=Preprocessing(16))
    with train_batches(source, **(defaults | options)) as batches:
        return list(islice(batches, count))


def evaluation(source: Source, **options: Any) -> list[dict[str, np.ndarray]]:
    defaults: dict[str, Any] = dict(batch_size=8, local_device_count=1, preprocessing=Preprocessing(16))
    with eval_batches(source, **(defaults | options)) as batches:
        return list(batches)


def same(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in pairs)


def flat(batches: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
    """Return the batches' `name` with the device axes merged: [images, …]."""
    return np.concatenate([batch[name].reshape(-1, *batch[name].shape[2:]) for batch in batches])


class Numbers:
    """A source in which every pixel of image i is i; some images are unreadable."""

    def __init__(self, length: int, unreadable: tuple[int, ...] = (), error: type[Exception] = DataError) -> None:
        self.length, self.unreadable, self.error = length, unreadable, error
        self.class_names = ["even", "odd"]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Example:
        if index in self.unreadable:
            raise self.error(f"number {index} cannot be read")
        return Example(np.full((4, 4, 3), index, np.uint8), index % 2, f"number {index}")


def numbers(batches: list[dict[str, np.ndarray]]) -> list[int]:
    return flat(batches, "image")[:, 0, 0, 0].tolist()


SMALL: dict[str, Any] = dict(preprocessing=Preprocessing(4, 1.0), transform=get_transform("as_is"))
SMALL_EVAL: dict[str, Any] = dict(preprocessing=Preprocessing(4, 1.0))
