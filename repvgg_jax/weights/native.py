"""The native weight file: `.safetensors` with our own tensor names and a self-describing header.

Tensors are named as in the parameter tree (`params/stage1_0/rbr_dense/conv/kernel`), kernels HWIO. The header's
metadata holds one JSON object under `repvgg_jax`.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import WeightsError
from ..files import atomic_path
from ..model import RepVGG
from ..preprocess import Preprocessing
from ..variants import Variant, get_variant
from .info import WeightsInfo
from .layout import FlatArrays, flatten

HEADER = "repvgg_jax"
FORMAT_VERSION = 1


def write(
    path: str | os.PathLike,
    model: RepVGG,
    variables: Mapping[str, Any],
    preprocessing: Preprocessing,
    class_names: tuple[str, ...] | None,
) -> None:
    """Write `variables` to `path`, atomically.

    Raises:
      RepVGGError: the file cannot be written.
    """
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in flatten(variables).items()}
    header = {
        "version": FORMAT_VERSION,
        "variant": _variant_to_json(model.variant),
        "form": "deploy" if model.deploy else "training",
        "num_classes": model.num_classes,
        "preprocessing": preprocessing.to_dict(),
        "class_names": None if class_names is None else list(class_names),
    }
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata={HEADER: json.dumps(header)})


def read(path: str | os.PathLike) -> tuple[WeightsInfo, dict[str, np.ndarray]] | None:
    """What the file says of itself and its arrays; None if it is a safetensors file of another family.

    Raises:
      WeightsError: not a safetensors file, truncated, or with a damaged header.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if HEADER not in metadata:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"cannot read {path}: not a sound safetensors file ({error})") from error
    return _parse_header(metadata[HEADER], arrays, path), arrays


def _parse_header(text: str, arrays: FlatArrays, path: str | os.PathLike) -> WeightsInfo:
    try:
        header = json.loads(text)
        if header["version"] > FORMAT_VERSION:
            raise WeightsError(f"{path} has format version {header['version']}; this release reads {FORMAT_VERSION}")
        class_names = header["class_names"]
        return WeightsInfo(
            family="native",
            variant=_variant_from_json(header["variant"]),
            deploy={"training": False, "deploy": True}[header["form"]],
            num_classes=int(header["num_classes"]),
            in_channels=int(_first_kernel(arrays).shape[2]),
            dtype=str(_first_kernel(arrays).dtype),
            num_parameters=sum(a.size for name, a in arrays.items() if name.startswith("params/")),
            preprocessing=Preprocessing.from_dict(header["preprocessing"]),
            class_names=None if class_names is None else tuple(map(str, class_names)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"cannot read {path}: damaged header ({type(error).__name__}: {error})") from error


def _first_kernel(arrays: FlatArrays) -> np.ndarray:
    for name in ("params/stage0/rbr_dense/conv/kernel", "params/stage0/rbr_reparam/kernel"):
        if name in arrays and arrays[name].ndim == 4:
            return arrays[name]
    raise KeyError("stage0's kernel")


def _variant_to_json(variant: Variant) -> str | dict[str, Any]:
    """A published variant by name, any other by its numbers."""
    fields = dataclasses.asdict(variant)
    del fields["published"]
    try:
        return variant.name if get_variant(variant.name) == variant else fields
    except ValueError:
        return fields


def _variant_from_json(value: str | dict[str, Any]) -> Variant:
    if isinstance(value, str):
        return get_variant(value)
    return Variant(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
