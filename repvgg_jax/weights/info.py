"""Description of a weight file."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..errors import first_ten
from ..net.kernel_algebra import BN_EPSILON
from ..net.variants import VARIANTS, Variant
from ..preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, in_grey

MAX_IMAGE_SIZE = 16_384
"""In pixels. Limits the memory that a file of unknown origin can make a prediction take."""


class WeightsWarning(UserWarning):
    """Warning about a weight file that was loaded nevertheless, for example with a newly initialised classifier."""


@dataclasses.dataclass(frozen=True)
class WeightsInfo:
    """Description of a weight file, without the weights.

    Attributes:
      family: naming scheme of the file: `native`, or one of `key_maps.FAMILIES`.
      variant: the architecture; called `custom` if it is not a published one.
      deploy: whether it is the deploy (fused) form.
      num_classes: number of classes; 0 without a classifier.
      in_channels: input channels of the first convolution.
      dtype: numpy name of the weights' storage dtype.
      num_parameters: number of learned parameters, without running statistics.
      preprocessing: how images are prepared.
      class_names: names by class index, if the file has them.
      num_batches_tracked: training steps that the BN statistics have seen, if the file contains it.
      quantized: whether it is an 8-bit net, for `load_quantized`; `dtype` is int8 then, though some layers may be
        float.
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
    """Return the evaluation preprocessing for which a variant's accuracy was published.

    For one-channel networks, mean and std are those of ImageNet averaged over its three channels.
    """
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if in_channels == 1:
        mean, std = in_grey(mean), in_grey(std)
    return Preprocessing(variant.image_size, variant.crop_fraction, mean, std)


def preprocessing_from_file(fields: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing that a file of unknown origin describes.

    Raises:
      ValueError, TypeError, AttributeError: the fields do not describe a valid preprocessing.
    """
    preprocessing = Preprocessing.from_dict(fields)
    if type(preprocessing.image_size) is not int or preprocessing.image_size > MAX_IMAGE_SIZE:
        raise ValueError(f"image_size is not an integer up to {MAX_IMAGE_SIZE}")
    if not all(math.isfinite(number) for number in (*preprocessing.mean, *preprocessing.std)):
        raise ValueError("mean and std must be finite")
    return preprocessing


def describe(path: str, info: WeightsInfo) -> str:
    """Return a description of a weight file on three lines: the net, its images, its classes."""
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
