"""Claim: each step of the fusion algebra gives a convolution that equals the unfused computation, also in PyTorch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from repvgg_jax.net.blocks import BN_EPSILON
from repvgg_jax.net.kernel_algebra import (
    add_branches,
    average_1x1,
    chain_1x1,
    constant_response,
    embed,
    fuse_conv_bn,
    identity_kernel,
)
from repvgg_jax.net.layers import average_pool

GEOMETRY = dict(
    seed=st.integers(0, 99),
    groups=st.sampled_from([1, 2, 3]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2, 4]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


class Case:
    """An image `[2, H, W, C_in]`, and random parameters for the layers that read it."""

    def __init__(self, seed, groups, stride, dilation, size):
        self.rng = np.random.default_rng(seed)
        self.groups, self.stride, self.dilation = groups, stride, dilation
        self.inputs, self.outputs = groups * int(self.rng.integers(1, 4)), groups * int(self.rng.integers(1, 4))
        self.x = self.rng.normal(size=(2, *size, self.inputs))

    def kernel(self, size: int, inputs: int, outputs: int) -> Any:
        return self.rng.normal(size=(size, size, inputs // self.groups, outputs))

    def noise(self, *shape: int) -> Any:
        return self.rng.normal(size=shape)

    def bn(self, channels: int) -> tuple[Any, Any]:
        params = {"scale": self.rng.normal(1, 0.5, channels), "bias": self.rng.normal(size=channels)}
        return params, {"mean": self.rng.normal(size=channels), "var": self.rng.uniform(0.3, 2, channels)}

    def ours(self, pair) -> np.ndarray:
        """Return the fused convolution of the image."""
        kernel, bias = (np.asarray(part) for part in pair)
        return self.conv(self.image(), kernel, self.stride).numpy().transpose(0, 2, 3, 1) + bias

    def image(self) -> torch.Tensor:
        return torch.from_numpy(self.x.transpose(0, 3, 1, 2).copy())

    def conv(self, x: torch.Tensor, kernel: np.ndarray, stride: int = 1, *, padded: bool = True) -> torch.Tensor:
        weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        dilation = self.dilation if kernel.shape[0] > 1 else 1
        padding = dilation * (kernel.shape[0] // 2) if padded else 0
        return F.conv2d(x, weight, None, stride, padding, dilation, self.groups)


def torch_bn(x: torch.Tensor, params: dict, stats: dict) -> torch.Tensor:
    mean, var, scale, bias = (
        torch.from_numpy(a) for a in (stats["mean"], stats["var"], params["scale"], params["bias"])
    )
    return F.batch_norm(x, mean, var, scale, bias, eps=BN_EPSILON)


def padded_with(x: torch.Tensor, value: torch.Tensor, pad: int) -> torch.Tensor:
    """Apply Diverse Branch Block's padding between two layers: `value [C]` all around."""
    outside = value[:, None, None].expand(len(x), -1, x.shape[2] + 2 * pad, x.shape[3] + 2 * pad).clone()
    outside[:, :, pad : pad + x.shape[2], pad : pad + x.shape[3]] = x
    return outside


def assert_equal(actual: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(actual, expected.numpy().transpose(0, 2, 3, 1), rtol=1e-10, atol=1e-11)


@settings(max_examples=12, deadline=None)
@given(kernel_size=st.sampled_from([1, 3]), **GEOMETRY)
def test_a_convolution_and_its_bn(kernel_size, **geometry):
    case = Case(**geometry)
    kernel, bn = case.kernel(kernel_size, case.inputs, case.outputs), case.bn(case.outputs)
    expected = torch_bn(case.conv(case.image(), kernel, case.stride), *bn)
    assert_equal(case.ours(fuse_conv_bn(kernel, *bn)), expected)
    bias = case.noise(case.outputs)
    biased = torch_bn(case.conv(case.image(), kernel, case.stride) + torch.from_numpy(bias)[:, None, None], *bn)
    assert_equal(case.ours(fuse_conv_bn(kernel, *bn, bias=bias)), biased)


@settings(max_examples=12, deadline=None)
@given(**GEOMETRY)
def test_a_sum_of_branches_with_a_1x1_in_the_centre(**geometry):
    case = Case(**geometry)
    wide, point = case.kernel(3, case.inputs, case.outputs), case.kernel(1, case.inputs, case.outputs)
    biases = case.noise(2, case.outputs)
    image, bias = case.image(), torch.from_numpy(biases.sum(0))[:, None, None]
    expected = case.conv(image, wide, case.stride) + case.conv(image, point, case.stride) + bias
    assert_equal(case.ours(add_branches([(wide, biases[0]), (embed(point), biases[1])])), expected)


@settings(max_examples=12, deadline=None)
@given(**GEOMETRY)
def test_a_1x1_convolution_followed_by_a_3x3_one(**geometry):
    case = Case(**geometry)
    middle = case.groups * 2
    point, wide = case.kernel(1, case.inputs, middle), case.kernel(3, middle, case.outputs)
    first_bn, second_bn = case.bn(middle), case.bn(case.outputs)
    first = fuse_conv_bn(point, *first_bn)
    fused = chain_1x1(first, fuse_conv_bn(wide, *second_bn), case.groups)

    between = torch_bn(case.conv(case.image(), point), *first_bn)
    border = torch.from_numpy(np.array(first[1]))
    between = padded_with(between, border, case.dilation)
    expected = torch_bn(case.conv(between, wide, case.stride, padded=False), *second_bn)
    assert_equal(case.ours(fused), expected)


def test_zero_padding_between_the_two_would_be_a_different_function():
    case = Case(0, 1, 1, 1, (5, 5))
    point, wide = case.kernel(1, case.inputs, 4), case.kernel(3, 4, case.outputs)
    bias = case.noise(4)
    fused = case.ours(chain_1x1((point, bias), (wide, 0 * case.noise(case.outputs))))
    zero_padded = case.conv(case.conv(case.image(), point) + torch.from_numpy(bias)[:, None, None], wide)
    difference = np.abs(fused - zero_padded.numpy().transpose(0, 2, 3, 1))
    assert difference[:, 1:-1, 1:-1].max() < 1e-12
    assert difference[:, 0].min() > 1e-6


@settings(max_examples=12, deadline=None)
@given(**(GEOMETRY | dict(dilation=st.just(1))))
def test_a_1x1_convolution_followed_by_average_pooling(**geometry):
    case = Case(**geometry)
    point, bias = case.kernel(1, case.inputs, case.outputs), case.noise(case.outputs)
    constant = torch.from_numpy(bias)
    between = padded_with(case.conv(case.image(), point) + constant[:, None, None], constant, 1)
    assert_equal(case.ours((average_1x1(point), bias)), F.avg_pool2d(between, 3, case.stride))


@settings(max_examples=12, deadline=None)
@given(**GEOMETRY)
def test_average_pooling_is_a_convolution(**geometry):
    case = Case(**geometry)
    identity = identity_kernel(case.inputs, case.groups, jnp.float64)[1:2, 1:2]
    pooled = average_pool(jnp.asarray(case.x), case.stride, case.dilation)
    np.testing.assert_allclose(case.ours((average_1x1(identity), 0)), pooled, rtol=1e-10, atol=1e-12)
    if case.dilation == 1:
        assert_equal(np.asarray(pooled), F.avg_pool2d(case.image(), 3, case.stride, 1))


@settings(max_examples=10, deadline=None)
@given(**GEOMETRY)
def test_a_convolution_of_a_constant_image(**geometry):
    case = Case(**geometry)
    kernel, value = case.kernel(3, case.inputs, case.outputs), case.noise(case.inputs)
    constant = torch.from_numpy(value)[None, :, None, None].expand(1, -1, 9, 9)
    expected = case.conv(constant, kernel, padded=False)[0, :, 0, 0]
    np.testing.assert_allclose(constant_response(kernel, value, case.groups), expected, rtol=1e-10, atol=1e-12)


def test_every_step_is_differentiable():
    case = Case(0, 2, 1, 1, (3, 3))
    first = (case.kernel(1, 4, 6), case.noise(6))
    second = (case.kernel(3, 6, 4), case.noise(4))

    def steps(first, second, bn):
        kernel, bias = add_branches([chain_1x1(first, second, 2), (average_1x1(first[0])[..., :4], second[1])])
        kernel, bias = fuse_conv_bn(kernel, *bn, bias=bias)
        return kernel + embed(kernel[:1, :1]), bias

    check_grads(steps, (first, second, case.bn(4)), order=1, modes=("fwd", "rev"))
