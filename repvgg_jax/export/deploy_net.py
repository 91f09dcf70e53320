"""Common input of all exports: a net in deploy form, its parameters in float32, and the preprocessing of its images."""

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
"""Called with a written file under its temporary name, before it is put in place."""

INPUT, OUTPUT = "images", "logits"
"""Names of the input and the output, in all formats that have names."""


@dataclasses.dataclass(frozen=True)
class DeployNet:
    """A net to be exported.

    Attributes:
      model: deploy form, float32.
      params: parameters as float32 NumPy arrays, `{"stage0": {"rbr_reparam": {"kernel", "bias"}}, …, "linear"}`. For a
        quantised net, integers and scales in the same places, and `pool`.
      channels: number of input channels.
      height: image height in pixels.
      width: image width in pixels.
      input_layout: memory layout of a batch of images.
      preprocessing: preprocessing of the images.
      class_names: names by class index, or None.
      dynamic_size: whether the export accepts any height and width, if the format supports that.
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
        """Return the shape of one image in the order of `input_layout`."""
        if self.input_layout == "NCHW":
            return self.channels, self.height, self.width
        return self.height, self.width, self.channels

    def metadata(self) -> dict[str, str]:
        """Return the metadata to store in the file."""
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
    """Fuse the model if it is in training form, check it, and convert it to float32 for export.

    Args:
      model: training or deploy form.
      variables: variables of `model`, of any float dtype.
      input_layout: input layout of the exported net.
      image_size: size in pixels, one number or (height, width); that of `preprocessing` if None.
      preprocessing: preprocessing of the images; the variant's published evaluation preprocessing if None.
      class_names: names by class index.
      dynamic_size: accept any height and width.

    Raises:
      WeightsError: the variables do not belong to this model, or contain NaN.
      FusionError: the training form cannot be fused.
      ValueError: the layout is unknown, a size is not positive, or there is not one name per class.
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
