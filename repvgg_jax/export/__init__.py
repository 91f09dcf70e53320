"""Deploy-form nets as files that other runtimes run: ONNX."""

from .onnx_file import export_onnx

__all__ = ["export_onnx"]
