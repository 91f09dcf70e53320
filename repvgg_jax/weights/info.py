"""What a weight file says of itself."""

import dataclasses

from ..preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from ..variants import Variant


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


def default_preprocessing(variant: Variant, in_channels: int = 3) -> Preprocessing:
    """The evaluation preprocessing that a variant's published accuracy belongs to.

    One-channel networks take the mean of ImageNet's three means and deviations.
    """
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if in_channels == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    return Preprocessing(variant.image_size, variant.crop_fraction, mean, std)
