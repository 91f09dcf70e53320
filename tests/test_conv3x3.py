"""Claim: every algorithm computes the same 3x3 convolution, for any height, width, stride and groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_difference
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg_jax.conv3x3 import ALGORITHMS, convolve, prepare_kernel, supports


def direct_sum(x, kernel, bias, stride, groups, relu):
    """The definition, in float64 NumPy."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    n, height, width, _ = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = []
    for own, weights in zip(np.split(padded, groups, 3), np.split(kernel, groups, 3), strict=True):
        total = np.zeros((n, rows, columns, weights.shape[3]))
        for i in range(3):
            for j in range(3):
                window = own[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
                total += window @ weights[i, j]
        parts.append(total)
    y = np.concatenate(parts, 3) + bias
    return np.maximum(y, 0) if relu else y


def compute(algorithm, x, kernel, bias, stride, groups, relu):
    prepared = jnp.asarray(prepare_kernel(kernel, algorithm, groups=groups))
    options = dict(algorithm=algorithm, stride=stride, groups=groups, relu=relu)
    return jax.jit(lambda x, k, b: convolve(x, k, b, **options))(x, prepared, bias)


@settings(max_examples=20, deadline=None)
@given(
    algorithm=st.sampled_from(ALGORITHMS),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    stride=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2]),
    inner=st.integers(1, 5),
    outer=st.integers(1, 5),
    relu=st.booleans(),
)
def test_any_algorithm_is_the_direct_sum(algorithm, height, width, stride, groups, inner, outer, relu):
    if not supports(algorithm, stride):
        stride = 1
    rng = np.random.default_rng(height + 20 * width)
    with jax.enable_x64(True):
        x = rng.normal(size=(2, height, width, groups * inner))
        kernel = rng.normal(size=(3, 3, inner, groups * outer))
        bias = rng.normal(size=groups * outer)
        found = compute(algorithm, x, kernel, bias, stride, groups, relu)
        np.testing.assert_allclose(found, direct_sum(x, kernel, bias, stride, groups, relu), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("algorithm", "limit"), [("direct", 1e-6), ("im2col", 1e-6), ("winograd2", 1e-6), ("winograd4", 5e-6)]
)
def test_float32_error_of_one_layer(algorithm, limit):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 14, 14, 96)).astype(np.float32)
    kernel = (rng.normal(size=(3, 3, 96, 96)) / np.sqrt(9 * 96)).astype(np.float32)
    bias = rng.normal(size=96).astype(np.float32)
    found = compute(algorithm, x, kernel, bias, 1, 1, False)
    assert relative_difference(direct_sum(x, kernel, bias, 1, 1, False), found) <= limit


def test_winograd_of_a_strided_layer_is_an_error():
    with pytest.raises(ValueError, match="winograd2 needs stride 1, not 2"):
        convolve(jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 16, 2, 2)), jnp.zeros(2), algorithm="winograd2", stride=2)
