"""One block of any kind in PyTorch, written from the papers: the oracle for blocks that no published net has."""

from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repvgg_jax as rv
from repvgg_jax.net.blocks import RepVGGBlock
from repvgg_jax.net.branches import BlockKind
from repvgg_jax.trees import flatten


class TorchBlock(nn.Module):
    """The block as the papers describe it, with its submodules named as in the parameter tree."""

    def __init__(self, inputs, outputs, stride, groups, dilation, identity, block: BlockKind, branches: rv.Branches):
        super().__init__()
        self.stride, self.dilation, self.bare = stride, dilation, block == "qarepvgg"

        def conv(size: Any, c_in: int, c_out: int, stride: int, padding: Any) -> nn.Conv2d:
            spread = 1 if size == 1 else dilation
            return nn.Conv2d(c_in, c_out, size, stride, padding, spread, groups, bias=False)

        def conv_bn(size: Any, padding: Any) -> nn.ModuleDict:
            return nn.ModuleDict({"conv": conv(size, inputs, outputs, stride, padding), "bn": nn.BatchNorm2d(outputs)})

        for copy in range(branches.dense_copies):
            self.add_module(f"rbr_dense_{copy}" if copy else "rbr_dense", conv_bn(3, dilation))
        if branches.point:
            self.rbr_1x1 = conv(1, inputs, outputs, stride, 0) if self.bare else conv_bn(1, 0)
        if branches.dbb_1x1_3x3:
            layers = dict(conv1=conv(1, inputs, inputs, 1, 0), bn1=nn.BatchNorm2d(inputs))
            layers |= dict(conv2=conv(3, inputs, outputs, stride, 0), bn2=nn.BatchNorm2d(outputs))
            self.dbb_1x1_3x3 = nn.ModuleDict(layers)
        if branches.dbb_1x1_avg:
            layers = dict(
                conv1=conv(1, inputs, outputs, 1, 0), bn1=nn.BatchNorm2d(outputs), bn2=nn.BatchNorm2d(outputs)
            )
            self.dbb_1x1_avg = nn.ModuleDict(layers)
        if branches.strips:
            self.add_module("rbr_1x3", conv_bn((1, 3), (0, dilation)))
            self.add_module("rbr_3x1", conv_bn((3, 1), (dilation, 0)))
        self.identity = identity and branches.identity
        if self.identity and not self.bare:
            self.rbr_identity = nn.BatchNorm2d(outputs)
        if self.bare:
            self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        branch: Any
        for name, branch in self.named_children():
            if name.startswith(("rbr_dense", "rbr_1x3", "rbr_3x1")):
                total = total + branch["bn"](branch["conv"](x))
            elif name == "rbr_1x1":
                total = total + (branch(x) if self.bare else branch["bn"](branch["conv"](x)))
            elif name == "rbr_identity":
                total = total + branch(x)
            elif name.startswith("dbb"):
                total = total + self._second(branch, self._padded(branch["bn1"], branch["conv1"](x)))
        if self.bare:
            total = self.bn(total + x if self.identity else total)
        return F.relu(total)

    def _padded(self, bn: nn.BatchNorm2d, y: Tensor) -> Tensor:
        """Apply BN, then pad with BN's value for zero: in training, with the batch's statistics as here."""
        mean: Any = y.mean((0, 2, 3)) if bn.training else bn.running_mean
        var: Any = y.var((0, 2, 3), unbiased=False) if bn.training else bn.running_var
        zero = (bn.bias - mean * bn.weight / (var + bn.eps).sqrt())[:, None, None]
        return F.pad(bn(y) - zero, (self.dilation,) * 4) + zero

    def _second(self, branch: Any, y: Tensor) -> Tensor:
        if "conv2" in branch:
            return branch["bn2"](branch["conv2"](y))
        spread = self.dilation
        rows, columns = (y.shape[axis] - 2 * spread for axis in (2, 3))
        pixels = [
            y[:, :, i : i + rows, j : j + columns] for i in (0, spread, 2 * spread) for j in (0, spread, 2 * spread)
        ]
        return branch["bn2"](torch.stack(pixels).mean(0)[:, :, :: self.stride, :: self.stride])


def torch_state(variables: dict[str, Any]) -> dict[str, Tensor]:
    """Return a block's tree under PyTorch's names and in its layout."""
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    state = {}
    for path, leaf in flatten(variables).items():
        _, *parents, name = path.split("/")
        array = np.asarray(leaf)
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
        state[".".join([*parents, names.get(name, name)])] = torch.from_numpy(array.copy())
    return {key: value for key, value in state.items() if value.ndim}  # without QARepVGG's constant


def random_block(seed: int, block: RepVGGBlock, x: np.ndarray) -> dict[str, Any]:
    """Return variables with no value at its initial one, except QARepVGG's constant."""
    rng = np.random.default_rng(seed)

    def random(path, leaf):
        if leaf.ndim == 0:
            return np.ones(())
        values = rng.uniform(0.3, 2.0, leaf.shape)
        return values if path[-1].key in ("var", "scale") else rng.normal(0, 0.5, leaf.shape)

    return jax.tree_util.tree_map_with_path(random, jax.eval_shape(block.init, jax.random.key(0), x))
