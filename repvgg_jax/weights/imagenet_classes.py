"""Names of ImageNet-1k's classes, for weight files that hold none."""

import functools
from importlib import resources

from .info import WeightsInfo


@functools.cache
def imagenet_class_names() -> tuple[str, ...]:
    """Return the names of ImageNet-1k's 1000 classes by class index, such as "tench" for 0.

    Each is the first word or phrase of the class's WordNet 3.0 synset (https://wordnet.princeton.edu); the classes are
    those of ILSVRC 2012 in the order of their synset numbers, which is the order of the published nets' outputs. Where
    that word means another class too, an addition tells them apart: "crane (bird)", "crane (machine)".
    """
    lines = (
        resources.files("repvgg_jax.weights").joinpath("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    )
    return tuple(line.partition(" ")[2] for line in lines)


def class_names_to_show(info: WeightsInfo) -> tuple[str, ...] | None:
    """Return the class names for a weight file's predictions: the file's own, or ImageNet's for a net of 1000 classes.

    The published files (the authors', timm's, MMPretrain's) name no classes; runs of `train.main` always do.
    """
    if info.class_names is None and info.num_classes == len(imagenet_class_names()):
        return imagenet_class_names()
    return info.class_names
