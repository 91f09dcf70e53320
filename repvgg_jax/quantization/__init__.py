"""INT8: post-training quantisation, quantisation-aware training, and nets that compute in integers."""

from .adaround import AdaRoundOptions
from .methods import METHODS, Method, quantize
from .net import QuantizedNet

__all__ = ["METHODS", "AdaRoundOptions", "Method", "QuantizedNet", "quantize"]
