"""A model's weights as an ordered list of file entries: the key, leaf and layout of each."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from ..errors import WeightsError
from ..net.layout import block_layers, constants, expected_shapes, head_layers
from ..net.leaves import Layer, Shape
from ..net.variants import Variant
from .key_maps import COUNTER, LEAVES, Family

BLOCK_OUTPUTS = 128
"""Output channels transposed at a time: a slice of this size of any RepVGG kernel fits in the cache."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One entry of a weight file.

    Attributes:
      key: name in the file.
      leaf: name in the flat tree; None for a BN's step counter, which the tree does not have.
      shape: shape in the tree.
      axes: permutation of the tree's axes that gives the file's order; None if they are the same.
    """

    key: str
    leaf: str | None
    shape: Shape
    axes: tuple[int, ...] | None = None

    @property
    def file_shape(self) -> Shape:
        """Shape in the file."""
        return self.shape if self.axes is None else tuple(self.shape[axis] for axis in self.axes)


OIHW, OUT_IN = (3, 2, 0, 1), (1, 0)


def items(family: Family | None, variant: Variant, deploy: bool, num_classes: int, in_channels: int) -> list[Item]:
    """Return all entries of a model's weight file, in the family's state-dict order.

    `family` None stands for the native format.

    Raises:
      WeightsError: the family has no name for a part of the model.
    """
    if family is None:
        shapes = expected_shapes(variant, deploy, num_classes, in_channels)
        return [Item(leaf, leaf, shape) for leaf, shape in shapes.items()]
    if not (deploy or (variant.branches.point and variant.branches.identity)):
        raise WeightsError(f"{family.name} files have no name for blocks without a 1x1 or an identity branch")
    entries = []
    counts: dict[str, int] = {}
    for block in variant.blocks(in_channels):
        position = counts[block.stage] = counts.get(block.stage, -1) + 1
        path = family.block_path(block.stage, position)
        layers = {layer.path.partition("/")[2]: layer for layer in block_layers(variant, block, deploy)}
        layers = {name: layer for name, layer in layers.items() if layer.kind != "constant"}
        nameless = [layer for layer in layers if layer not in family.branches]
        if path is None or nameless:
            what = block.stage if path is None else nameless[0].replace("/", ".")
            raise WeightsError(f"{family.name} files have no name for the {what} of {variant.name}")
        for layer, name in family.branches.items():
            if layer in layers:
                entries += _layer_items(layers[layer], f"{path}.{name}")
    heads = {layer.path: layer for layer in head_layers(variant, deploy, num_classes)}
    if num_classes and not heads.keys() <= family.heads.keys():
        raise WeightsError(f"{family.name} files have no name for the classifier of {variant.name}")
    for layer, name in family.heads.items():
        if layer in heads:
            entries += _layer_items(heads[layer], name)
    return entries


def _layer_items(layer: Layer, path: str) -> list[Item]:
    shapes = dict(layer.leaves())
    axes = {"conv": OIHW, "linear": OUT_IN, "bn": None}[layer.kind]
    entries = []
    for name, template in LEAVES[layer.kind].items():
        leaf = template.format(layer.path)
        if leaf in shapes:
            entries.append(Item(f"{path}.{name}", leaf, shapes[leaf], axes if name == "weight" else None))
    if layer.kind == "bn":
        entries.append(Item(f"{path}.{COUNTER}", None, ()))
    return entries


def to_leaf(values: np.ndarray, item: Item) -> np.ndarray:
    """Return a file's values in the tree's layout: float32, row-major, in newly allocated memory that JAX can adopt."""
    leaf = _aligned_empty(item.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        if item.axes is None:
            leaf[...] = values
        else:  # [O, I, h, w] -> [h, w, I, O], or [O, I] -> [I, O]: a matrix transpose at each of the h * w points
            outputs, inputs = values.shape[:2]
            source = values.reshape(outputs, inputs, -1)
            target = leaf.reshape(-1, inputs, outputs)
            for start in range(0, outputs, BLOCK_OUTPUTS):
                stop = start + BLOCK_OUTPUTS
                target[:, :, start:stop] = source[start:stop].transpose(2, 1, 0)
    return leaf


def from_leaf(leaf: np.ndarray, item: Item) -> np.ndarray:
    """Invert `to_leaf`: return a float32, row-major copy in the file's layout."""
    return np.array(leaf if item.axes is None else leaf.transpose(item.axes), np.float32, order="C")


def _aligned_empty(shape: Shape) -> np.ndarray:
    """Return an uninitialised float32 array aligned to 64 bytes, which JAX on a CPU uses without copying."""
    count = int(np.prod(shape)) * 4
    raw = np.empty(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(np.float32).reshape(shape)


def state_dict(
    family: Family,
    arrays: Mapping[str, np.ndarray],
    variant: Variant,
    deploy: bool,
    num_classes: int,
    in_channels: int,
    num_batches_tracked: int = 0,
) -> dict[str, np.ndarray]:
    """Return `arrays` (a flat tree) under the family's keys, in its layout, order and dtypes.

    Raises:
      WeightsError: the family has no name for a part of the model, or for a value that it takes to be constant.
    """
    entries = items(family, variant, deploy, num_classes, in_channels)
    for leaf, constant in constants(variant, deploy).items():
        if not np.array_equal(arrays[leaf], constant):
            raise WeightsError(f"{family.name} files have no name for {leaf}, which is {arrays[leaf]} and not 1")
    return {
        item.key: np.array(num_batches_tracked, np.int64) if item.leaf is None else from_leaf(arrays[item.leaf], item)
        for item in entries
    }
