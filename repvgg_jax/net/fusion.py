"""Structural re-parameterisation (paper section 3.3) as pure functions on parameter trees.

A training-form block computes `sum_i BN_i(conv_i(x))`. In inference each BN is affine, so each branch is one
convolution with bias, each kernel can be written as a 3x3 one, and convolutions that read the same input add up.
`kernel_algebra` has the single steps; here is which block takes which.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from ..errors import FusionError
from ..trees import flatten
from .kernel_algebra import (
    BN_EPSILON,
    Pair,
    add_branches,
    average_1x1,
    chain_1x1,
    embed_1x1,
    fuse_conv_bn,
    identity_kernel,
)
from .layout import check_shapes, expected_shapes
from .model import RepVGG
from .variants import AUX_HEADS

Tree = Mapping[str, Any]

BRANCHES = ("rbr_dense", "rbr_1x1", "rbr_identity")
"""RepVGG's own, in the order in which they are summed and named."""

SUM_BN = "bn"
"""QARepVGG's BN on the sum of the branches."""


def equivalent_kernel_bias(
    block_params: Tree, block_batch_stats: Tree, *, epsilon: float = BN_EPSILON
) -> tuple[Array, Array]:
    """The 3x3 kernel and bias that a training-form block equals in inference (`get_equivalent_kernel_bias`).

    Differentiable and jit-able, so a loss may constrain the equivalent kernel while the branches train. Which
    branches there are, and of what kind of block, shows in the tree's names.

    Args:
      block_params: the block's own subtree of `params`: `rbr_dense`, `rbr_1x1` and, if it has them, `rbr_identity`,
        `rbr_dense_1` …, `dbb_1x1_3x3`, `dbb_1x1_avg`, and `bn` on the sum.
      block_batch_stats: the same subtree of `batch_stats`.
      epsilon: of the block's BN, which no tree holds: `model.variant.epsilon`.

    Returns:
      `[3, 3, C_in / groups, C_out]` and `[C_out]`.

    Raises:
      FusionError: the block is fused already, is no RepVGG block, or lacks running statistics.
    """
    if "rbr_reparam" in block_params:
        raise FusionError("this block is already fused: it has rbr_reparam instead of branches")
    if not {"rbr_dense", "rbr_1x1"} <= set(block_params):
        raise FusionError(
            f"not a RepVGG block: expected rbr_dense and rbr_1x1, found {', '.join(block_params) or 'nothing'}"
        )
    present = {name for name in (*block_params, *block_batch_stats) if _is_branch(name)}
    names = [*(name for name in BRANCHES if name in present), *sorted(present.difference(BRANCHES))]
    branches = {name: (block_params.get(name, {}), block_batch_stats.get(name, {})) for name in names}
    missing = [name for name, (params, stats) in branches.items() if not _has_statistics(params, stats)]
    if missing:
        raise FusionError(
            f"no running statistics (batch_stats) for {', '.join(missing)}: fusion needs those of the same net"
        )

    per_group, channels = block_params["rbr_dense"]["conv"]["kernel"].shape[2:]
    kernel, bias = add_branches(
        _fuse_branch(name, *branch, per_group, channels, epsilon) for name, branch in branches.items() if name != SUM_BN
    )
    return fuse_conv_bn(kernel, *branches[SUM_BN], epsilon, bias) if SUM_BN in branches else (kernel, bias)


def _is_branch(name: str) -> bool:
    """Whether that part of a training-form block is fused away."""
    return name.startswith(("rbr_", "dbb_")) or name == SUM_BN


def _has_statistics(params: Tree, stats: Tree) -> bool:
    """Whether every BN in a branch has running ones, of its width; a BN is where a `scale` is learned."""
    if "scale" in params:
        return all(name in stats and stats[name].shape == params["scale"].shape for name in ("mean", "var"))
    return all(
        _has_statistics(child, stats.get(name, {})) for name, child in params.items() if isinstance(child, Mapping)
    )


def _fuse_branch(name: str, params: Tree, stats: Tree, per_group: int, channels: int, epsilon: float) -> Pair:
    """One branch as a 3x3 convolution `[3, 3, per_group, channels]`."""
    if name == "rbr_identity":
        dtype = next(iter(stats.values())).dtype
        identity = identity_kernel(channels, channels // per_group, dtype)
        if params:
            return fuse_conv_bn(identity, params, stats, epsilon)
        return identity * stats["scale"], jnp.zeros(channels, dtype)  # QARepVGG's
    if name.startswith("dbb_"):
        point, point_bias = fuse_conv_bn(params["conv1"]["kernel"], params["bn1"], stats["bn1"], epsilon)
        if "conv2" in params:
            kernel = params["conv2"]["kernel"]
            groups = point.shape[3] // kernel.shape[2]
            kernel, bias = chain_1x1((point, point_bias), (kernel, jnp.zeros(channels, kernel.dtype)), groups)
        else:
            kernel, bias = average_1x1(point), point_bias
        return fuse_conv_bn(kernel, params["bn2"], stats["bn2"], epsilon, bias)
    if "bn" in params:
        kernel, bias = fuse_conv_bn(params["conv"]["kernel"], params["bn"], stats["bn"], epsilon)
    else:
        kernel, bias = params["kernel"], jnp.zeros(channels, params["kernel"].dtype)
    return (embed_1x1(kernel) if kernel.shape[0] == 1 else kernel), bias


def fuse_variables(variables: Tree, path: Sequence[str] = (), *, epsilon: float = BN_EPSILON) -> dict[str, Any]:
    """Fuse every RepVGG block under `path`, and leave everything else of a larger model as it is.

    Auxiliary heads that sit beside a fused RepVGG body are dropped: they serve training only.

    Args:
      variables: `{"params", "batch_stats", …}` of any Flax model that contains RepVGG blocks.
      path: names that lead from `params` to the subtree to fuse, such as `("backbone",)`; empty for all.
      epsilon: of the blocks' BN, which no tree holds: `model.variant.epsilon`.

    Returns:
      New variables, for the same model built with `deploy=True` RepVGG inside. The input is untouched.

    Raises:
      FusionError: nothing to fuse under `path`, a `path` that is a string, a block already fused, or running
        statistics missing.
    """
    if isinstance(path, str):
        raise FusionError(f'path must be a tuple of names, such as ("backbone",), not {path!r}')
    if "params" not in variables:
        raise FusionError(f"expected variables with 'params', found {', '.join(variables) or 'nothing'}")
    params, stats = _fuse_at(variables["params"], variables.get("batch_stats", {}), tuple(path), (), epsilon)
    fused = {name: tree for name, tree in variables.items() if name not in ("params", "batch_stats")}
    fused["params"] = params
    if stats:
        fused["batch_stats"] = stats
    return fused


def _fuse_at(
    params: Tree, stats: Tree, path: tuple[str, ...], walked: tuple[str, ...], epsilon: float
) -> tuple[dict, dict]:
    """Follow `path` down, fuse below it, and rebuild the levels above."""
    if not path:
        fused, remaining, count = _fuse_below(params, stats, walked, epsilon)
        if count == 0:
            raise FusionError(f"no RepVGG block found under {'/'.join(walked) or 'params'}: nothing to fuse")
        return fused, remaining
    name, *rest = path
    if name not in params:
        raise FusionError(f"no {'/'.join((*walked, name))} in params; there are {', '.join(params)}")
    child, child_stats = _fuse_at(params[name], stats.get(name, {}), tuple(rest), (*walked, name), epsilon)
    return {**params, name: child}, _with_child(stats, name, child_stats)


def _fuse_below(params: Tree, stats: Tree, walked: tuple[str, ...], epsilon: float) -> tuple[dict, dict, int]:
    """`params`, `batch_stats` and the number of blocks after fusing every block of this subtree."""
    if "rbr_dense" in params or "rbr_reparam" in params:
        try:
            kernel, bias = equivalent_kernel_bias(params, stats, epsilon=epsilon)
        except FusionError as error:
            raise FusionError(f"{'/'.join(walked) or 'block'}: {error}") from None
        kept = {name: leaf for name, leaf in params.items() if not _is_branch(name)}
        remaining = {name: leaf for name, leaf in stats.items() if not _is_branch(name)}
        return kept | {"rbr_reparam": {"kernel": kernel, "bias": bias}}, remaining, 1

    is_body = "stage0" in params
    fused, remaining, count = {}, dict(stats), 0
    for name, child in params.items():
        if is_body and name in AUX_HEADS:
            remaining.pop(name, None)
        elif isinstance(child, Mapping):
            fused[name], child_stats, found = _fuse_below(child, stats.get(name, {}), (*walked, name), epsilon)
            remaining = _with_child(remaining, name, child_stats)
            count += found
        else:
            fused[name] = child
    return fused, remaining, count


def _with_child(tree: Tree, name: str, child: Tree) -> dict:
    """`tree` with `child` at `name`, or without that entry if nothing is left of it."""
    rest = {key: value for key, value in tree.items() if key != name}
    return {**rest, name: dict(child)} if child else rest


def to_deploy(model: RepVGG, variables: Tree) -> tuple[RepVGG, dict[str, Any]]:
    """The fused model and its variables (`repvgg_model_convert`); the inputs are untouched.

    Pure: under `jax.jit`, close over `model` and return the variables alone.

    Raises:
      FusionError: the model is in deploy form already, or its tree cannot be fused.
      WeightsError: `variables` are another model's.
    """
    if model.deploy:
        raise FusionError("the model is already in deploy form")
    deploy_model, fused = model.clone(deploy=True), fuse_variables(variables, epsilon=model.variant.epsilon)
    check_deploy_params(deploy_model, fused["params"])
    return deploy_model, fused


def check_deploy_params(model: RepVGG, params: Tree) -> None:
    """Hold the names and shapes of a deploy form's parameters to those of its model.

    Raises:
      WeightsError: lists what is missing, unexpected or of another shape.
    """
    found = {f"params/{name}": tuple(leaf.shape) for name, leaf in flatten(params).items()}
    stem = found.get("params/stage0/rbr_reparam/kernel", (3, 3, 3))
    expected = expected_shapes(model.variant, True, model.num_classes, stem[2])
    check_shapes(found, expected, "variables", f"the deploy form of {model.variant.name}")
