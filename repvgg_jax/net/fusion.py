"""Structural re-parameterisation (paper section 3.3) as pure functions on parameter trees.

A training-form block computes `sum_i BN_i(conv_i(x))`. In inference each BN is affine, so each branch is one
convolution with bias, each kernel can be written as a 3x3 one, and convolutions that read the same input add up.
`branches` fuses each branch with the operations of `kernel_algebra`; this module walks over the tree.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jax import Array

from ..errors import FusionError
from ..trees import flatten
from .branches import KINDS, SUM_BN, Branch, branch_in_tree, is_branch
from .kernel_algebra import BN_EPSILON, add_branches, fuse_conv_bn
from .layout import check_shapes, expected_shapes, in_channels_of
from .model import RepVGG
from .steps import FusedBlock
from .variants import AUX_HEADS

Tree = Mapping[str, Any]


def equivalent_kernel_bias(
    block_params: Tree, block_batch_stats: Tree, *, epsilon: float = BN_EPSILON
) -> tuple[Array, Array]:
    """Return the 3x3 kernel and bias that a training-form block equals in inference (`get_equivalent_kernel_bias`).

    Differentiable and jit-able, so a loss may constrain the equivalent kernel while the branches train. The names in
    the tree show which branches there are, and the kind of block.

    Args:
      block_params: the block's subtree of `params`: `rbr_dense`, `rbr_1x1` and, if it has them, `rbr_identity`,
        `rbr_dense_1` …, `dbb_1x1_3x3`, `dbb_1x1_avg`, and `bn` on the sum.
      block_batch_stats: the same subtree of `batch_stats`.
      epsilon: epsilon of the block's BN, which is not stored in the tree: `model.variant.epsilon`.

    Returns:
      Kernel `[3, 3, C_in / groups, C_out]` and bias `[C_out]`.

    Raises:
      FusionError: the block is already fused, is not a RepVGG block, or lacks running statistics.
    """
    if "rbr_reparam" in block_params:
        raise FusionError("this block is already fused: it has rbr_reparam instead of branches")
    if "rbr_dense" not in block_params:
        raise FusionError(f"not a RepVGG block: expected rbr_dense, found {', '.join(block_params) or 'nothing'}")
    branches = _branches_in(block_params, block_batch_stats)
    trees = {name: (block_params.get(name, {}), block_batch_stats.get(name, {})) for name in (*branches, SUM_BN)}
    missing = [name for name, (params, stats) in trees.items() if not _has_statistics(params, stats)]
    if missing:
        raise FusionError(
            f"no running statistics (batch_stats) for {', '.join(missing)}: fusion needs those of the same net"
        )

    kernel = block_params["rbr_dense"]["conv"]["kernel"]
    block = FusedBlock(kernel.shape[2], kernel.shape[3], kernel.dtype, epsilon)
    kernel, bias = add_branches(branch.fuse(*trees[name], block) for name, branch in branches.items())
    return fuse_conv_bn(kernel, *trees[SUM_BN], epsilon, bias) if SUM_BN in block_params else (kernel, bias)


def _branches_in(params: Tree, stats: Tree) -> dict[str, Branch]:
    """Return the branches in a block's tree, by name, in the order of summation."""
    names = {name for name in (*params, *stats) if is_branch(name) and name != SUM_BN}
    kinds = {name: branch_in_tree(name, params.get(name, {})) for name in sorted(names)}
    for name, kind in kinds.items():
        if kind is None:
            raise FusionError(f"{name} is not a known kind of branch: it holds {', '.join(params.get(name, {}))}")
    branches = {name: kind for name, kind in kinds.items() if kind is not None}
    return dict(sorted(branches.items(), key=lambda pair: KINDS.index(pair[1])))


def _has_statistics(params: Tree, stats: Tree) -> bool:
    """Return whether every BN in a branch has running statistics of its width; a learned `scale` marks a BN."""
    if "scale" in params:
        return all(name in stats and stats[name].shape == params["scale"].shape for name in ("mean", "var"))
    return all(
        _has_statistics(child, stats.get(name, {})) for name, child in params.items() if isinstance(child, Mapping)
    )


def fuse_variables(variables: Tree, path: Sequence[str] = (), *, epsilon: float = BN_EPSILON) -> dict[str, Any]:
    """Fuse every RepVGG block under `path`, and leave the rest of a larger model unchanged.

    The auxiliary heads of a fused RepVGG are dropped, since only training uses them.

    Args:
      variables: `{"params", "batch_stats", …}` of any Flax model that contains RepVGG blocks.
      path: names that lead from `params` to the subtree to fuse, such as `("backbone",)`; empty for the whole tree.
      epsilon: epsilon of the blocks' BN, which is not stored in the tree: `model.variant.epsilon`.

    Returns:
      New variables for the same model with its RepVGG built with `deploy=True`. The input is not modified.

    Raises:
      FusionError: there is nothing to fuse under `path`, `path` is a string, a block is already fused, or running
        statistics are missing.
    """
    if isinstance(path, str):
        raise FusionError(f'path must be a tuple of names, such as ("backbone",), not {path!r}')
    if "params" not in variables:
        raise FusionError(f"expected variables with 'params', found {', '.join(variables) or 'nothing'}")
    params, stats, count = _fuse_below(variables["params"], variables.get("batch_stats", {}), tuple(path), (), epsilon)
    if count == 0:
        raise FusionError(f"no RepVGG block found under {'/'.join(path) or 'params'}: nothing to fuse")
    fused = {name: tree for name, tree in variables.items() if name not in ("params", "batch_stats")}
    fused["params"] = params
    if stats:
        fused["batch_stats"] = stats
    return fused


def _fuse_below(
    params: Tree, stats: Tree, path: tuple[str, ...], walked: tuple[str, ...], epsilon: float
) -> tuple[dict, dict, int]:
    """Return `params`, `batch_stats` and the number of blocks after fusing every block at `path` in this subtree."""
    if path and path[0] not in params:
        raise FusionError(f"no {'/'.join((*walked, path[0]))} in params; there are {', '.join(params)}")
    if not path and ("rbr_dense" in params or "rbr_reparam" in params):
        try:
            kernel, bias = equivalent_kernel_bias(params, stats, epsilon=epsilon)
        except FusionError as error:
            raise FusionError(f"{'/'.join(walked) or 'block'}: {error}") from None
        kept = {name: leaf for name, leaf in params.items() if not is_branch(name)}
        remaining = {name: leaf for name, leaf in stats.items() if not is_branch(name)}
        return kept | {"rbr_reparam": {"kernel": kernel, "bias": bias}}, remaining, 1

    is_body = not path and "stage0" in params
    fused, remaining, count = {}, dict(stats), 0
    for name, child in params.items():
        if is_body and name in AUX_HEADS:
            remaining.pop(name, None)
        elif isinstance(child, Mapping) and name in (path[:1] or params):
            below = _fuse_below(child, remaining.pop(name, {}), path[1:], (*walked, name), epsilon)
            fused[name], child_stats, blocks = below
            if child_stats:
                remaining[name] = child_stats
            count += blocks
        else:
            fused[name] = child
    return fused, remaining, count


def to_deploy(model: RepVGG, variables: Tree) -> tuple[RepVGG, dict[str, Any]]:
    """Return the fused model and its variables (`repvgg_model_convert`); the inputs are not modified.

    The function is pure. Under `jax.jit`, close over `model` and return only the variables.

    Args:
      model: model in training form.
      variables: its `{"params", "batch_stats"}`.

    Returns:
      The model in deploy form, and its variables.

    Raises:
      FusionError: the model is already in deploy form, or its tree cannot be fused.
      WeightsError: `variables` belong to another model.
    """
    if model.deploy:
        raise FusionError("the model is already in deploy form")
    _check_branches(model, variables)
    deploy_model, fused = model.clone(deploy=True), fuse_variables(variables, epsilon=model.variant.epsilon)
    check_deploy_params(deploy_model, fused["params"])
    return deploy_model, fused


def _check_branches(model: RepVGG, variables: Tree) -> None:
    """Check that every block has the model's branches: a missing one would go unnoticed in the fused kernel."""
    trees = [variables.get(collection, {}) for collection in ("params", "batch_stats")]
    for block in model.variant.blocks():
        present = {name for tree in trees for name in tree.get(block.name, {}) if is_branch(name) and name != SUM_BN}
        wanted = [branch.name for branch in model.variant.training_branches(block)]
        if present and present != set(wanted):
            shown = ", ".join(sorted(present))
            raise FusionError(f"{block.name} has the branches {shown}; {model.variant.name}'s are {', '.join(wanted)}")


def check_deploy_params(model: RepVGG, params: Tree) -> None:
    """Check the names and shapes of deploy-form parameters against the model.

    Raises:
      WeightsError: names or shapes differ; the message lists missing and unexpected entries and those of another shape.
    """
    actual = {f"params/{name}": tuple(leaf.shape) for name, leaf in flatten(params).items()}
    channels = in_channels_of(flatten({"params": params}))
    expected = expected_shapes(model.variant, True, model.num_classes, channels)
    check_shapes(actual, expected, "the variable tree", f"the deploy form of {model.variant.name}")
