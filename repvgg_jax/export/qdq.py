"""A quantised net as ONNX in QDQ form: the float graph with QuantizeLinear and DequantizeLinear around every layer.

Runtimes with integer kernels (ONNX Runtime, OpenVINO, TensorRT) recognise DequantizeLinear, Conv, QuantizeLinear and
compute it in 8 bits; any other runs the graph as it stands, in float. What they take differs: on CPUs activations after
a ReLU are unsigned, while TensorRT has signed ones alone (`TensorRTLayers`).
"""

import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import numpy as np

from ..files import atomic_path
from ..net.model import RepVGG
from ..preprocess import height_and_width
from ..quantization.calibration import input_dtype
from ..quantization.net import QuantizedNet, dequantized, is_quantized
from ..quantization.quantizer import SIGNED, levels
from ..quantization.stack import LINEAR, POOL
from .deploy_net import DeployNet, InputLayout, check_input_layout
from .onnx_file import check_onnx_installed

OnnxTarget = Literal["onnxruntime", "tensorrt"]
"""Whose rules a quantised graph follows; OpenVINO runs both kinds."""


def export_quantized_onnx(
    path: str | os.PathLike,
    net: QuantizedNet,
    *,
    input_layout: InputLayout = "NCHW",
    image_size: int | tuple[int, int] | None = None,
    dynamic_size: bool = False,
    target: OnnxTarget = "onnxruntime",
) -> None:
    """Write a quantised net as an ONNX file in QDQ form, atomically; input and output as `export_onnx` has them.

    For ONNX Runtime, weights are int8, biases int32, activations uint8 with the scales of `net`, and the image's
    zero-point is 128: int8 in the form of uint8, which runtimes fuse with the uint8 that follows. For TensorRT,
    everything quantised is int8 with a zero-point of 0 and biases are float32; activations after a ReLU then have 128
    steps in place of 256 for the same range, so that the logits are not those of `net`.

    Args:
      path: where to write.
      net: from `quantize` or `load_quantized`.
      input_layout: NCHW, as ONNX computes, or NHWC, transposed once in front.
      image_size: pixels, one number or (height, width); the preprocessing's if None.
      dynamic_size: leave height and width free in the file; `image_size` is then not used.
      target: the runtime whose rules the graph follows. OpenVINO runs both kinds.

    Raises:
      ExportError: onnx is not installed.
      RepVGGError: the file cannot be written.
      ValueError: a non-positive size, or an unknown target or layout.
    """
    if target not in get_args(OnnxTarget):
        raise ValueError(f"target must be {' or '.join(get_args(OnnxTarget))}, not {target!r}")
    check_input_layout(input_layout)
    check_onnx_installed()
    from .onnx_graph import build_onnx

    if image_size is None:
        image_size = net.preprocessing.image_size
    height, width = height_and_width(image_size)
    params = jax.tree.map(np.asarray, net.params)
    blocks = {name: {"rbr_reparam": layer, **layer} for name, layer in params.items() if name not in (LINEAR, POOL)}
    described = DeployNet(
        RepVGG(net.variant, net.num_classes, deploy=True),
        blocks | {LINEAR: params[LINEAR]},
        net.in_channels,
        height,
        width,
        input_layout,
        net.preprocessing,
        net.class_names,
        dynamic_size,
    )
    layers = TensorRTLayers if target == "tensorrt" else QuantizedLayers
    built = build_onnx(described, layers(params[POOL]["input_scale"]))
    with atomic_path(path) as temporary:
        temporary.write_bytes(built.SerializeToString())


class QuantizedLayers:
    """How a quantised net's layers are written (`onnx_graph.Layers`); those left in float as `FloatLayers` writes them.

    Args:
      pool_scale: of what the global average pool reads.
    """

    def __init__(self, pool_scale: Any):
        from .onnx_graph import FloatLayers

        self._pool_scale = pool_scale
        self._float = FloatLayers()

    def conv(self, graph: Any, x: str, name: str, params: Mapping[str, np.ndarray], **attributes: Any) -> str:
        """QuantizeLinear, DequantizeLinear, and `Conv` of dequantised weights."""
        if not is_quantized(params):
            return self._float.conv(graph, x, name, params, **attributes)
        x = self._activations(graph, x, name, params["input_scale"], input_dtype(name.partition("/")[0]))
        kernel = _constant(graph, f"{name}/kernel", params["kernel"].transpose(3, 2, 0, 1), params["kernel_scale"], 0)
        return graph.node("Conv", [x, kernel, self._bias(graph, name, params)], name, **attributes)

    def linear(self, graph: Any, x: str, name: str, params: Mapping[str, np.ndarray]) -> str:
        """The same for `Gemm`."""
        if not is_quantized(params):
            return self._float.linear(graph, x, name, params)
        x = self._activations(graph, x, name, params["input_scale"], input_dtype(name))
        kernel = _constant(graph, f"{name}/kernel", params["kernel"], params["kernel_scale"], 1)
        return graph.node("Gemm", [x, kernel, self._bias(graph, name, params)], name)

    def pool(self, graph: Any, x: str) -> str:
        """The average over pixels of the last block's integers."""
        return self._float.pool(graph, self._activations(graph, x, POOL, self._pool_scale, input_dtype(POOL)))

    def _activations(self, graph: Any, x: str, name: str, scale: Any, dtype: np.dtype) -> str:
        """Activations on their way through 8 bits; int8 as uint8 around 128."""
        return _quantized(graph, x, name, np.float32(scale), np.uint8(128 if dtype == SIGNED else 0))

    def _bias(self, graph: Any, name: str, params: Mapping[str, np.ndarray]) -> str:
        unit = np.float32(params["input_scale"]) * params["kernel_scale"]
        return _constant(graph, f"{name}/bias", params["bias"], unit, 0)


class TensorRTLayers(QuantizedLayers):
    """As TensorRT's ONNX parser takes them: int8 alone, zero-points of 0, biases in float32.

    "Working with Quantized Types", https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/
    work-quantized-types.html: symmetric quantisation, activations per tensor, weights per tensor or output channel.
    A DequantizeLinear of an int32 bias is refused (NVIDIA/TensorRT and onnx/onnx-tensorrt issue 850).
    """

    def linear(self, graph: Any, x: str, name: str, params: Mapping[str, np.ndarray]) -> str:
        """`Gemm` with its kernel as `[classes, C]`, so that output channels are axis 0 in every layer."""
        if not is_quantized(params):
            return self._float.linear(graph, x, name, params)
        x = self._activations(graph, x, name, params["input_scale"], input_dtype(name))
        kernel = _constant(graph, f"{name}/kernel", params["kernel"].T, params["kernel_scale"], 0)
        return graph.node("Gemm", [x, kernel, self._bias(graph, name, params)], name, transB=1)

    def _activations(self, graph: Any, x: str, name: str, scale: Any, dtype: np.dtype) -> str:
        """The same range in int8: what 255 stood for is 127's."""
        return _quantized(graph, x, name, np.float32(scale * (levels(dtype) / levels(SIGNED))), np.int8(0))

    def _bias(self, graph: Any, name: str, params: Mapping[str, np.ndarray]) -> str:
        return graph.constant(f"{name}/bias", np.asarray(dequantized(params)["bias"], np.float32))


def _quantized(graph: Any, x: str, name: str, scale: np.float32, zero: np.uint8 | np.int8) -> str:
    parameters = [graph.constant(f"{name}/input_scale", scale), graph.constant(f"{name}/input_zero", zero)]
    x = graph.node("QuantizeLinear", [x, *parameters], f"{name}/quantize")
    return graph.node("DequantizeLinear", [x, *parameters], f"{name}/dequantize")


def _constant(graph: Any, name: str, integers: np.ndarray, scale: np.ndarray, axis: int) -> str:
    """Integers of the file that the graph reads as real numbers; one scale for all where all are the same."""
    shared = len(np.unique(scale)) == 1
    scale = scale[0] if shared else scale
    parameters = [
        graph.constant(f"{name}_scale", np.asarray(scale, np.float32)),
        graph.constant(f"{name}_zero", np.zeros(np.shape(scale), integers.dtype)),
    ]
    integers_name = graph.constant(f"{name}_integers", integers)
    attributes = {} if shared else {"axis": axis}
    return graph.node("DequantizeLinear", [integers_name, *parameters], name, **attributes)
