"""The quantised weight file: a native file of form `int8`, with each layer's scales next to its integers.

`params/stage1_0/{kernel int8, kernel_scale, bias int32, input_scale}`, or `{kernel, bias}` in float32 for a layer left
in float; `params/pool/input_scale`; gates (`se`, `post_se`) as in the deploy form.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import WeightsError, shown
from ..net.layout import check_finite, check_shapes, expected_shapes
from ..net.variants import Variant
from ..trees import unflatten
from .info import WeightsInfo
from .tensor_file import TensorFile

REPARAM, SCALE, INPUT_SCALE = "/rbr_reparam/", "kernel_scale", "input_scale"


def expected_tensors(variant: Variant, num_classes: int, in_channels: int, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return name -> (shape, dtype) of all tensors; the layers with a scale in `names` are quantised."""
    expected: dict[str, Any] = {"params/pool/input_scale": ((), "float32")}
    for name, shape in expected_shapes(variant, True, num_classes, in_channels).items():
        layer, _, leaf = name.replace(REPARAM, "/").rpartition("/")
        is_gate = layer.count("/") > 1
        if is_gate or f"{layer}/{SCALE}" not in names:
            expected[f"{layer}/{leaf}"] = (shape, "float32")
        else:
            expected[f"{layer}/{leaf}"] = (shape, "int8" if leaf == "kernel" else "int32")
            expected[f"{layer}/{SCALE}"] = (shape[-1:], "float32")
            expected[f"{layer}/{INPUT_SCALE}"] = ((), "float32")
    return expected


def check_tensors(file: TensorFile, info: WeightsInfo, where: str) -> None:
    """Check that a file has exactly the tensors of a quantised net.

    Raises:
      WeightsError: tensors are missing, unexpected, or of another shape or dtype; the message lists them.
    """
    expected = expected_tensors(info.variant, info.num_classes, info.in_channels, file.tensors)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    check_shapes(shapes, {name: shape for name, (shape, _) in expected.items()}, where, f"an INT8 {info.variant.name}")
    for name, (_, dtype) in expected.items():
        if file.tensors[name].dtype != dtype:
            raise WeightsError(f"{where}: {shown(name)} has {file.tensors[name].dtype} values, not {dtype}")


def read_tensors(file: TensorFile, where: str) -> dict[str, Any]:
    """Return the tree under `params` after checking its values.

    Raises:
      WeightsError: a value is not finite, or a scale is not positive.
    """
    arrays = {}
    for name, tensor in file.tensors.items():
        array = arrays[name] = np.array(file.read(tensor))
        if array.dtype.kind == "f":
            check_finite(array, name, where)
        if name.endswith("_scale") and not (array > 0).all():
            raise WeightsError(f"{where}: {shown(name)} has scales that are not positive")
    return unflatten(arrays)["params"]
