"""The native weight file: `.safetensors` with our own tensor names and a self-describing header.

Tensors are named as in the parameter tree (`params/stage1_0/rbr_dense/conv/kernel`), kernels HWIO. The header's
metadata holds one JSON object under `repvgg_jax`.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..activations import ACTIVATIONS
from ..errors import WeightsError
from ..model import RepVGG
from ..preprocess import Preprocessing
from ..variants import OUTPUT_STRIDES, Branches, Variant, checked_epsilon, get_variant
from .info import WeightsInfo, preprocessing_from_file
from .layout import flatten, shown
from .safetensors_file import write_safetensors
from .tensor_file import Tensor, TensorFile

HEADER = "repvgg_jax"
FORMAT_VERSION = 1
TRAINING, DEPLOY, INT8 = "training", "deploy", "int8"
IS_DEPLOY = {TRAINING: False, DEPLOY: True, INT8: True}
"""The forms of a net that a file can hold."""

MAX_STEPS = 2**63 - 1
"""Of a BN step counter, which PyTorch keeps as int64."""


def write(
    path: str | os.PathLike,
    model: RepVGG,
    variables: Mapping[str, Any],
    preprocessing: Preprocessing,
    class_names: tuple[str, ...] | None,
    num_batches_tracked: int | None = None,
) -> None:
    """Write `variables` to `path`, atomically.

    Raises:
      RepVGGError: the file cannot be written.
    """
    described = (preprocessing, class_names, num_batches_tracked)
    form = DEPLOY if model.deploy else TRAINING
    write_form(path, form, model.variant, model.num_classes, variables, *described)


def write_form(
    path: str | os.PathLike,
    form: str,
    variant: Variant,
    num_classes: int,
    variables: Mapping[str, Any],
    preprocessing: Preprocessing,
    class_names: tuple[str, ...] | None,
    num_batches_tracked: int | None = None,
) -> None:
    """Write a tree of arrays as a file of one of the forms in `IS_DEPLOY`, atomically.

    Raises:
      RepVGGError: the file cannot be written.
    """
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in flatten(variables).items()}
    header = {
        "version": FORMAT_VERSION,
        "variant": _variant_to_json(variant),
        "form": form,
        "num_classes": num_classes,
        "preprocessing": preprocessing.to_dict(),
        "class_names": None if class_names is None else list(class_names),
    }
    if num_batches_tracked is not None:
        header["num_batches_tracked"] = num_batches_tracked
    write_safetensors(path, arrays, {HEADER: json.dumps(header)})


def describe(file: TensorFile, expected: Variant | None = None) -> WeightsInfo | None:
    """What a native file says of itself; None if it is a safetensors file of another family.

    Args:
      expected: where the activation comes from if it is a function, which a file cannot hold.

    Raises:
      WeightsError: a damaged header, one of a later release, or an activation that is not known.
    """
    text = file.metadata.get(HEADER)
    if text is None:
        return None
    try:
        header = json.loads(text)
        if header["version"] > FORMAT_VERSION:
            raise WeightsError(
                f"{file.path} has format version {header['version']}; this release reads {FORMAT_VERSION}"
            )
        quantized = header["form"] == INT8
        class_names, steps, kernel = header["class_names"], header.get("num_batches_tracked"), _first_kernel(file)
        info = WeightsInfo(
            family="native",
            variant=_variant_from_json(header["variant"], file, expected),
            deploy=IS_DEPLOY[header["form"]],
            quantized=quantized,
            num_classes=_integer(header["num_classes"]),
            in_channels=kernel.shape[2],
            dtype="int8" if quantized else kernel.dtype.name,
            num_parameters=sum(t.size for name, t in file.tensors.items() if _is_parameter(name)),
            preprocessing=preprocessing_from_file(header["preprocessing"]),
            class_names=None if class_names is None else tuple(map(str, class_names)),
            num_batches_tracked=None if steps is None else _integer(steps, largest=MAX_STEPS),
        )
        if info.class_names is not None and len(info.class_names) != info.num_classes:
            raise ValueError(f"{len(info.class_names)} class names for {info.num_classes} classes")
        return info
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = shown(f"{type(error).__name__}: {error}")
        raise WeightsError(f"cannot read {file.path}: damaged header ({reason})") from error


def _first_kernel(file: TensorFile) -> Tensor:
    for layer in ("rbr_dense/conv/", "rbr_reparam/", ""):
        name = f"params/stage0/{layer}kernel"
        if name in file.tensors and len(file.tensors[name].shape) == 4:
            return file.tensors[name]
    raise KeyError("stage0's kernel")


def _is_parameter(name: str) -> bool:
    """Whether a tensor was learned: neither a running statistic nor a scale."""
    return name.startswith("params/") and not name.endswith(("/kernel_scale", "/input_scale"))


def _variant_to_json(variant: Variant) -> str | dict[str, Any]:
    """A published variant by name, any other by its numbers; of its options, those that are not RepVGG's own.

    An activation that is a function has no name: it is null.
    """
    fields = dataclasses.asdict(variant)
    del fields["published"]
    if not isinstance(variant.activation, str):
        fields["activation"] = None
    for name, default in _OPTIONS.items():
        if getattr(variant, name) == default:
            del fields[name]
    try:
        return variant.name if get_variant(variant.name) == variant else fields
    except ValueError:
        return fields


def _variant_from_json(value: str | dict[str, Any], file: TensorFile, expected: Variant | None) -> Variant:
    if isinstance(value, str):
        return get_variant(value)
    fields = {name: _FIELDS[name](given) for name, given in value.items()}
    if sum(fields["num_blocks"]) > len(file.tensors):
        raise ValueError("more blocks than tensors")
    if "activation" in fields and fields["activation"] is None:
        if expected is None:
            raise WeightsError(
                f"{file.path}: the activation is a function of whoever wrote the file; give load_weights its Variant"
            )
        fields["activation"] = expected.activation
    return Variant(**fields)


def _integer(value: Any, least: int = 0, largest: int = 2**31) -> int:
    if type(value) is not int or not least <= value <= largest:
        raise ValueError("a number that is no sensible integer")
    return value


def _positive(value: Any) -> int:
    return _integer(value, least=1)


def _several(value: Any) -> tuple[int, ...]:
    return tuple(map(_integer, value))


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("neither true nor false")
    return value


def _place(value: Any) -> str | None:
    if value not in (None, "before_relu", "after_relu"):
        raise ValueError("an unknown place for the squeeze-and-excite gate")
    return value


def _fraction(value: Any) -> float:
    if not isinstance(value, float | int) or not 0 < value <= 1:
        raise ValueError("a fraction outside of 0..1")
    return float(value)


def _one_of(*choices: Any) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if isinstance(value, bool) or value not in choices:
            raise ValueError(f"none of {', '.join(map(str, choices))}")
        return value

    return check


def _activation(value: Any) -> Any:
    return None if value is None else _one_of(*ACTIVATIONS)(value)


def _branches(value: Any) -> Branches:
    checks = {"dense_copies": _positive, "dbb_1x1_3x3": _flag, "dbb_1x1_avg": _flag}
    return Branches(**{name: checks[name](given) for name, given in value.items()})


_OPTIONS = {
    field.name: field.default
    for field in dataclasses.fields(Variant)
    if field.name in ("stem_stride", "output_stride", "activation", "block", "branches", "epsilon")
}
"""Fields that files of earlier releases do not have, and their defaults."""

_FIELDS: dict[str, Callable[[Any], Any]] = {
    "num_blocks": _several,
    "widths": _several,
    "groups": _positive,
    "squeeze_excite": _place,
    "squeeze_excite_ratio": _positive,
    "auxiliary_heads": _flag,
    "name": shown,
    "image_size": _positive,
    "crop_fraction": _fraction,
    "stem_stride": _one_of(1, 2),
    "output_stride": _one_of(*OUTPUT_STRIDES),
    "activation": _activation,
    "block": _one_of("repvgg", "qarepvgg"),
    "branches": _branches,
    "epsilon": checked_epsilon,
}
"""A variant's fields in a header, each with the check that makes it one."""
