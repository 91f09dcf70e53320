"""Names and shapes of a RepVGG's parameter tree, derived from the architecture alone, and checks against them."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import WeightsError, first_ten
from ..trees import FlatArrays
from .branches import SUM_BN
from .leaves import Layer, Shape
from .variants import AUX_HEADS, BlockSpec, Variant


def block_layers(variant: Variant, block: BlockSpec, deploy: bool) -> list[Layer]:
    """Return the layers of one block of the body."""
    if deploy:
        shape = (3, 3, block.in_channels // block.groups, block.out_channels)
        layers = [Layer("rbr_reparam", "conv", shape)]
    else:
        layers = [layer for branch in variant.training_branches(block) for layer in branch.layers(block)]
        layers += [Layer(SUM_BN, "bn", (block.out_channels,))] if variant.block == "qarepvgg" else []
    if gate := variant.gate_name:
        hidden = variant.squeeze_width(block.out_channels)
        layers.append(Layer(f"{gate}/down", "conv", (1, 1, block.out_channels, hidden)))
        layers.append(Layer(f"{gate}/up", "conv", (1, 1, hidden, block.out_channels)))
    return [dataclasses.replace(layer, path=f"{block.name}/{layer.path}") for layer in layers]


def constants(variant: Variant, deploy: bool) -> dict[str, np.ndarray]:
    """Return the constant leaves that files from other projects lack: the scale 1 of each QARepVGG identity branch."""
    layers = [layer for block in variant.blocks() for layer in block_layers(variant, block, deploy)]
    scales = (layer.leaves() for layer in layers if layer.kind == "constant")
    return {leaf: np.ones(shape, np.float32) for leaves in scales for leaf, shape in leaves}


def head_layers(variant: Variant, deploy: bool, num_classes: int) -> list[Layer]:
    """Return the classifier and, in RepVGGplus's training form, the auxiliary heads."""
    layers = [Layer("linear", "linear", (variant.widths[-1], num_classes))]
    if variant.auxiliary_heads and not deploy:
        for name, width in zip(AUX_HEADS, variant.widths[1:4], strict=True):
            layers.append(Layer(f"{name}/conv", "conv", (3, 3, width, width), has_bias=False))
            layers.append(Layer(f"{name}/bn", "bn", (width,)))
            layers.append(Layer(f"{name}/linear", "linear", (width, num_classes)))
    return layers


@functools.lru_cache(maxsize=32)
def expected_shapes(variant: Variant, deploy: bool, num_classes: int, in_channels: int) -> Mapping[str, Shape]:
    """Return the name and shape of each leaf of the model's variables (as tracing `model.init` would)."""
    layers = [layer for block in variant.blocks(in_channels) for layer in block_layers(variant, block, deploy)]
    return dict(leaf for layer in layers + head_layers(variant, deploy, num_classes) for leaf in layer.leaves())


def in_channels_of(arrays: FlatArrays) -> int:
    """Return the input channels of a flat tree's first convolution, in training, deploy or INT8 form.

    The default is 3 if the tree has no such kernel, so that a check of its shapes reports what is missing.
    """
    kernel = stem_kernel(arrays)
    return 3 if kernel is None else kernel.shape[2]


def stem_kernel(arrays: FlatArrays) -> Any:
    """Return the first convolution's kernel from a flat tree; None if there is none."""
    kernels = (arrays.get(f"params/stage0/{layer}kernel") for layer in ("rbr_dense/conv/", "rbr_reparam/", ""))
    return next((kernel for kernel in kernels if kernel is not None and len(kernel.shape) == 4), None)


def check_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str, model: str) -> None:
    """Check names and shapes against those that a model expects, so that nothing is partly loaded in silence.

    Args:
      found: actual shapes by name.
      expected: the model's shapes by name.
      where: origin of the entries, for the error message.
      model: description of the model, for the error message.

    Raises:
      WeightsError: names or shapes differ; the message lists missing, unexpected and mis-shaped entries (the first ten
        of each kind, then a count).
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
    problems = [f"{what}: {first_ten(names)}" for what, names in kinds if names]
    if problems:
        raise WeightsError(f"{where} does not fit {model}; {'; '.join(problems)}")


def check_variables(arrays: FlatArrays, variant: Variant, deploy: bool, num_classes: int) -> int:
    """Check a flat tree's names and shapes against a model, and that its numbers are finite; return the input channels.

    Raises:
      WeightsError: a name or shape differs (see `check_shapes`), or an entry has NaN or infinite values.
    """
    channels, shapes = in_channels_of(arrays), {name: tuple(array.shape) for name, array in arrays.items()}
    check_shapes(shapes, expected_shapes(variant, deploy, num_classes, channels), "the variable tree", "the model")
    for name, array in arrays.items():
        check_finite(np.asarray(array), name, "variables")
    return channels


def check_finite(array: np.ndarray, name: str, where: str) -> None:
    """Raise WeightsError, naming the array, if it has NaN or infinite values."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum()  # NaN and infinity propagate, and a sum is far cheaper than testing each number
    if not np.isfinite(total) and not np.isfinite(array).all():
        raise WeightsError(f"{where}: {name} has NaN or infinite values")
