"""INT8: post-training quantisation, quantisation-aware training, and integer inference."""

from .adaround import AdaRoundOptions
from .methods import METHODS, Method, quantize
from .net import QuantizedNet
from .report import LayerReport, report_table
from .weight_files import load_quantized, save_quantized

__all__ = [
    "METHODS",
    "AdaRoundOptions",
    "LayerReport",
    "Method",
    "QuantizedNet",
    "load_quantized",
    "quantize",
    "report_table",
    "save_quantized",
]
