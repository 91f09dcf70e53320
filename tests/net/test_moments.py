"""Claim: statistics equal PyTorch's, though data is read once and pointwise branches are not read at all."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import repvgg_jax as rv
from repvgg_jax.conv.training import differentiable_in_every_mode
from repvgg_jax.net.blocks import RepVGGBlock
from repvgg_jax.net.layers import BatchNorm
from repvgg_jax.net.moments import moments_about
from repvgg_jax.trees import flatten
from tests.helpers.comparison import relative_difference
from tests.helpers.parity import cast
from tests.helpers.torch_block import random_block


def noise(shape: tuple[int, ...], mean: float = 0, std: float = 1, seed: int = 0) -> np.ndarray:
    return (mean + std * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (1000, 0.01), (-1000, 0.5), (0, 1e-4), (30, 1e-3)])
def test_batch_norm_equals_pytorchs(mean: float, std: float):
    x, weights = noise((8, 5, 7, 3), mean, std), noise((8, 5, 7, 3), seed=1)
    theirs = torch.nn.BatchNorm2d(3).double()
    inputs = torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float64, requires_grad=True)
    expected = theirs(inputs)
    (expected * torch.tensor(weights.transpose(0, 3, 1, 2))).sum().backward()
    assert inputs.grad is not None

    variables = BatchNorm().init(jax.random.key(0), x)

    def loss(x: jax.Array) -> Any:
        y, changed = BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])
        return (y * weights).sum(), (y, changed)

    gradient, (y, changed) = jax.jit(jax.grad(loss, has_aux=True))(x)
    statistics = flatten(changed)
    resolution = 2e-6 + 1e-7 * abs(mean) / std  # of the inputs, relative to their spread
    for ours, other in (
        (y, expected.detach().numpy().transpose(0, 2, 3, 1)),
        (gradient, inputs.grad.numpy().transpose(0, 2, 3, 1)),
    ):
        assert relative_difference(other, np.asarray(ours)) <= resolution
    assert theirs.running_mean is not None
    assert theirs.running_var is not None
    np.testing.assert_allclose(statistics["batch_stats/mean"], theirs.running_mean.numpy(), rtol=1e-6, atol=1e-6 * std)
    changes = [var - 0.9 for var in (statistics["batch_stats/var"], theirs.running_var.numpy())]
    np.testing.assert_allclose(*changes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (1000, 0.01)])
def test_a_running_mean_off_by_ten_deviations_is_close_enough(mean: float, std: float):
    """As on TPUs, where statistics are computed while the convolution runs."""
    x = noise((8, 9, 9, 3), mean, std)
    moments = jax.jit(moments_about)(x, jnp.full(3, mean + 10 * std, jnp.float32))
    np.testing.assert_allclose(moments.var, x.astype(np.float64).var((0, 1, 2)), rtol=1e-3)
    np.testing.assert_allclose(moments.mean, x.astype(np.float64).mean((0, 1, 2)), rtol=1e-6, atol=1e-5)


BLOCKS = {
    "plain": RepVGGBlock(12),
    "other channels": RepVGGBlock(6),
    "strided": RepVGGBlock(12, stride=2),
    "grouped": RepVGGBlock(12, groups=3),
    "grouped and strided": RepVGGBlock(24, stride=2, groups=2),
    "dilated": RepVGGBlock(12, dilation=2),
    "QARepVGG": RepVGGBlock(12, block="qarepvgg"),
    "copies and strips": RepVGGBlock(12, branches=rv.Branches(dense_copies=2, strips=True, dbb_1x1_avg=True)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_pointwise_branches_as_one_convolution_change_nothing(name: str):
    """Computed in float32 with moments in float64, compared with float64 throughout."""
    x = np.abs(noise((4, 9, 7, 12)))

    def results(block: RepVGGBlock, dtype: Any) -> dict[str, np.ndarray]:
        block = dataclasses.replace(block, dtype=dtype, param_dtype=jnp.float64)
        variables = cast(random_block(0, BLOCKS[name], x), "float64")
        weights = noise(jax.eval_shape(block.apply, variables, x).shape, seed=1)

        def loss(params: Any, x: jax.Array) -> Any:
            tree = {"params": params, "batch_stats": variables["batch_stats"]}
            y, changed = block.apply(tree, x, train=True, mutable=["batch_stats"])
            return (y.astype(jnp.float64) * weights).sum(), (y, changed)

        gradients, (y, changed) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
            variables["params"], jnp.asarray(x, dtype)
        )
        return flatten({"y": y, "params": gradients[0], "x": gradients[1], **changed})

    with jax.enable_x64(True):
        exact, merged = results(BLOCKS[name], jnp.float64), results(BLOCKS[name], jnp.float32)
    assert exact.keys() == merged.keys()
    largest = max(np.abs(value).max() for value in exact.values())  # some gradients are zero up to rounding
    for leaf, value in exact.items():
        np.testing.assert_allclose(merged[leaf], value, atol=1e-6 * (np.abs(value).max() + largest), err_msg=leaf)


def test_a_channel_that_hardly_varies_is_not_amplified_into_noise():
    """Its scale is large, and must not amplify what bfloat16 rounds off."""
    block = RepVGGBlock(4, dtype=jnp.bfloat16)
    x = np.full((8, 8, 8, 4), 3.0, np.float32)
    x[..., 1] += 2.0**-4 * (np.arange(8) % 2)  # four steps of bfloat16
    variables: Any = block.init(jax.random.key(0), x)
    variables["params"]["rbr_dense"]["bn"]["scale"] *= 0
    variables["params"]["rbr_1x1"]["bn"]["scale"] *= 0
    y, _ = block.apply(variables, jnp.asarray(x, jnp.bfloat16), train=True, mutable=["batch_stats"])
    alternating = np.where(np.arange(8) % 2, 1, 0)
    expected = np.zeros(x.shape)
    expected[..., 1] = alternating
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=0.3)


def test_forward_mode_works_in_bfloat16():
    block = RepVGGBlock(12, dtype=jnp.bfloat16)
    x = jnp.asarray(noise((4, 9, 7, 12)), jnp.bfloat16)
    variables = random_block(0, BLOCKS["plain"], np.asarray(x, np.float32))
    with differentiable_in_every_mode():
        y, tangent = jax.jvp(
            lambda x: block.apply(variables, x, train=True, mutable=["batch_stats"])[0], (x,), (jnp.ones_like(x),)
        )
    assert y.shape == tangent.shape
    assert bool(jnp.isfinite(tangent.astype(jnp.float32)).all())
