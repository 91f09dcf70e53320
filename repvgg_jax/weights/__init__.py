"""Reading and writing weight files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import WeightsError
from ..model import RepVGG
from ..preprocess import Preprocessing
from ..variants import get_variant
from . import native
from .info import WeightsInfo
from .layout import check_arrays, expected_shapes, flatten, unflatten

READABLE = (".safetensors",)


def _read(path: str | os.PathLike) -> tuple[WeightsInfo, dict[str, np.ndarray]]:
    file = Path(path)
    if not file.is_file():
        what = "is a folder, not a weight file" if file.is_dir() else "does not exist"
        raise WeightsError(f"{file} {what}")
    if file.suffix not in READABLE:
        raise WeightsError(f"cannot read {file}: unknown suffix {file.suffix!r}, expected {' or '.join(READABLE)}")
    found = native.read(file)
    if found is None:
        raise WeightsError(f"cannot read {file}: a safetensors file, but not one of repvgg_jax")
    info, arrays = found
    check_arrays(arrays, expected_shapes(info.variant, info.deploy, info.num_classes, info.in_channels), f"{file}")
    return info, arrays


def inspect_weights(path: str | os.PathLike) -> WeightsInfo:
    """What `path` holds: family, variant, form, classes, dtype, preprocessing.

    Raises:
      WeightsError: no sound weight file.
    """
    return _read(path)[0]


def load_weights(
    path: str | os.PathLike, name: str | None = None, num_classes: int | None = None
) -> tuple[RepVGG, dict[str, Any]]:
    """The model and the variables that a weight file holds.

    Args:
      path: a weight file.
      name: variant the caller expects; needed only where the file cannot tell, checked where it can.
      num_classes: class count the caller expects, checked.

    Returns:
      `model, variables`, in the form (training or deploy) that the file has.

    Raises:
      UnknownModelError: no variant is called `name`.
      WeightsError: the file is unreadable, or of another variant or class count.
    """
    expected = None if name is None else get_variant(name)
    info, arrays = _read(path)
    if expected is not None and expected != info.variant:
        raise WeightsError(f"{path} holds {info.variant.name}, not {expected.name}")
    if num_classes is not None and num_classes != info.num_classes:
        raise WeightsError(f"{path} has {info.num_classes} classes, not {num_classes}")
    model = RepVGG(info.variant, info.num_classes, info.deploy)
    return model, jax.tree.map(jnp.asarray, unflatten(arrays))


def save_weights(
    path: str | os.PathLike,
    model: RepVGG,
    variables: Mapping[str, Any],
    *,
    preprocessing: Preprocessing | None = None,
    class_names: tuple[str, ...] | None = None,
) -> None:
    """Write a weight file, atomically; the suffix chooses the format (`.safetensors`: native, self-describing).

    Args:
      path: where to write.
      model: the model that `variables` belong to, training or deploy form.
      variables: `{"params", "batch_stats"}`, or `{"params"}` in deploy form.
      preprocessing: how its images are prepared; the variant's published evaluation if None.
      class_names: names by class index.

    Raises:
      WeightsError: unknown suffix, `variables` do not belong to `model`, or NaN in the weights.
      RepVGGError: the file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise WeightsError(f"cannot write {path}: unknown suffix {Path(path).suffix!r}, expected .safetensors")
    if class_names is not None and len(class_names) != model.num_classes:
        raise WeightsError(f"{len(class_names)} class names for a model of {model.num_classes} classes")
    arrays = flatten(variables)
    stem = "rbr_reparam/kernel" if model.deploy else "rbr_dense/conv/kernel"
    kernel = arrays.get(f"params/stage0/{stem}")
    in_channels = 3 if kernel is None else kernel.shape[2]
    check_arrays(arrays, expected_shapes(model.variant, model.deploy, model.num_classes, in_channels), "variables")
    native.write(path, model, variables, preprocessing or default_preprocessing(model.variant), class_names)


def default_preprocessing(variant: Any) -> Preprocessing:
    """The evaluation preprocessing that a variant's published accuracy belongs to."""
    return Preprocessing(image_size=variant.image_size, crop_fraction=variant.crop_fraction)
