"""Export of deploy-form nets to other runtimes: ONNX, StableHLO and TensorFlow's SavedModel."""

from .onnx_file import export_onnx, export_quantized_onnx
from .saved_model import export_saved_model
from .stablehlo import export_stablehlo

__all__ = ["export_onnx", "export_quantized_onnx", "export_saved_model", "export_stablehlo"]
