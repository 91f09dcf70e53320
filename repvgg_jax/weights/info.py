"""What a weight file says of itself."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..errors import first_ten
from ..net.kernel_algebra import BN_EPSILON
from ..net.variants import VARIANTS, Variant
from ..preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, in_grey

MAX_IMAGE_SIZE = 16_384
"""Pixels. A file of unknown origin must not choose how much memory a prediction takes."""


class WeightsWarning(UserWarning):
    """Something a user should hear about a weight file that was loaded nevertheless, such as a fresh classifier."""


@dataclasses.dataclass(frozen=True)
class WeightsInfo:
    """A weight file's contents, without the weights.

    Attributes:
      family: whose naming the file uses: `native`, or one of `key_maps.FAMILIES`.
      variant: the architecture; called `custom` if it is none of the published ones.
      deploy: fused form.
      num_classes: width of the classifier; 0 if the file has none.
      in_channels: input channels of the first convolution.
      dtype: storage dtype of the weights, as numpy names it.
      num_parameters: learned parameters (running statistics not counted).
      preprocessing: how images are to be prepared.
      class_names: names by class index, if the file has them.
      num_batches_tracked: training steps that the BN statistics have seen, if the file tells.
      quantized: a net in 8 bits, for `load_quantized`; `dtype` is int8 then, though some layers may be in float.
    """

    family: str
    variant: Variant
    deploy: bool
    num_classes: int
    in_channels: int
    dtype: str
    num_parameters: int
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    num_batches_tracked: int | None = None
    quantized: bool = False


def default_preprocessing(variant: Variant, in_channels: int = 3) -> Preprocessing:
    """Return the evaluation preprocessing that a variant's published accuracy belongs to.

    One-channel networks take the mean of ImageNet's three means and deviations.
    """
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if in_channels == 1:
        mean, std = in_grey(mean), in_grey(std)
    return Preprocessing(variant.image_size, variant.crop_fraction, mean, std)


def preprocessing_from_file(fields: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing that a file of unknown origin describes.

    Raises:
      ValueError, TypeError, AttributeError: it describes none, or one that makes no sense.
    """
    found = Preprocessing.from_dict(fields)
    if type(found.image_size) is not int or found.image_size > MAX_IMAGE_SIZE:
        raise ValueError(f"image_size is not an integer up to {MAX_IMAGE_SIZE}")
    if not all(math.isfinite(number) for number in (*found.mean, *found.std)):
        raise ValueError("mean and std must be finite")
    return found


def describe(path: str, info: WeightsInfo) -> str:
    """Say what a file is, on three lines: the net, its images, its classes."""
    form = "INT8 deploy" if info.quantized else "deploy" if info.deploy else "training"
    classes = f"{info.num_classes} classes" if info.num_classes else "no classifier"
    variant = info.variant.name
    if dataclasses.replace(info.variant, epsilon=BN_EPSILON) != VARIANTS.get(variant):
        if info.variant.block == "qarepvgg":
            variant += " with QARepVGG blocks"
        variant += f" (blocks {info.variant.num_blocks}, widths {info.variant.widths}, groups {info.variant.groups})"
    if info.variant.epsilon != BN_EPSILON and not info.deploy:
        variant += f" with BatchNorm epsilon {info.variant.epsilon:g}"
    images = info.preprocessing
    mean, std = (", ".join(f"{number:.6g}" for number in numbers) for numbers in (images.mean, images.std))
    names = "not in the file" if info.class_names is None else first_ten(info.class_names)
    return (
        f"{path}: {variant}, {form} form, {info.family} names, {classes}, {info.in_channels} input channels, "
        f"{info.dtype}, {info.num_parameters:,} parameters\n"
        f"images: {images.image_size} pixels, centre crop {images.crop_fraction:g} of the shorter side resized to "
        f"{images.resize_size}, mean {mean}, std {std} (of pixel values in 0..1)\nclass names: {names}"
    )
