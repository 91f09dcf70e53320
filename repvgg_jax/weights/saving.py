"""From a model and its variables to a weight file, in our own format or under other people's names."""

import importlib.util
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import WeightsError
from ..extras import install_hint
from ..files import atomic_path, check_target
from ..kernel_algebra import BN_EPSILON
from ..model import RepVGG
from ..preprocess import Preprocessing
from ..variants import Variant
from . import native
from .info import WeightsWarning, default_preprocessing
from .key_maps import AUTHORS, AUTHORS_PLUS, FAMILIES, Family
from .layout import check_arrays, expected_shapes, flatten
from .safetensors_file import write_safetensors
from .state_dict import items, state_dict

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")
NATIVE = "native"
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
    """Write a weight file, atomically; the suffix chooses the format.

    `.safetensors` is native and self-describing, custom variants and block options included. `.pth`, `.pt`, `.bin` and
    `.tar` are PyTorch's, with the authors' keys, order, shapes and dtypes, for
    `load_state_dict(torch.load(path), strict=True)`.

    Args:
      path: where to write.
      model: the model that `variables` belong to, training or deploy form.
      variables: `{"params", "batch_stats"}`, or `{"params"}` in deploy form.
      family: whose names to use: `authors`, `timm` or `mmpretrain`, in either format, or `native`.
      preprocessing: how its images are prepared; the variant's published evaluation if None. Native files only.
      class_names: names by class index. Native files only.
      num_batches_tracked: training steps behind the BN statistics; PyTorch files say 0 if None.

    Raises:
      WeightsError: unknown suffix or family, no torch for a PyTorch file, `variables` do not belong to `model`, the
        family has no names for it, or NaN in the weights.
      RepVGGError: the file cannot be written.
    """
    names = choose_names(path, model.variant, family)
    if class_names is not None and len(class_names) != model.num_classes:
        raise WeightsError(f"{len(class_names)} class names for a model of {model.num_classes} classes")
    arrays = flatten(variables)
    stem = "rbr_reparam/kernel" if model.deploy else "rbr_dense/conv/kernel"
    kernel = arrays.get(f"params/stage0/{stem}")
    in_channels = 3 if kernel is None else kernel.shape[2]
    check_arrays(arrays, expected_shapes(model.variant, model.deploy, model.num_classes, in_channels), "variables")
    if names is None:
        preprocessing = preprocessing or default_preprocessing(model.variant, in_channels)
        native.write(path, model, variables, preprocessing, class_names, num_batches_tracked)
        return
    numbers = {name: np.asarray(leaf) for name, leaf in arrays.items()}
    shape = (model.variant, model.deploy, model.num_classes, in_channels)
    state = state_dict(names, numbers, *shape, num_batches_tracked=num_batches_tracked or 0)
    untold = _untold(model.variant, model.deploy)
    if untold:
        message = f"{path} cannot say {untold}: whoever loads it must know (give load_weights the Variant)"
        warnings.warn(message, WeightsWarning, stacklevel=2)
    if Path(path).suffix == ".safetensors":
        write_safetensors(path, state, {"format": "pt"})
    else:
        _write_torch(path, state)


def _untold(variant: Variant, deploy: bool) -> str:
    """What changes the network's function and shows in no key of a PyTorch file, in words."""
    plain = {"stem_stride": 2, "output_stride": 32, "activation": "relu"}
    if not deploy:
        plain["epsilon"] = BN_EPSILON
    values = {name: getattr(variant, name) for name in plain}
    found = (f"{name} {getattr(v, '__name__', v)}" for name, v in values.items() if v != plain[name])
    return ", ".join(found)


def choose_names(path: str | os.PathLike, variant: Variant, family: str | None) -> Family | None:
    """The naming that a file gets, None for the native one.

    Raises:
      WeightsError: unknown suffix or family, native names in a PyTorch file, or no torch to write it.
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
    if family in (AUTHORS.name, AUTHORS_PLUS.name):
        return AUTHORS_PLUS if variant.auxiliary_heads else AUTHORS
    if family not in FAMILIES:
        raise WeightsError(f"unknown naming {family!r}; known: {NATIVE}, {', '.join(FAMILIES)}")
    return FAMILIES[family]


def check_writable(path: str | os.PathLike, variant: Variant, deploy: bool, family: str | None) -> None:
    """Fails as `save_weights` would for such a model, as far as that shows beforehand.

    Raises:
      WeightsError, RepVGGError: as `save_weights`.
    """
    items(choose_names(path, variant, family), variant, deploy, num_classes=1, in_channels=3)
    check_target(path)


def _write_torch(path: str | os.PathLike, state: Mapping[str, np.ndarray]) -> None:
    import torch

    tensors = {key: torch.from_numpy(array) for key, array in state.items()}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(tensors, file)
        except RuntimeError as error:  # a full disk ends in one, with the system's own error behind it
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError("PyTorch could not write it") from error
