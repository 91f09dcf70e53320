"""Identification of a weight file's naming scheme, form and architecture from its keys and shapes alone."""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..errors import WeightsError, first_ten, shown
from ..net.branches import BlockKind
from ..net.kernel_algebra import BN_EPSILON
from ..net.leaves import Shape
from ..net.variants import GATE_NAMES, VARIANTS, Published, Variant
from .key_maps import FAMILIES, WRAPPER_ENTRIES, Family
from .tensor_file import TensorFile

MAX_WRAPPERS = 8
"""Maximum depth at which a network is searched for inside other modules."""

MAX_SEARCHED = 10_000
"""Maximum number of keys searched for networks inside other modules."""


@dataclasses.dataclass(frozen=True)
class Identification:
    """Result of the identification.

    Attributes:
      family: naming scheme of the keys.
      variant: the architecture; None if the keys do not describe one that can be built.
      deploy: whether it is the deploy (fused) form.
      num_classes: rows of the classifier's weight; 0 without a classifier.
      in_channels: input channels of the first convolution.
      strangers: keys that the family does not have.
      gaps: missing and unexpected parts, in words.
    """

    family: Family
    variant: Variant | None
    deploy: bool
    num_classes: int
    in_channels: int
    strangers: tuple[str, ...]
    gaps: str


def part_of(file: TensorFile, prefix: str, where: str) -> TensorFile:
    """Return the network in a file: the entries whose keys begin with `prefix`, without wrappers' prefixes.

    Raises:
      WeightsError: no key begins with `prefix`, or those that do belong to several networks or to other tensors.
    """
    keys = [key for key in file.tensors if key.startswith(prefix)]
    if prefix and not keys:
        wrappers = _shared_prefixes(file.tensors)
        keys = [key for key in file.tensors if key.startswith(tuple(wrapper + prefix for wrapper in wrappers))]
    if prefix and not keys:
        first = first_ten(dict.fromkeys(f"{key.partition('.')[0]}." for key in file.tensors))
        raise WeightsError(f"{where} has no keys that begin with {shown(prefix)}; they begin with {first}")
    names = without_wrappers(keys)
    prefixes = [] if _any_block(names) else _net_prefixes(keys)
    strangers = [key for key in keys if prefixes and not key.startswith(prefixes[0])]
    if len(prefixes) > 1:
        several = first_ten(prefixes)
        raise WeightsError(f"{where} holds several networks: {several}; choose one with prefix= (--prefix)")
    if strangers:
        name = shown(prefixes[0])
        raise WeightsError(
            f"{where} holds a RepVGG under {name} and other tensors: {first_ten(strangers)}; "
            f'to load only the RepVGG: prefix="{name}" (--prefix {name})'
        )
    return dataclasses.replace(file, tensors={name: file.tensors[key] for name, key in names.items()})


def without_wrappers(keys: Iterable[str]) -> dict[str, str]:
    """Return a mapping from each key without its wrappers' prefix (`module.`, `_orig_mod.`, `model.`, …) to the key.

    Scalars that belong to a wrapper are omitted.
    """
    wrapped = [key for key in keys if key not in WRAPPER_ENTRIES]
    shared = _shared_prefixes(wrapped)
    prefix = next((p for p in shared if _any_block(key.removeprefix(p) for key in wrapped)), "")
    return {key.removeprefix(prefix): key for key in wrapped}


def _shared_prefixes(keys: Collection[str]) -> list[str]:
    """Return the dotted prefixes shared by all keys, from the empty one to the longest."""
    names = next(iter(keys), "").split(".", MAX_WRAPPERS)[:-1]
    prefixes = ["".join(f"{name}." for name in names[:depth]) for depth in range(len(names) + 1)]
    return [prefix for prefix in prefixes if all(key.startswith(prefix) for key in keys)]


def _net_prefixes(keys: Iterable[str]) -> list[str]:
    """Return the key prefix of each network in a file."""
    nets: list[str] = []
    for key in itertools.islice(keys, MAX_SEARCHED):
        names = key.split(".", MAX_WRAPPERS)[:-1]
        prefixes = ("".join(f"{name}." for name in names[:depth]) for depth in range(1, len(names) + 1))
        if not key.startswith(tuple(nets)):
            first = next((p for p in prefixes if _any_block([key.removeprefix(p)])), None)
            nets += [] if first is None else [first]
    return nets


def _any_block(keys: Iterable[str]) -> bool:
    """Return whether any of the keys belongs to a block in any family."""
    parses = (family.parse(key) for key in keys for family in FAMILIES.values())
    return any(parsed is not None and parsed[0] for parsed in parses)


def identify(shapes: Mapping[str, Shape], where: str) -> Identification:
    """Return the family, form and architecture of a state dict with these keys and shapes.

    Raises:
      WeightsError: no family has such keys.
    """
    parsed_by_family = [(family, _parse(family, shapes)) for family in FAMILIES.values()]
    family, parsed = max(parsed_by_family, key=lambda pair: len(pair[1]))
    if not any(stage for stage, *_ in parsed):
        namings, keys = ", ".join(FAMILIES), first_ten(shapes) or "none"
        raise WeightsError(f"{where} does not hold a RepVGG in any known naming scheme ({namings}); its keys: {keys}")
    layers = {layer for _, _, layer, _ in parsed}
    deploy = "rbr_reparam" in layers and "rbr_dense/conv" not in layers
    body = _Body(parsed, "rbr_reparam" if deploy else "rbr_dense/conv")
    head = parsed.get(("", 0, "linear", "weight"), ())
    absent = [stage for stage in family.stages if stage not in body.counts]
    strangers = [key for key in shapes if family.parse(key) is None]
    gaps = (("nothing of", absent), ("unexpected:", strangers))
    return Identification(
        family=family,
        variant=body.variant(),
        deploy=deploy,
        num_classes=head[0] if len(head) == 2 else 0,
        in_channels=body.kernel("stage0", 0)[1],
        strangers=tuple(strangers),
        gaps="; ".join(f"{what} {first_ten(names)}" for what, names in gaps if names),
    )


_Parsed = Mapping[tuple[str, int, str, str], Shape]


def _parse(family: Family, shapes: Mapping[str, Shape]) -> _Parsed:
    parsed = {family.parse(key): shape for key, shape in shapes.items()}
    return {key: shape for key, shape in parsed.items() if key is not None}


class _Body:
    """The blocks in a file, and the architecture that they form."""

    def __init__(self, parsed: _Parsed, main_layer: str):
        self.parsed = parsed
        self.main_layer = main_layer
        self.counts: dict[str, int] = {}
        for stage, position, _, _ in parsed:
            # Gaps are reported later, as missing keys. A position beyond the number of keys cannot be real.
            if stage and position < len(parsed):
                self.counts[stage] = max(self.counts.get(stage, 0), position + 1)

    def kernel(self, stage: str, position: int) -> Shape:
        """Return the shape `[out, in, h, w]` of a block's 3x3 kernel; zeros if the file has none."""
        shape = self.parsed.get((stage, position, self.main_layer, "weight"), ())
        return shape if len(shape) == 4 else (0, 0, 0, 0)

    def width(self, stage: str) -> int:
        """Return the number of output channels of a stage."""
        return max((self.kernel(stage, position)[0] for position in range(self.counts.get(stage, 0))), default=0)

    def variant(self) -> Variant | None:
        """Return the published variant with these blocks, else one called `custom`; None if they are not a RepVGG."""
        third = ("stage3_first", "stage3_second") if "stage3_first" in self.counts else ("stage3",)
        stages = (("stage1",), ("stage2",), third, ("stage4",))
        gates = {place: self._squeeze(name) for place, name in GATE_NAMES.items()}
        place = next((place for place, shape in gates.items() if shape is not None), None)
        shape = gates[place] if place else None
        hidden = shape[0] if shape and all(shape) else 0
        block = "qarepvgg" if any(layer == "rbr_1x1" for _, _, layer, _ in self.parsed) else "repvgg"
        numbers: dict[str, Any] = {
            "num_blocks": [sum(self.counts.get(half, 0) for half in stage) for stage in stages],
            "widths": [self.width(stage) for stage in ("stage0", *(halves[0] for halves in stages))],
            "groups": self._groups(),
            "squeeze_excite": place,
            "squeeze_excite_ratio": self.width("stage4") // hidden if hidden else 16,
            "auxiliary_heads": len(third) == 2,
            "block": block,
        }
        try:
            variant = Variant(**numbers)
        except ValueError:
            return None
        published = next((one for one in VARIANTS.values() if same_network(one, variant)), None)
        return variant if published is None else with_block(published, block)

    def _squeeze(self, gate: str) -> Shape | None:
        """Return the shape of the last block's squeeze convolution; None if the block has no such gate."""
        return self.parsed.get(("stage4", self.counts.get("stage4", 0) - 1, f"{gate}/down", "weight"))

    def _groups(self) -> int:
        """Return the groups of block 2, the first grouped one: the second of stage 1 or the first of stage 2."""
        stage, before = ("stage1", "stage1") if self.counts.get("stage1", 0) > 1 else ("stage2", "stage1")
        inputs = self.kernel(stage, 1 if stage == before else 0)[1]
        return self.width(before) // inputs if inputs else 1


def with_block(variant: Variant, block: BlockKind) -> Variant:
    """Return the variant with blocks of another kind, without its published accuracy."""
    return variant if variant.block == block else dataclasses.replace(variant, block=block, published=Published())


def with_stated_epsilon(variant: Variant, stated: Variant) -> Variant:
    """Return the caller's variant with the file's epsilon, unless the caller's epsilon is not the default."""
    return dataclasses.replace(variant, epsilon=stated.epsilon) if variant.epsilon == BN_EPSILON else variant


def same_network(one: Variant, other: Variant) -> bool:
    """Return whether two variants have the same deploy-form layers; names, image sizes and options may differ."""
    fields = ["num_blocks", "widths", "groups", "squeeze_excite", "auxiliary_heads"]
    if one.squeeze_excite:
        fields.append("squeeze_excite_ratio")
    return all(getattr(one, field) == getattr(other, field) for field in fields)
