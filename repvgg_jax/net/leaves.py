"""Layers of a parameter tree: path, kind, and shapes of the leaves."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution, BN or linear layer of the tree.

    Attributes:
      path: path in the tree, such as `stage1_0/rbr_dense/conv`.
      kind: type of layer, which determines its leaves.
      shape: shape of the kernel (`[h, w, in / groups, out]` or `[in, out]`), `[channels]` for a BN, or `[]` for
        QARepVGG's identity, whose only leaf is a constant.
      has_bias: whether a convolution has a bias; linear layers and BNs always have one.
    """

    path: str
    kind: Literal["conv", "bn", "linear", "constant"]
    shape: Shape
    has_bias: bool = True

    def leaves(self) -> Iterator[tuple[str, Shape]]:
        """Yield `(name in the flat tree, shape)` of the layer's leaves."""
        if self.kind == "constant":
            yield f"batch_stats/{self.path}/scale", self.shape
            return
        if self.kind == "bn":
            for collection, leaf in (("params", "scale"), ("params", "bias")):
                yield f"{collection}/{self.path}/{leaf}", self.shape
            for leaf in ("mean", "var"):
                yield f"batch_stats/{self.path}/{leaf}", self.shape
            return
        yield f"params/{self.path}/kernel", self.shape
        if self.has_bias:
            yield f"params/{self.path}/bias", self.shape[-1:]
