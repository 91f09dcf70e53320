"""Claim: the training convolution and its CPU gradients are PyTorch's, whatever the shape, stride, groups, dilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from repvgg_jax.training_conv import SMALL_BACKWARD, SMALL_FORWARD, plain_conv, training_conv


def random_case(seed: int, height: int, width: int, size: int, stride: int, groups: int, inner: int, outer: int):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, height, width, groups * inner))
    kernel = rng.normal(size=(size, size, inner, groups * outer))
    cotangent = rng.normal(size=(2, -(-height // stride), -(-width // stride), groups * outer))
    return x, kernel, cotangent


def our_results(function, x, kernel, cotangent, stride, groups, dilation=1):
    """Output, gradient to the input, gradient to the kernel."""

    def all_three(x, kernel, cotangent):
        y, pull = jax.vjp(lambda x, k: function(x, k, stride, groups, dilation), x, kernel)
        return y, *pull(cotangent)

    return jax.jit(all_three)(x, kernel, cotangent)


def torch_results(x, kernel, cotangent, stride, groups, dilation=1):
    """Output, gradient to the input, gradient to the kernel, in this library's layouts."""
    image = torch.from_numpy(x.transpose(0, 3, 1, 2)).contiguous().requires_grad_()
    weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1)).contiguous().requires_grad_()
    y = torch.nn.functional.conv2d(image, weight, None, stride, dilation * (kernel.shape[0] // 2), dilation, groups)
    y.backward(torch.from_numpy(cotangent.transpose(0, 3, 1, 2)).contiguous())
    assert image.grad is not None
    assert weight.grad is not None
    y, to_image = (t.detach().numpy().transpose(0, 2, 3, 1) for t in (y, image.grad))
    return y, to_image, weight.grad.numpy().transpose(2, 3, 1, 0)


@settings(max_examples=20, deadline=None)
@given(
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    size=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 4]),
    dilation=st.sampled_from([1, 2, 4]),
    inner=st.integers(1, 3),
    outer=st.integers(1, 3),
    function=st.sampled_from([training_conv, plain_conv]),
)
def test_values_and_gradients_are_pytorchs(function, height, width, size, stride, groups, dilation, inner, outer):
    with jax.enable_x64(True):
        x, kernel, cotangent = random_case(height + width, height, width, size, stride, groups, inner, outer)
        geometry = (stride, groups, dilation)
        found = our_results(function, x, kernel, cotangent, *geometry)
        for ours, theirs in zip(found, torch_results(x, kernel, cotangent, *geometry), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", [2, 3, 8, 9, 14, 15])
@pytest.mark.parametrize("stride", [1, 2])
def test_both_sides_of_every_threshold(side, stride):
    sides = {bound for table in (SMALL_FORWARD, SMALL_BACKWARD) for bound in table.values()}
    assert {9, 64, 196} <= sides, "the sides above straddle these"
    with jax.enable_x64(True):
        x, kernel, cotangent = random_case(0, side * stride, side * stride, 3, stride, 1, 4, 5)
        found = our_results(training_conv, x, kernel, cotangent, stride, 1)
        for ours, theirs in zip(found, torch_results(x, kernel, cotangent, stride, 1), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_it_can_be_differentiated_twice():
    with jax.enable_x64(True):
        x, kernel, _ = random_case(0, 4, 5, 3, 1, 1, 2, 2)
        check_grads(lambda x, k: training_conv(x, k), (x, kernel), order=2, modes=("rev",))


def test_half_precision_stays_half_precision():
    x, kernel = jnp.ones((1, 2, 2, 4), jnp.bfloat16), jnp.ones((3, 3, 4, 4), jnp.bfloat16)
    y, pull = jax.vjp(training_conv, x, kernel)
    assert {a.dtype for a in (y, *pull(y))} == {jnp.dtype(jnp.bfloat16)}
