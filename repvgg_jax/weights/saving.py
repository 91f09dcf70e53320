"""Writing a model and its variables to a weight file, in the native format or another family's."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import WeightsError, shown
from ..extras import install_hint
from ..files import check_target
from ..net.layout import check_variables
from ..net.model import RepVGG
from ..net.variants import Variant
from ..paths import expand_home
from ..preprocess import Preprocessing
from ..trees import flatten
from . import native, side_file
from .header import DEPLOY, TRAINING, Header
from .info import default_preprocessing
from .key_maps import AUTHORS, AUTHORS_PLUS, FAMILIES, QAREPVGG, Family
from .safetensors_file import save_arrays
from .state_dict import items, state_dict

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")
NATIVE = native.FAMILY
WRITABLE = (".safetensors", *TORCH_SUFFIXES)


def save_weights(
    path: str | os.PathLike,
    model: RepVGG,
    variables: Mapping[str, Any],
    *,
    family: str | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: tuple[str, ...] | None = None,
    num_batches_tracked: int | None = None,
) -> None:
    """Write a weight file, atomically; the suffix selects the format.

    `.safetensors` files are native and self-describing, including custom variants and block options. `.pth`, `.pt`,
    `.bin` and `.tar` files are PyTorch's, with the authors' keys, order, shapes and dtypes, for
    `load_state_dict(torch.load(path), strict=True)`.

    The files of other families cannot hold preprocessing, class names, activation or strides. Where these differ from
    the defaults that a reader assumes, they are written to `PATH.json` next to the file, which `load_weights` reads,
    and a `WeightsWarning` is issued.

    Args:
      path: where to write; in a bucket (`gs://…`, `s3://…`) the file becomes one object.
      model: the model that `variables` belong to, in training or deploy form.
      variables: `{"params", "batch_stats"}`, or `{"params"}` in deploy form.
      family: naming scheme: `authors` (RepVGG's or QARepVGG's), `timm` or `mmpretrain`, in either format, or `native`.
      preprocessing: how the model's images are prepared; the variant's published evaluation if None.
      class_names: names by class index.
      num_batches_tracked: training steps that the BN statistics have seen; PyTorch files say 0 if None.

    Raises:
      WeightsError: the suffix or family is unknown, PyTorch is needed but not installed, `variables` do not belong to
        `model`, the family has no names for it, the weights contain NaN, or an unrelated `PATH.json` exists.
      RepVGGError: the file cannot be written.
    """
    if not isinstance(model, RepVGG):
        raise WeightsError(f"save_weights writes a RepVGG, not a {type(model).__name__}")
    path = expand_home(path)
    names = choose_names(path, model.variant, model.deploy, family)
    if class_names is not None and len(class_names) != model.num_classes:
        raise WeightsError(f"{len(class_names)} class names for a model of {model.num_classes} classes")
    arrays = _arrays(variables)
    in_channels = check_variables(arrays, model.variant, model.deploy, model.num_classes)
    preprocessing = preprocessing or default_preprocessing(model.variant, in_channels)
    form = DEPLOY if model.deploy else TRAINING
    header = Header(form, model.variant, model.num_classes, preprocessing, class_names, num_batches_tracked)
    if names is None:
        native.write(path, header, variables)
        return
    numbers = {name: np.asarray(leaf) for name, leaf in arrays.items()}
    shape = (model.variant, model.deploy, model.num_classes, in_channels)
    state = state_dict(names, numbers, *shape, num_batches_tracked=num_batches_tracked or 0)
    with side_file.writing(path, header, in_channels) as temporary:
        if Path(path).suffix == ".safetensors":
            save_arrays(temporary, state, {"format": "pt"})
        else:
            _save_torch(temporary, state)


def _arrays(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return `variables` as a flat tree of arrays.

    Raises:
      WeightsError: `variables` is not a tree of float arrays.
    """
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
        what = ", ".join(map(shown, variables)) if isinstance(variables, Mapping) else f"a {type(variables).__name__}"
        raise WeightsError(f'variables must be a dict with "params", as model.init gives, not {what or "an empty one"}')
    arrays = {name: leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for name, leaf in flatten(variables).items()}
    for name, array in arrays.items():
        if np.dtype(array.dtype).kind not in "fV":  # V: bfloat16, to numpy
            raise WeightsError(f"variables: {shown(name)} has {array.dtype} values, not floats")
    return arrays


def choose_names(path: str | os.PathLike, variant: Variant, deploy: bool, family: str | None) -> Family | None:
    """Return the naming scheme for a file; None for the native one.

    For RepVGGplus and the training form of QARepVGG the authors use names that differ from RepVGG's.

    Raises:
      WeightsError: the suffix or family is unknown, a PyTorch file would have native names, or PyTorch is needed but
        not installed.
    """
    suffix = Path(path).suffix
    if suffix not in WRITABLE:
        raise WeightsError(f"cannot write {path}: unknown suffix {suffix!r}, expected one of {', '.join(WRITABLE)}")
    is_torch = suffix in TORCH_SUFFIXES
    if is_torch and importlib.util.find_spec("torch") is None:
        raise WeightsError(f"writing {path} needs PyTorch: {install_hint('torch')}")
    if family is None:
        family = AUTHORS.name if is_torch else NATIVE
    if family == NATIVE:
        if is_torch:
            raise WeightsError(f"cannot write {path}: native weights are .safetensors files")
        return None
    if family in (AUTHORS.name, AUTHORS_PLUS.name, QAREPVGG.name):
        if variant.block == "qarepvgg" and not deploy:
            return QAREPVGG
        return AUTHORS_PLUS if variant.auxiliary_heads else AUTHORS
    if family not in FAMILIES:
        raise WeightsError(f"unknown naming scheme {family!r}; known: {NATIVE}, {', '.join(FAMILIES)}")
    return FAMILIES[family]


def check_writable(
    path: str | os.PathLike,
    variant: Variant,
    deploy: bool,
    family: str | None,
    preprocessing: Preprocessing | None = None,
    class_names: tuple[str, ...] | None = None,
) -> None:
    """Raise the errors of `save_weights` that can be foreseen without the weights.

    Raises:
      WeightsError, RepVGGError: as `save_weights`.
    """
    names = choose_names(path, variant, deploy, family)
    items(names, variant, deploy, num_classes=1, in_channels=3)
    check_target(path)
    if names is not None:
        preprocessing = preprocessing or default_preprocessing(variant)
        header = Header(DEPLOY if deploy else TRAINING, variant, 1, preprocessing, class_names)
        if side_file.lost(header, preprocessing.channels):
            side_file.check_side_file(path)


def _save_torch(path: Path, state: Mapping[str, np.ndarray]) -> None:
    import torch

    tensors = {key: torch.from_numpy(array) for key, array in state.items()}
    with path.open("wb") as file:
        try:
            torch.save(tensors, file)
        except RuntimeError as error:  # raised on a full disk, for example, with the system's error as its context
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError("PyTorch could not write it") from error
