"""Structural re-parameterisation (paper section 3.3) as pure functions on parameter trees.

A training-form block computes `sum_i BN_i(conv_i(x))`. In inference each BN is affine, so each branch is one
convolution with bias, each kernel can be written as a 3x3 one, and convolutions that read the same input add up.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from .blocks import BN_EPSILON
from .errors import FusionError
from .model import RepVGG
from .variants import AUX_HEADS

Tree = Mapping[str, Any]

BRANCHES = ("rbr_dense", "rbr_1x1", "rbr_identity")


def fuse_conv_bn(kernel: Array, bn_params: Tree, bn_stats: Tree, epsilon: float = BN_EPSILON) -> tuple[Array, Array]:
    """Kernel and bias of the one convolution that equals a bias-free convolution followed by BN in inference.

    Args:
      kernel: `[k, k, C_in / groups, C_out]`.
      bn_params: `{"scale": [C_out], "bias": [C_out]}` (gamma, beta).
      bn_stats: `{"mean": [C_out], "var": [C_out]}`, the running statistics.
      epsilon: what the BN adds to the variance.
    """
    factor = bn_params["scale"] / jnp.sqrt(bn_stats["var"] + epsilon)
    return kernel * factor, bn_params["bias"] - bn_stats["mean"] * factor


def pad_1x1_to_3x3(kernel: Array) -> Array:
    """A 1x1 kernel `[1, 1, I, O]` as the centre of a 3x3 one `[3, 3, I, O]`."""
    return jnp.pad(kernel, ((1, 1), (1, 1), (0, 0), (0, 0)))


def identity_kernel(channels: int, groups: int, dtype: Any = jnp.float32) -> Array:
    """The 3x3 kernel `[3, 3, channels / groups, channels]` whose (grouped) convolution returns its input.

    Output channel `i` reads input channel `i mod (channels / groups)` of its group.
    """
    per_group = channels // groups
    outputs = jnp.arange(channels)
    return jnp.zeros((3, 3, per_group, channels), dtype).at[1, 1, outputs % per_group, outputs].set(1)


def equivalent_kernel_bias(block_params: Tree, block_batch_stats: Tree) -> tuple[Array, Array]:
    """The 3x3 kernel and bias that a training-form block equals in inference (`get_equivalent_kernel_bias`).

    Differentiable and jit-able, so a loss may constrain the equivalent kernel while the branches train.

    Args:
      block_params: the block's own subtree of `params`: `rbr_dense`, `rbr_1x1` and, if it has one, `rbr_identity`.
      block_batch_stats: the same subtree of `batch_stats`.

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
    missing = [b for b in BRANCHES if b in block_params and not _has_statistics(b, block_batch_stats)]
    if missing:
        raise FusionError(f"no running statistics (batch_stats) for {', '.join(missing)}: fusion needs them")

    dense, point = block_params["rbr_dense"], block_params["rbr_1x1"]
    dense_stats, point_stats = block_batch_stats["rbr_dense"]["bn"], block_batch_stats["rbr_1x1"]["bn"]
    kernel, bias = fuse_conv_bn(dense["conv"]["kernel"], dense["bn"], dense_stats)
    point_kernel, point_bias = fuse_conv_bn(point["conv"]["kernel"], point["bn"], point_stats)
    kernel, bias = kernel + pad_1x1_to_3x3(point_kernel), bias + point_bias
    if "rbr_identity" in block_params:
        per_group, channels = kernel.shape[2:]
        identity = identity_kernel(channels, channels // per_group, kernel.dtype)
        identity_fused, identity_bias = fuse_conv_bn(
            identity, block_params["rbr_identity"], block_batch_stats["rbr_identity"]
        )
        kernel, bias = kernel + identity_fused, bias + identity_bias
    return kernel, bias


def _has_statistics(branch: str, stats: Tree) -> bool:
    node = stats.get(branch, {})
    return {"mean", "var"} <= set(node if branch == "rbr_identity" else node.get("bn", {}))


def fuse_variables(variables: Tree, path: Sequence[str] = ()) -> dict[str, Any]:
    """Fuse every RepVGG block under `path`, and leave everything else of a larger model as it is.

    Auxiliary heads that sit beside a fused RepVGG body are dropped: they serve training only.

    Args:
      variables: `{"params", "batch_stats", …}` of any Flax model that contains RepVGG blocks.
      path: names that lead from `params` to the subtree to fuse, such as `("backbone",)`; empty for all.

    Returns:
      New variables, for the same model built with `deploy=True` RepVGG inside. The input is untouched.

    Raises:
      FusionError: nothing to fuse under `path`, a block already fused, or running statistics missing.
    """
    if "params" not in variables:
        raise FusionError(f"expected variables with 'params', found {', '.join(variables) or 'nothing'}")
    params, stats = _fuse_at(variables["params"], variables.get("batch_stats", {}), tuple(path), ())
    fused = {name: tree for name, tree in variables.items() if name not in ("params", "batch_stats")}
    fused["params"] = params
    if stats:
        fused["batch_stats"] = stats
    return fused


def _fuse_at(params: Tree, stats: Tree, path: tuple[str, ...], walked: tuple[str, ...]) -> tuple[dict, dict]:
    """Follow `path` down, fuse below it, and rebuild the levels above."""
    if not path:
        fused, remaining, count = _fuse_below(params, stats, walked)
        if count == 0:
            raise FusionError(f"no RepVGG block found under {'/'.join(walked) or 'params'}: nothing to fuse")
        return fused, remaining
    name, *rest = path
    if name not in params:
        raise FusionError(f"no {'/'.join((*walked, name))} in params; there are {', '.join(params)}")
    child, child_stats = _fuse_at(params[name], stats.get(name, {}), tuple(rest), (*walked, name))
    return {**params, name: child}, _with_child(stats, name, child_stats)


def _fuse_below(params: Tree, stats: Tree, walked: tuple[str, ...]) -> tuple[dict, dict, int]:
    """`params`, `batch_stats` and the number of blocks after fusing every block of this subtree."""
    if "rbr_dense" in params or "rbr_reparam" in params:
        try:
            kernel, bias = equivalent_kernel_bias(params, stats)
        except FusionError as error:
            raise FusionError(f"{'/'.join(walked) or 'block'}: {error}") from None
        kept = {name: leaf for name, leaf in params.items() if name not in BRANCHES}
        remaining = {name: leaf for name, leaf in stats.items() if name not in BRANCHES}
        return kept | {"rbr_reparam": {"kernel": kernel, "bias": bias}}, remaining, 1

    is_body = "stage0" in params
    fused, remaining, count = {}, dict(stats), 0
    for name, child in params.items():
        if is_body and name in AUX_HEADS:
            remaining.pop(name, None)
        elif isinstance(child, Mapping):
            fused[name], child_stats, found = _fuse_below(child, stats.get(name, {}), (*walked, name))
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
    """
    if model.deploy:
        raise FusionError("the model is already in deploy form")
    return model.clone(deploy=True), fuse_variables(variables)
