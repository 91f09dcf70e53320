"""Data: sources of labelled images, and batches of them shaped for the devices.

`open_dataset` opens a data set, `make_transform` returns its augmentation, `train_batches` and `eval_batches` read its
splits, and `Prefetch` moves batches to the devices.
"""

from repvgg_jax.image_files import describe_left_out

from .augmentation import Augmentation, make_transform
from .datasets import DataSet, open_dataset
from .pipeline import BadImages, Batches, Prefetch, eval_batches, steps_per_epoch, train_batches
from .sources import Example, Source
from .transforms import TRANSFORMS, Transform, get_transform

__all__ = [
    "TRANSFORMS",
    "Augmentation",
    "BadImages",
    "Batches",
    "DataSet",
    "Example",
    "Prefetch",
    "Source",
    "Transform",
    "describe_left_out",
    "eval_batches",
    "get_transform",
    "make_transform",
    "open_dataset",
    "steps_per_epoch",
    "train_batches",
]
