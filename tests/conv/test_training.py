"""Claim: the training convolution and its CPU gradients equal PyTorch's, for any shape, stride, groups and dilation."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from repvgg_jax import compiler
from repvgg_jax.conv import native
from repvgg_jax.conv.deploy import SMALL_FORWARD, deploy_conv
from repvgg_jax.conv.native import training
from repvgg_jax.conv.training import SMALL_BACKWARD, training_conv
from repvgg_jax.conv.xla import merged_groups, xla_conv
from tests.helpers.comparison import relative_difference

NEEDS_COMPILER = pytest.mark.skipif(not native.available(), reason="no C++ compiler")


def random_case(
    seed: int, height: int, width: int, size: int, stride: int, groups: int, inner: int, outer: int, images=2
):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(images, height, width, groups * inner))
    kernel = rng.normal(size=(size, size, inner, groups * outer))
    cotangent = rng.normal(size=(images, -(-height // stride), -(-width // stride), groups * outer))
    return x, kernel, cotangent


def in_float64(x: np.ndarray, kernel: np.ndarray, cotangent: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return x.astype(np.float64), kernel.astype(np.float64), cotangent.astype(np.float64)


def our_results(function, x, kernel, cotangent, stride, groups, dilation=1):
    """Return the output, the input gradient and the kernel gradient."""

    def all_three(x, kernel, cotangent):
        y, pull = jax.vjp(lambda x, k: function(x, k, stride, groups, dilation), x, kernel)
        return y, *pull(cotangent)

    return jax.jit(all_three)(x, kernel, cotangent)


def torch_results(x, kernel, cotangent, stride, groups, dilation=1):
    """Return the output, the input gradient and the kernel gradient, in this library's layouts."""
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
    function=st.sampled_from([training_conv, deploy_conv]),
)
def test_values_and_gradients_equal_pytorchs(function, height, width, size, stride, groups, dilation, inner, outer):
    with jax.enable_x64(True):
        x, kernel, cotangent = random_case(height + width, height, width, size, stride, groups, inner, outer)
        geometry = (stride, groups, dilation)
        actual = our_results(function, x, kernel, cotangent, *geometry)
        for ours, theirs in zip(actual, torch_results(x, kernel, cotangent, *geometry), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", [2, 3, 8, 9, 14, 15])
@pytest.mark.parametrize("stride", [1, 2])
def test_both_sides_of_every_threshold_equal_pytorchs(side, stride):
    sides = {bound for table in (SMALL_FORWARD, SMALL_BACKWARD) for bound in table.values()}
    assert {9, 64, 196} <= sides, "the sides above straddle these"
    with jax.enable_x64(True):
        x, kernel, cotangent = random_case(0, side * stride, side * stride, 3, stride, 1, 4, 5)
        actual = our_results(training_conv, x, kernel, cotangent, stride, 1)
        for ours, theirs in zip(actual, torch_results(x, kernel, cotangent, stride, 1), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_it_can_be_differentiated_twice():
    with jax.enable_x64(True):
        x, kernel, _ = random_case(0, 4, 5, 3, 1, 1, 2, 2)
        check_grads(lambda x, k: training_conv(x, k), (x, kernel), order=2, modes=("rev",))


def test_half_precision_stays_half_precision():
    x, kernel = jnp.ones((1, 2, 2, 4), jnp.bfloat16), jnp.ones((3, 3, 4, 4), jnp.bfloat16)
    y, pull = jax.vjp(training_conv, x, kernel)
    assert {a.dtype for a in (y, *pull(y))} == {jnp.dtype(jnp.bfloat16)}


# The native convolutions


@NEEDS_COMPILER
@pytest.mark.parametrize("tile", [0, 2, 4])
@settings(max_examples=40, deadline=None)
@given(
    images=st.integers(1, 3),
    height=st.integers(1, 19),
    width=st.integers(1, 19),
    stride=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 4]),
    inner=st.integers(1, 40),
    outer=st.integers(1, 40),
)
def test_native_values_and_gradients_equal_pytorchs(tile, images, height, width, stride, groups, inner, outer):
    if stride == 2:
        tile = 0
    case = random_case(height + width, height, width, 3, stride, groups, inner, outer, images)
    x, kernel, cotangent = (a.astype(np.float32) for a in case)

    def function(x, kernel, stride, groups, dilation):
        return training.conv(x, kernel, stride, groups, tile)

    actual = our_results(function, x, kernel, cotangent, stride, groups)
    exact = torch_results(*in_float64(x, kernel, cotangent), stride, groups)
    for ours, theirs in zip(actual, exact, strict=True):
        assert relative_difference(theirs, ours) < 1e-5


@NEEDS_COMPILER
@pytest.mark.parametrize(("images", "side", "channels"), [(40, 8, 48), (3, 56, 20), (130, 4, 16)])
def test_native_sums_are_right_when_split(images, side, channels):
    """With several blocks, and with chunks that are added up afterwards."""
    for stride, tile in ((1, 0), (1, 2), (1, 4), (2, 0)):
        case = random_case(0, side, side, 3, stride, 1, channels, channels + 5, images)
        x, kernel, cotangent = (a.astype(np.float32) for a in case)
        actual = training.kernel_gradient(x, cotangent, stride, 1, tile)
        _, _, exact = torch_results(*in_float64(x, kernel, cotangent), stride, 1)
        assert relative_difference(exact, actual) < 1e-5


@NEEDS_COMPILER
@pytest.mark.parametrize(("stride", "tile"), [(1, 0), (1, 4), (2, 0)])
def test_native_convolutions_can_be_differentiated_twice(stride, tile):
    x, kernel, _ = (jnp.asarray(a, jnp.float32) for a in random_case(0, 6, 7, 3, stride, 1, 3, 2))

    def gradients(function):
        def weighed(x, kernel):
            to_x, to_kernel = jax.grad(lambda x, k: (function(x, k) ** 3).sum(), (0, 1))(x, kernel)
            return (to_x**2).sum() + (to_kernel**2).sum()

        return jax.grad(weighed, (0, 1))(x, kernel)

    actual = gradients(lambda x, k: training.conv(x, k, stride, 1, tile))
    for ours, plain in zip(actual, gradients(lambda x, k: deploy_conv(x, k, stride)), strict=True):
        assert relative_difference(plain, ours) < 1e-4


@NEEDS_COMPILER
def test_large_float32_layers_are_native_and_others_are_not(monkeypatch):
    used = []
    conv = training.conv
    monkeypatch.setattr(training, "conv", lambda *a: used.append(a[2:]) or conv(*a))

    def count(side, stride=1, size=3, dilation=1, dtype=jnp.float32, wrap=jax.pmap):
        used.clear()
        x, kernel = jnp.ones((1, 8, side, side, 16), dtype), jnp.ones((1, size, size, 16, 16), dtype)
        wrap(lambda x, kernel: training_conv(x, kernel, stride, 1, dilation))(x, kernel)
        return len(used)

    assert count(16) == count(16, stride=2) == count(4) == 1
    assert count(3) == count(8, stride=2) == count(16, size=1) == count(16, dilation=2) == 0
    assert count(16, dtype=jnp.bfloat16) == 0
    # jit may divide the batch among these devices.
    assert jax.device_count() > 1
    assert count(16, wrap=lambda function: jax.jit(jax.vmap(function))) == 0
    monkeypatch.setenv(compiler.SWITCH, "0")
    assert count(16) == 0


@NEEDS_COMPILER
def test_the_number_of_threads_changes_no_bit_of_a_kernel_gradient():
    script = """
import hashlib, os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
import numpy as np
from repvgg_jax.conv import native
from repvgg_jax.conv.native import training
native.available()
rng = np.random.default_rng(0)
for channels, stride, tile in ((48, 1, 0), (48, 1, 4), (40, 2, 0)):
    x = rng.normal(size=(6, 20, 20, channels)).astype(np.float32)
    gradient = rng.normal(size=(6, 20 // stride, 20 // stride, channels)).astype(np.float32)
    found = np.asarray(training.kernel_gradient(x, gradient, stride, 1, tile))
    print(hashlib.sha256(found.tobytes()).hexdigest())
"""
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    runs = [
        subprocess.run([sys.executable, "-c", script, count], capture_output=True, text=True, check=True).stdout
        for count in ("1", "2")
    ]
    assert len(runs[0].split()) == 3
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("groups", "together"), [(4, 2), (4, 4), (6, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_merged_groups_give_the_same_convolution_and_gradients(groups: int, together: int, stride: int):
    case = random_case(groups, 6, 7, 3, stride, groups, 3, 2)

    def merged(x, kernel, stride, groups, dilation):
        dense = merged_groups(kernel, groups, together)
        return xla_conv(x, dense, stride=stride, groups=groups // together, dilation=dilation)

    def grouped(x, kernel, stride, groups, dilation):
        return xla_conv(x, kernel, stride=stride, groups=groups, dilation=dilation)

    with jax.enable_x64():
        arguments = in_float64(*case)
        for expected, actual in zip(
            our_results(grouped, *arguments, stride, groups),
            our_results(merged, *arguments, stride, groups),
            strict=True,
        ):
            assert relative_difference(expected, actual) <= 1e-13


@pytest.mark.parametrize(("groups", "inputs", "merged"), [(4, 32, 1), (4, 64, 2), (4, 160, 4), (2, 48, 1), (8, 40, 4)])
def test_a_tpu_gets_groups_that_fill_its_vectors(groups: int, inputs: int, merged: int):
    x = jax.ShapeDtypeStruct((2, 14, 14, groups * inputs), "bfloat16")
    kernel = jax.ShapeDtypeStruct((3, 3, inputs, groups * inputs), "bfloat16")
    conv = jax.jit(lambda x, kernel: training_conv(x, kernel, 1, groups))
    for platform, expected in (("tpu", merged), ("cuda", groups)):
        text = jax.export.export(conv, platforms=(platform,))(x, kernel).mlir_module()
        assert text.count("stablehlo.convolution(") == text.count(f"feature_group_count = {expected} : i64") == 1
