"""Reading and writing weight files: our own, the authors', timm's, MMPretrain's."""

from .info import WeightsInfo, WeightsWarning, default_preprocessing
from .loading import inspect_weights, load_weights
from .saving import save_weights

__all__ = [
    "WeightsInfo",
    "WeightsWarning",
    "default_preprocessing",
    "inspect_weights",
    "load_weights",
    "save_weights",
]
