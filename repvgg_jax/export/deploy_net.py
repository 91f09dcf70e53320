"""Common input of all exports: a net in deploy form, with float32 parameters and its preprocessing."""

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
"""Function that checks a file under its temporary name; if it raises, nothing is written."""

INPUT, OUTPUT = "images", "logits"
"""Names of the input and the output, in formats that have names."""


@dataclasses.dataclass(frozen=True)
class DeployNet:
    """A net ready to be exported.

    Attributes:
      model: the model in deploy form, float32.
      params: the parameters as float32 NumPy arrays, `{"stage0": {"rbr_reparam": {"kernel", "bias"}}, …, "linear"}`;
        for a quantised net, integers and scales under the same keys, and `pool`.
      channels: channels of an image.
      height: height of an image, in pixels.
      width: width of an image, in pixels.
      input_layout: memory layout of a batch of images.
      preprocessing: how images are prepared.
      class_names: names by class index, or None.
      dynamic_size: leave height and width free, if the format supports it.
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
        """Return the shape of one image in `input_layout`."""
        if self.input_layout == "NCHW":
            return self.channels, self.height, self.width
        return self.height, self.width, self.channels

    def metadata(self) -> dict[str, str]:
        """Return the metadata of an exported file."""
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
    """Return a net for export: fused, checked, and in float32, whatever dtype the model computes in.

    Args:
      model: model in training or deploy form.
      variables: the model's variables, of any float dtype.
      input_layout: layout of the exported net's input.
      image_size: in pixels, one number or (height, width); the preprocessing's if None.
      preprocessing: how images are prepared; the variant's published evaluation if None.
      class_names: names by class index.
      dynamic_size: leave height and width free.

    Returns:
      The net in deploy form.

    Raises:
      WeightsError: the variables do not belong to the model, or contain NaN.
      FusionError: the training form cannot be fused.
      ValueError: the layout is unknown, the size is not positive, or there is not one name per class.
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
    """Raise ValueError unless the layout is NCHW or NHWC."""
    if input_layout not in get_args(InputLayout):
        raise ValueError(f"input_layout must be {' or '.join(get_args(InputLayout))}, not {input_layout!r}")


def _float32(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _float32(child) if isinstance(child, Mapping) else np.asarray(child).astype(np.float32)
        for name, child in tree.items()
    }
