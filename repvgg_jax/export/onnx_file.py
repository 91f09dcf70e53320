"""Export to ONNX files."""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import numpy as np

from ..errors import ExportError
from ..extras import install_hint
from ..files import atomic_path
from ..net.model import RepVGG
from ..preprocess import Preprocessing, height_and_width
from ..quantization.net import QuantizedNet
from ..quantization.stack import LINEAR, POOL
from .deploy_net import Check, DeployNet, InputLayout, check_input_layout, deploy_net

OnnxTarget = Literal["onnxruntime", "tensorrt"]
"""Runtime whose rules a quantised graph follows. OpenVINO runs both kinds."""


def export_onnx(
    path: str | os.PathLike,
    model: RepVGG,
    variables: Mapping[str, Any],
    *,
    input_layout: InputLayout = "NCHW",
    image_size: int | tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: tuple[str, ...] | None = None,
    dynamic_size: bool = False,
    check: Check | None = None,
) -> None:
    """Write the deploy form as an ONNX file, atomically.

    The graph has the input `images` (float32, normalised, `[N, C, H, W]` or `[N, H, W, C]`, any N) and the output
    `logits` (float32 `[N, classes]`). Its metadata contains the variant, the layout, the preprocessing and the class
    names.

    Args:
      path: file to write.
      model: training form (fused here) or deploy form, with any computation dtype; the file is float32.
      variables: variables of `model`.
      input_layout: NCHW, the layout in which ONNX computes, or NHWC, which is transposed once at the input.
      image_size: size in pixels, one number or (height, width); that of `preprocessing` if None.
      preprocessing: preprocessing of the images; the variant's published evaluation preprocessing if None.
      class_names: names by class index.
      dynamic_size: accept any height and width; `image_size` then only records the size the net was made for.
      check: called with the written file before it is put in place. If it raises, no file is left.

    Raises:
      ExportError: onnx is not installed.
      WeightsError: the variables do not belong to this model, or contain NaN.
      FusionError: the training form cannot be fused.
      RepVGGError: the file cannot be written.
      ValueError: the layout is unknown, a size is not positive, or there is not one name per class.
    """
    check_onnx_installed()
    from .onnx_graph import build_onnx

    net = deploy_net(model, variables, input_layout, image_size, preprocessing, class_names, dynamic_size)
    built = build_onnx(net)
    with atomic_path(path) as temporary:
        temporary.write_bytes(built.SerializeToString())
        if check is not None:
            check(temporary)


def export_quantized_onnx(
    path: str | os.PathLike,
    net: QuantizedNet,
    *,
    input_layout: InputLayout = "NCHW",
    image_size: int | tuple[int, int] | None = None,
    dynamic_size: bool = False,
    target: OnnxTarget = "onnxruntime",
) -> None:
    """Write a quantised net as an ONNX file in QDQ form, atomically. Input and output are those of `export_onnx`.

    For ONNX Runtime, weights are int8, biases int32, and activations uint8 with the scales of `net`. The image's
    zero-point is 128: int8 represented as uint8, which runtimes fuse with the uint8 activations that follow. For
    TensorRT, all quantised tensors are int8 with a zero-point of 0, and biases are float32. Activations after a ReLU
    then have 128 steps instead of 256 for the same range, so the logits differ from those of `net`.

    Args:
      path: file to write.
      net: net from `quantize` or `load_quantized`.
      input_layout: NCHW, the layout in which ONNX computes, or NHWC, which is transposed once at the input.
      image_size: size in pixels, one number or (height, width); that of the net's preprocessing if None.
      dynamic_size: accept any height and width; `image_size` is then not used.
      target: runtime whose rules the graph follows. OpenVINO runs both kinds.

    Raises:
      ExportError: onnx is not installed.
      RepVGGError: the file cannot be written.
      ValueError: a size is not positive, or the target or layout is unknown.
    """
    if target not in get_args(OnnxTarget):
        raise ValueError(f"target must be {' or '.join(get_args(OnnxTarget))}, not {target!r}")
    check_input_layout(input_layout)
    check_onnx_installed()
    from .onnx_graph import build_onnx
    from .qdq import QDQOperations, TensorRTOperations

    if image_size is None:
        image_size = net.preprocessing.image_size
    height, width = height_and_width(image_size)
    params = jax.tree.map(np.asarray, net.params)
    blocks = {name: {"rbr_reparam": layer, **layer} for name, layer in params.items() if name not in (LINEAR, POOL)}
    described = DeployNet(
        RepVGG(net.variant, net.num_classes, deploy=True),
        blocks | {name: params[name] for name in (LINEAR, POOL)},
        net.in_channels,
        height,
        width,
        input_layout,
        net.preprocessing,
        net.class_names,
        dynamic_size,
    )
    built = build_onnx(described, TensorRTOperations if target == "tensorrt" else QDQOperations)
    with atomic_path(path) as temporary:
        temporary.write_bytes(built.SerializeToString())


def check_onnx_installed() -> None:
    """Raise ExportError with an installation hint if onnx is not installed."""
    if importlib.util.find_spec("onnx") is None:
        raise ExportError(f"writing ONNX needs onnx: {install_hint('export')}")
