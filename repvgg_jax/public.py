"""Public names of the package. `repvgg_jax` loads this module when the first of them is used."""

from .errors import (
    ConfigError,
    DataError,
    ExportError,
    FusionError,
    QuantizationError,
    RepVGGError,
    UnknownModelError,
    WeightsError,
)
from .export import export_onnx, export_quantized_onnx, export_saved_model, export_stablehlo
from .inference.predictor import make_predictor
from .net.branches import Branches
from .net.fusion import equivalent_kernel_bias, fuse_variables, to_deploy
from .net.model import RepVGG, create_model
from .net.variants import Variant, list_models
from .preprocess import Preprocessing
from .quantization import QuantizedNet, load_quantized, quantize, report_table, save_quantized
from .version import __version__
from .weights import (
    WeightsInfo,
    from_hub,
    inspect_weights,
    load_pretrained,
    load_weights,
    push_to_hub,
    save_weights,
)

__all__ = [
    "Branches",
    "ConfigError",
    "DataError",
    "ExportError",
    "FusionError",
    "Preprocessing",
    "QuantizationError",
    "QuantizedNet",
    "RepVGG",
    "RepVGGError",
    "UnknownModelError",
    "Variant",
    "WeightsError",
    "WeightsInfo",
    "__version__",
    "create_model",
    "equivalent_kernel_bias",
    "export_onnx",
    "export_quantized_onnx",
    "export_saved_model",
    "export_stablehlo",
    "from_hub",
    "fuse_variables",
    "inspect_weights",
    "list_models",
    "load_pretrained",
    "load_quantized",
    "load_weights",
    "make_predictor",
    "push_to_hub",
    "quantize",
    "report_table",
    "save_quantized",
    "save_weights",
    "to_deploy",
]
