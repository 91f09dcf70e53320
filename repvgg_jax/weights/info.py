"""What a weight file says of itself."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..net.variants import Variant
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
    """The evaluation preprocessing that a variant's published accuracy belongs to.

    One-channel networks take the mean of ImageNet's three means and deviations.
    """
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if in_channels == 1:
        mean, std = in_grey(mean), in_grey(std)
    return Preprocessing(variant.image_size, variant.crop_fraction, mean, std)


def preprocessing_from_file(fields: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing that a file of unknown origin describes.

    Raises:
      ValueError, TypeError, AttributeError: it describes none, or one that makes no sense.
    """
    found = Preprocessing.from_dict(fields)
    if type(found.image_size) is not int or found.image_size > MAX_IMAGE_SIZE:
        raise ValueError(f"image_size is no integer up to {MAX_IMAGE_SIZE}")
    if not all(math.isfinite(number) for number in (*found.mean, *found.std)):
        raise ValueError("mean and std must be finite")
    return found


MAX_CLASS_NAMES = 20
"""As many names are shown of a file's classes."""


def file_summary(path: str, info: WeightsInfo) -> str:
    """Describe a weight file in some lines: net, form, input, preprocessing, classes."""
    form = "INT8 deploy" if info.quantized else "deploy" if info.deploy else "training"
    how = info.preprocessing
    colours = {1: "grey", 3: "RGB"}.get(info.in_channels, f"{info.in_channels} channels")
    crop = f"shorter side resized to {how.resize_size}, then the central {how.image_size}x{how.image_size}"
    classes = f"{info.num_classes}" if info.num_classes else "none: no classifier"
    if info.class_names:
        shown = ", ".join(info.class_names[:MAX_CLASS_NAMES])
        hidden = len(info.class_names) - MAX_CLASS_NAMES
        classes += f": {shown}{f' and {hidden} more' if hidden > 0 else ''}"
    elif info.num_classes:
        classes += ", names unknown"
    return "\n".join(
        (
            f"{path}: {info.variant.name}, {form} form",
            f"  weights   {info.num_parameters:,} parameters, {info.dtype}, {info.family} names",
            f"  images    {how.image_size}x{how.image_size} {colours}: {crop}",
            f"  mean      {_numbers(how.mean)} (of pixel values in 0..1)",
            f"  std       {_numbers(how.std)}",
            f"  classes   {classes}",
        )
    )


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
