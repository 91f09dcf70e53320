"""What a weight file says of itself."""

import dataclasses

from ..preprocess import Preprocessing
from ..variants import Variant


@dataclasses.dataclass(frozen=True)
class WeightsInfo:
    """A weight file's contents, without the weights.

    Attributes:
      family: whose naming the file uses: `native`, …
      variant: the architecture.
      deploy: fused form.
      num_classes: width of the classifier.
      in_channels: input channels of the first convolution.
      dtype: storage dtype of the weights, as numpy names it.
      num_parameters: learned parameters (running statistics not counted).
      preprocessing: how images are to be prepared.
      class_names: names by class index, if the file has them.
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
