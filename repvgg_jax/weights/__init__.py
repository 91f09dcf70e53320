"""Reading and writing weight files in the native format and in those of the authors, timm and MMPretrain."""

from .info import WeightsInfo, WeightsWarning, default_preprocessing
from .loading import inspect_weights, load_weights
from .saving import save_weights
from .sharing import from_hub, load_pretrained, push_to_hub

__all__ = [
    "WeightsInfo",
    "WeightsWarning",
    "default_preprocessing",
    "from_hub",
    "inspect_weights",
    "load_pretrained",
    "load_weights",
    "push_to_hub",
    "save_weights",
]
