"""Names of weights in each family of files: one table per family, which is all that a new family needs.

Every family's names map to those of the parameter tree (`layout.Layer.path`). A family defines the paths of the blocks
in each stage, and the names of the layers in a block and of the heads, in the order of its modules' state dict. Inside
a layer all families have PyTorch's names: `weight`, `bias`, `running_mean`, `running_var`, `num_batches_tracked`.
"""

import dataclasses
import re
from collections.abc import Mapping
from functools import cached_property

from ..net.variants import AUX_HEADS

# Kind of layer -> its leaves: PyTorch's name -> collection and name in the tree, in state-dict order.
LEAVES: Mapping[str, Mapping[str, str]] = {
    "conv": {"weight": "params/{}/kernel", "bias": "params/{}/bias"},
    "linear": {"weight": "params/{}/kernel", "bias": "params/{}/bias"},
    "bn": {
        "weight": "params/{}/scale",
        "bias": "params/{}/bias",
        "running_mean": "batch_stats/{}/mean",
        "running_var": "batch_stats/{}/var",
    },
}
COUNTER = "num_batches_tracked"
"""PyTorch's BN step counter, an int64 scalar after `running_var`, which the tree does not have."""

MODEL_KEYS = ("state_dict", "model", "model_state_dict")
EMA_KEYS = ("ema", "model_ema", "state_dict_ema", "ema_state_dict")
"""Checkpoint entries that hold a state dict: of the trained weights, and of their moving average."""

WRAPPER_ENTRIES = ("n_averaged", "steps")
"""Scalars that EMA wrappers store next to the weights."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A naming scheme for RepVGG's weights.

    Attributes:
      name: the family's name in options and messages.
      stages: stage of the tree -> path of its blocks; `{}` stands for the block's position.
      branches: layers inside a block -> path inside the block, in state-dict order.
      heads: layers outside the blocks -> path, in state-dict order.
    """

    name: str
    stages: Mapping[str, str]
    branches: Mapping[str, str]
    heads: Mapping[str, str]

    def block_path(self, stage: str, position: int) -> str | None:
        """Return the path of a block in the family; None if it has no such stage."""
        template = self.stages.get(stage)
        return None if template is None else template.format(position)

    @cached_property
    def _patterns(self) -> list[tuple[str, re.Pattern[str]]]:
        def pattern(path: str) -> str:
            return re.escape(path).replace(r"\{\}", r"(?P<position>\d{1,4})")

        return [(stage, re.compile(pattern(path) + r"\.(?P<layer>.+)")) for stage, path in self.stages.items()]

    @cached_property
    def _inside_block(self) -> dict[str, str]:
        return {path: layer for layer, path in self.branches.items()}

    @cached_property
    def _heads(self) -> dict[str, str]:
        return {path: layer for layer, path in self.heads.items()}

    def parse(self, key: str) -> tuple[str, int, str, str] | None:
        """Return `(stage, position, layer, leaf)` of a key, stage `""` for heads; None if it is not this family's."""
        path, _, leaf = key.rpartition(".")
        if path in self._heads:
            return "", 0, self._heads[path], leaf
        for stage, pattern in self._patterns:
            match = pattern.fullmatch(path)
            if match and match["layer"] in self._inside_block:
                position = int(match.groupdict().get("position", 0))
                return stage, position, self._inside_block[match["layer"]], leaf
        return None


def _stages(stem: str, later: str, first: int = 1) -> dict[str, str]:
    """Return the paths of stages 0 to 4: `stem`, then `later` with the stage's number, counted from `first`."""
    return {"stage0": stem} | {f"stage{number}": later.format(number - 1 + first) for number in range(1, 5)}


def _dotted(*layers: str) -> dict[str, str]:
    """Return the authors' names of layers: the tree's, with dots."""
    return {layer: layer.replace("/", ".") for layer in layers}


_BRANCHES = ("rbr_reparam", "rbr_identity", "rbr_dense/conv", "rbr_dense/bn", "rbr_1x1/conv", "rbr_1x1/bn")

AUTHORS = Family(
    name="authors",
    stages=_stages("stage0", "stage{}.{{}}"),
    branches=_dotted("se/down", "se/up", "post_se/down", "post_se/up", *_BRANCHES),
    heads={"linear": "linear"},
)

# QARepVGG (`QARepVGGBlockV2` of its authors, `QARepVGGBlock` of YOLOv6): the 1x1 convolution has no BN, the identity
# has no entries, and the sum has a BN. Gates come before that BN there but after it here, so they have no names.
QAREPVGG = dataclasses.replace(
    AUTHORS,
    name="qarepvgg",
    branches=_dotted("rbr_reparam", "rbr_dense/conv", "rbr_dense/bn", "rbr_1x1", "bn"),
)

_PLUS_STAGES = ("stage1", "stage2", "stage3_first", "stage3_second", "stage4")
_AUXILIARY_LAYERS = {"conv": "0.conv", "bn": "0.bn", "linear": "3"}

AUTHORS_PLUS = Family(
    name="authors-plus",
    stages={"stage0": "stage0"} | {stage: f"{stage}.blocks.{{}}" for stage in _PLUS_STAGES},
    branches=AUTHORS.branches,
    heads={"linear": "linear"}
    | {f"{head}/{layer}": f"{head}.{path}" for head in AUX_HEADS for layer, path in _AUXILIARY_LAYERS.items()},
)

TIMM = Family(
    name="timm",
    stages=_stages("stem", "stages.{}.{{}}", first=0),
    branches={
        "rbr_reparam": "reparam_conv",
        "rbr_identity": "identity",
        "rbr_dense/conv": "conv_kxk.conv",
        "rbr_dense/bn": "conv_kxk.bn",
        "rbr_1x1/conv": "conv_1x1.conv",
        "rbr_1x1/bn": "conv_1x1.bn",
        "se/down": "attn.fc1",
        "se/up": "attn.fc2",
    },
    heads={"linear": "head.fc"},
)

# `timm.create_model(…, features_only=True)`: no classifier.
TIMM_FEATURES = dataclasses.replace(
    TIMM,
    name="timm-features",
    stages=_stages("stem", "stages_{}.{{}}", first=0),
    heads={},
)

MMPRETRAIN = Family(
    name="mmpretrain",
    stages=_stages("backbone.stem", "backbone.stage_{}.{{}}"),
    branches={
        "rbr_reparam": "branch_reparam",
        "rbr_identity": "branch_norm",
        "rbr_dense/conv": "branch_3x3.conv",
        "rbr_dense/bn": "branch_3x3.norm",
        "rbr_1x1/conv": "branch_1x1.conv",
        "rbr_1x1/bn": "branch_1x1.norm",
        "se/down": "se_layer.conv1.conv",
        "se/up": "se_layer.conv2.conv",
    },
    heads={"linear": "head.fc"},
)

FAMILIES: dict[str, Family] = {
    family.name: family for family in (AUTHORS, QAREPVGG, AUTHORS_PLUS, TIMM, TIMM_FEATURES, MMPRETRAIN)
}
