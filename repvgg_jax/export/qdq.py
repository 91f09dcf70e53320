"""A quantised net as an ONNX graph in QDQ form: the float graph with QuantizeLinear and DequantizeLinear around layers.

Runtimes with integer kernels (ONNX Runtime, OpenVINO, TensorRT) recognise the pattern DequantizeLinear, Conv,
QuantizeLinear and compute it in 8 bits; others run the graph literally, in float. Their requirements differ: on CPUs,
activations after a ReLU are unsigned, while TensorRT supports only signed ones (`TensorRTOperations`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..quantization.calibration import input_dtype
from ..quantization.net import dequantized, is_quantized
from ..quantization.quantizer import SIGNED, levels
from ..quantization.stack import LINEAR, POOL
from .onnx_graph import OnnxOperations


class QDQOperations(OnnxOperations):
    """Operations for `walk` that add a quantised net to a graph. Layers that are in float stay in float."""

    output_axis = 1
    """Output axis of the classifier's kernel."""

    def write_conv(self, x: str, name: str, params: Mapping[str, np.ndarray], **attributes: Any) -> str:
        """Add QuantizeLinear, DequantizeLinear, and a `Conv` with dequantised weights."""
        if not is_quantized(params):
            return super().write_conv(x, name, params, **attributes)
        x = self.write_input(x, name, params["input_scale"], input_dtype(name.partition("/")[0]))
        kernel = self.write_integers(f"{name}/kernel", params["kernel"].transpose(3, 2, 0, 1), params["kernel_scale"])
        return self.graph.node("Conv", [x, kernel, self.write_bias(name, params)], name, **attributes)

    def pool(self, x: str) -> str:
        """Add QuantizeLinear, DequantizeLinear, and the mean over all pixels."""
        return super().pool(self.write_input(x, POOL, self.net.params[POOL]["input_scale"], input_dtype(POOL)))

    def linear(self, x: str) -> str:
        """Add QuantizeLinear, DequantizeLinear, and a `Gemm` with dequantised weights."""
        params = self.net.params[LINEAR]
        if not is_quantized(params):
            return super().linear(x)
        x = self.write_input(x, LINEAR, params["input_scale"], input_dtype(LINEAR))
        kernel, attributes = (params["kernel"], {}) if self.output_axis else (params["kernel"].T, {"transB": 1})
        kernel = self.write_integers(f"{LINEAR}/kernel", kernel, params["kernel_scale"], self.output_axis)
        return self.graph.node("Gemm", [x, kernel, self.write_bias(LINEAR, params)], LINEAR, **attributes)

    @staticmethod
    def scale_and_zero(scale: Any, dtype: np.dtype) -> tuple[Any, Any]:
        """Return scale and zero-point of an activation. int8 becomes uint8 with zero-point 128."""
        return scale, np.uint8(128 if dtype == SIGNED else 0)

    def write_input(self, x: str, name: str, scale: Any, dtype: np.dtype) -> str:
        """Add QuantizeLinear and DequantizeLinear for a layer's input."""
        scale, zero = self.scale_and_zero(scale, dtype)
        parameters = [
            self.graph.constant(f"{name}/input_scale", np.float32(scale)),
            self.graph.constant(f"{name}/input_zero", zero),
        ]
        x = self.graph.node("QuantizeLinear", [x, *parameters], f"{name}/quantize")
        return self.graph.node("DequantizeLinear", [x, *parameters], f"{name}/dequantize")

    def write_bias(self, name: str, params: Mapping[str, np.ndarray]) -> str:
        """Add a bias in int32."""
        unit = np.float32(params["input_scale"]) * params["kernel_scale"]
        return self.write_integers(f"{name}/bias", params["bias"], unit)

    def write_integers(self, name: str, integers: np.ndarray, scale: np.ndarray, axis: int = 0) -> str:
        """Add integers and their DequantizeLinear, with a single scale if all scales are the same."""
        shared = len(np.unique(scale)) == 1
        scale = scale[0] if shared else scale
        parameters = [
            self.graph.constant(f"{name}_scale", np.asarray(scale, np.float32)),
            self.graph.constant(f"{name}_zero", np.zeros(np.shape(scale), integers.dtype)),
        ]
        integers_name = self.graph.constant(f"{name}_integers", integers)
        attributes = {} if shared else {"axis": axis}
        return self.graph.node("DequantizeLinear", [integers_name, *parameters], name, **attributes)


class TensorRTOperations(QDQOperations):
    """Operations that follow the rules of TensorRT's ONNX parser: only int8, zero-points of 0, biases in float32.

    "Working with Quantized Types", https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/
    work-quantized-types.html: symmetric quantisation, activations per tensor, weights per tensor or output channel.
    A DequantizeLinear of an int32 bias is refused (NVIDIA/TensorRT and onnx/onnx-tensorrt issue 850).
    """

    output_axis = 0  # in every layer

    @staticmethod
    def scale_and_zero(scale: Any, dtype: np.dtype) -> tuple[Any, Any]:
        """Return the scale for the same range in int8, so that 127 stands for the value that 255 stood for."""
        return scale * (levels(dtype) / levels(SIGNED)), np.int8(0)

    def write_bias(self, name: str, params: Mapping[str, np.ndarray]) -> str:
        """Add a bias in float32."""
        return self.graph.constant(f"{name}/bias", np.asarray(dequantized(params)["bias"], np.float32))
