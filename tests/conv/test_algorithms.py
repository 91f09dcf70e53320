"""Claim: every algorithm computes the same 3x3 convolution, for any height, width, stride, dilation and groups."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg_jax import compiler
from repvgg_jax.conv import native
from repvgg_jax.conv.algorithm import ALGORITHMS, candidates
from repvgg_jax.conv.cost import LayerShape
from repvgg_jax.conv.deploy import convolve, prepare_kernel
from tests.helpers.comparison import relative_difference

XLA = [name for name, algorithm in ALGORITHMS.items() if not algorithm.is_native]
NATIVE = [name for name, algorithm in ALGORITHMS.items() if algorithm.trains]
HERE = XLA + NATIVE if native.available() else XLA
"""Algorithms available on this machine: the native ones need a C++ compiler."""
NEEDS_COMPILER = pytest.mark.skipif(not native.available(), reason="no C++ compiler")


def direct_sum(x, kernel, bias, stride, groups, relu, dilation=1):
    """The definition, in float64 NumPy."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    n, height, width, _ = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    padded = np.pad(x, ((0, 0), (dilation, dilation), (dilation, dilation), (0, 0)))
    parts = []
    for part, weights in zip(np.split(padded, groups, 3), np.split(kernel, groups, 3), strict=True):
        total = np.zeros((n, rows, columns, weights.shape[3]))
        for i in range(0, 3 * dilation, dilation):
            for j in range(0, 3 * dilation, dilation):
                window = part[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
                total += window @ weights[i // dilation, j // dilation]
        parts.append(total)
    y = np.concatenate(parts, 3) + bias
    return np.maximum(y, 0) if relu else y


def compute(algorithm, x, kernel, bias, stride, groups, relu, dilation=1):
    prepared = jnp.asarray(prepare_kernel(kernel, algorithm, groups=groups))
    options: dict[str, Any] = dict(algorithm=algorithm, stride=stride, groups=groups, relu=relu, dilation=dilation)
    return jax.jit(lambda x, k, b: convolve(x, k, b, **options))(x, prepared, bias)


@settings(max_examples=10, deadline=None)
@given(
    algorithm=st.sampled_from(XLA),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2]),
    inner=st.integers(1, 5),
    outer=st.integers(1, 5),
    relu=st.booleans(),
)
def test_every_algorithm_equals_the_direct_sum(algorithm, height, width, stride, dilation, groups, inner, outer, relu):
    stride = stride if stride in ALGORITHMS[algorithm].strides else 1
    dilation = dilation if ALGORITHMS[algorithm].dilated else 1
    rng = np.random.default_rng(height + 20 * width)
    with jax.enable_x64(True):
        x = rng.normal(size=(2, height, width, groups * inner))
        kernel = rng.normal(size=(3, 3, inner, groups * outer))
        bias = rng.normal(size=groups * outer)
        actual = compute(algorithm, x, kernel, bias, stride, groups, relu, dilation)
        expected = direct_sum(x, kernel, bias, stride, groups, relu, dilation)
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


@NEEDS_COMPILER
@settings(max_examples=30, deadline=None)
@given(
    algorithm=st.sampled_from(NATIVE),
    images=st.integers(1, 3),
    height=st.integers(1, 31),
    width=st.integers(1, 31),
    stride=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 3]),
    inner=st.integers(1, 40),
    outer=st.integers(1, 70),
    relu=st.booleans(),
)
def test_every_native_algorithm_equals_the_direct_sum(
    algorithm, images, height, width, stride, groups, inner, outer, relu
):
    stride = stride if stride in ALGORITHMS[algorithm].strides else 1
    rng = np.random.default_rng(height + 40 * width)
    x = rng.normal(size=(images, height, width, groups * inner)).astype(np.float32)
    kernel = (rng.normal(size=(3, 3, inner, groups * outer)) / np.sqrt(9 * inner)).astype(np.float32)
    bias = rng.normal(size=groups * outer).astype(np.float32)
    actual = np.asarray(compute(algorithm, x, kernel, bias, stride, groups, relu))
    # Far above the rounding error of sums this large, far below the effect of a missing tap.
    np.testing.assert_allclose(actual, direct_sum(x, kernel, bias, stride, groups, relu), rtol=0, atol=1e-4)


@NEEDS_COMPILER
@pytest.mark.parametrize("algorithm", NATIVE)
def test_native_algorithms_keep_images_apart_in_large_batches(algorithm):
    # More tasks than threads, several images in one task, and products whose heights differ.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(37, 9, 11, 48)).astype(np.float32)
    kernel = (rng.normal(size=(3, 3, 48, 80)) / np.sqrt(9 * 48)).astype(np.float32)
    bias = rng.normal(size=80).astype(np.float32)
    actual = np.asarray(compute(algorithm, x, kernel, bias, 1, 1, True))
    np.testing.assert_allclose(actual, direct_sum(x, kernel, bias, 1, 1, True), rtol=0, atol=1e-4)


@pytest.mark.parametrize("algorithm", HERE)
def test_float32_error_of_one_layer_is_small(algorithm):
    limit = 3e-6 if algorithm.endswith("winograd4") else 1e-6
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 14, 14, 96)).astype(np.float32)
    kernel = (rng.normal(size=(3, 3, 96, 96)) / np.sqrt(9 * 96)).astype(np.float32)
    bias = rng.normal(size=96).astype(np.float32)
    actual = compute(algorithm, x, kernel, bias, 1, 1, False)
    assert relative_difference(direct_sum(x, kernel, bias, 1, 1, False), actual) <= limit


@NEEDS_COMPILER
@pytest.mark.parametrize("algorithm", NATIVE)
def test_nan_stays_nan(algorithm):
    x = np.ones((1, 8, 8, 16), np.float32)
    x[0, 4, 4, 3] = np.nan
    kernel = np.ones((3, 3, 16, 16), np.float32)
    actual = np.asarray(compute(algorithm, x, kernel, np.zeros(16, np.float32), 1, 1, True))
    assert np.isnan(actual[0, 3:6, 3:6]).all()
    assert np.isfinite(actual[0, 0, 0]).all()


def test_native_convolutions_can_be_switched_off(monkeypatch):
    monkeypatch.setenv(compiler.SWITCH, "0")
    assert not native.available()
    assert not any(algorithm.is_native for algorithm in candidates(LayerShape(14, 14, 16, 16), "float32"))


def test_a_missing_compiler_is_not_an_error_and_a_failing_one_runs_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert compiler.load_library(native.SOURCE, "convolutions") is None
    assert not caplog.records
    failing = tmp_path / "c++"
    failing.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/asked\necho no such thing >&2\nexit 1\n", encoding="utf-8")
    failing.chmod(0o755)
    for _ in range(2):
        assert compiler.load_library(native.SOURCE, "convolutions") is None
    assert (tmp_path / "asked").read_text(encoding="utf-8") == "asked\n"
    assert [record.getMessage() for record in caplog.records] == [f"no native convolutions: {failing} failed"]
    (kept,) = (tmp_path / "cache" / "repvgg_jax" / "native").iterdir()
    assert "no such thing" in kept.read_text(encoding="utf-8")


def test_native_convolutions_are_for_float32_only():
    with pytest.raises(ValueError, match="native computes in float32, not bfloat16"):
        convolve(jnp.zeros((1, 4, 4, 2), jnp.bfloat16), jnp.zeros(9), jnp.zeros(2), algorithm="native")


def test_winograd_of_a_strided_layer_is_an_error():
    with pytest.raises(ValueError, match="winograd2 needs stride 1, not 2"):
        convolve(jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 16, 2, 2)), jnp.zeros(2), algorithm="winograd2", stride=2)
