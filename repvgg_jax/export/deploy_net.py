"""What every export starts from: one net in deploy form, its numbers in float32, and how its images are prepared."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from ..net.fusion import to_deploy
from ..net.layout import check_variables
from ..net.model import RepVGG
from ..preprocess import Preprocessing, height_and_width
from ..trees import flatten
from ..weights.info import default_preprocessing

InputLayout = Literal["NCHW", "NHWC"]

Check = Callable[[Path], object]
"""What a caller may do with a file, under its temporary name, before it counts as written."""

INPUT, OUTPUT = "images", "logits"
"""Names of the input and the output, in every format that has names."""


@dataclasses.dataclass(frozen=True)
class DeployNet:
    """A net ready to be written.

    Attributes:
      model: deploy form, float32.
      params: its parameters as float32 NumPy arrays, `{"stage0": {"rbr_reparam": {"kernel", "bias"}}, …, "linear"}`;
        of a quantised net, its integers and scales in the same places, and `pool`.
      channels: of an image.
      height, width: of an image.
      input_layout: how a batch of images lies in memory.
      preprocessing: what makes an image network input.
      class_names: names by class index, if they are known.
      dynamic_size: whether height and width are to stay free, where the format can say so.
    """

    model: RepVGG
    params: Mapping[str, Any]
    channels: int
    height: int
    width: int
    input_layout: InputLayout
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    dynamic_size: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return the shape of one image, as `input_layout` orders it."""
        if self.input_layout == "NCHW":
            return self.channels, self.height, self.width
        return self.height, self.width, self.channels

    def metadata(self) -> dict[str, str]:
        """Return what a file says of itself, besides the net."""
        size = self.height if self.height == self.width else [self.height, self.width]
        entries = {
            "variant": self.model.variant.name,
            "input_layout": self.input_layout,
            "preprocessing": json.dumps(self.preprocessing.to_dict() | {"image_size": size}),
        }
        if self.class_names is not None:
            entries["class_names"] = json.dumps(self.class_names)
        return entries


def deploy_net(
    model: RepVGG,
    variables: Mapping[str, Any],
    input_layout: InputLayout,
    image_size: int | tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: tuple[str, ...] | None = None,
    dynamic_size: bool = False,
) -> DeployNet:
    """Fuse a training form, and check what is to be written; float32 throughout, whatever the model computes in.

    Args:
      model: training or deploy form.
      variables: its variables, of any float dtype.
      input_layout: of the exported net's input.
      image_size: pixels, one number or (height, width); the preprocessing's if None.
      preprocessing: what makes an image network input; the variant's published evaluation if None.
      class_names: names by class index.
      dynamic_size: leave height and width free.

    Raises:
      WeightsError: the variables are not this model's, or have NaN.
      FusionError: a training form that cannot be fused.
      ValueError: an unknown layout, a non-positive size, or not one name for each class.
    """
    check_input_layout(input_layout)
    if class_names is not None and len(class_names) != model.num_classes:
        raise ValueError(f"{len(class_names)} class names for a model of {model.num_classes} classes")
    if not model.deploy:
        model, variables = to_deploy(model, variables)
    channels = check_variables(flatten(variables), model.variant, True, model.num_classes)
    preprocessing = preprocessing or default_preprocessing(model.variant, channels)
    if image_size is None:
        image_size = preprocessing.image_size
    height, width = height_and_width(image_size)
    params = _float32(variables["params"])
    model = model.clone(dtype=jnp.float32, param_dtype=jnp.float32)
    return DeployNet(model, params, channels, height, width, input_layout, preprocessing, class_names, dynamic_size)


def check_input_layout(input_layout: str) -> None:
    """Raise ValueError for anything but NCHW and NHWC."""
    if input_layout not in get_args(InputLayout):
        raise ValueError(f"input_layout must be {' or '.join(get_args(InputLayout))}, not {input_layout!r}")


def _float32(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _float32(child) if isinstance(child, Mapping) else np.asarray(child).astype(np.float32)
        for name, child in tree.items()
    }
