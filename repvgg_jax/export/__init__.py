"""Deploy-form nets as files that other runtimes run: ONNX."""

from .onnx_file import export_onnx
from .qdq import export_quantized_onnx

__all__ = ["export_onnx", "export_quantized_onnx"]
