"""Class names of ImageNet-1k, for weight files without class names."""

import functools
from importlib import resources

from .info import WeightsInfo


@functools.cache
def imagenet_class_names() -> tuple[str, ...]:
    """Return the names of ImageNet-1k's 1000 classes by class index, such as "tench" for 0.

    Each is the first word or phrase of the class's WordNet 3.0 synset (https://wordnet.princeton.edu); the classes are
    those of ILSVRC 2012 in the order of their synset numbers, which is the order of the published nets' outputs.
    Ambiguous names have an addition in parentheses: "crane (bird)", "crane (machine)".
    """
    lines = (
        resources.files("repvgg_jax.weights").joinpath("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    )
    return tuple(line.partition(" ")[2] for line in lines)


def class_names_to_show(info: WeightsInfo) -> tuple[str, ...] | None:
    """Return the class names to show with predictions: the file's, or ImageNet's for a 1000-class net without any.

    The published files (of the authors, timm and MMPretrain) have no class names; runs of `train.main` always do.
    """
    if info.class_names is None and info.num_classes == len(imagenet_class_names()):
        return imagenet_class_names()
    return info.class_names
