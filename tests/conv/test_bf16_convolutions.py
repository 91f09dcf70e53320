"""Claim: the native bfloat16 convolution equals the definition, rounded once, for any shape, stride and groups."""

import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg_jax.conv import native
from repvgg_jax.conv.algorithm import ALGORITHMS, candidates
from repvgg_jax.conv.cost import LayerShape
from repvgg_jax.conv.deploy import convolve, prepare_kernel
from tests.conv.test_algorithms import direct_sum
from tests.helpers.comparison import relative_difference
from tests.helpers.repository import ROOT

pytestmark = pytest.mark.skipif(not native.bf16_available(), reason="needs a C++ compiler and AVX-512 BF16")


def rounded(array) -> np.ndarray:
    """Round to bfloat16; return float32."""
    return np.asarray(jnp.asarray(array, jnp.bfloat16).astype(jnp.float32))


def compute(x, kernel, bias, stride: int, groups: int, relu: bool, algorithm: str = "native_bf16") -> np.ndarray:
    packed = jnp.asarray(prepare_kernel(kernel, algorithm, groups=groups), jnp.bfloat16)
    half = jnp.asarray(x, jnp.bfloat16)
    y = convolve(half, packed, jnp.asarray(bias), algorithm=algorithm, stride=stride, groups=groups, relu=relu)
    assert y.dtype == jnp.bfloat16
    return np.asarray(y.astype(jnp.float32))


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 20),
    width=st.one_of(st.integers(1, 20), st.integers(21, 70)),
    images=st.integers(1, 5),
    stride=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 1, 2, 3]),
    inner=st.one_of(st.integers(1, 20), st.integers(21, 70)),
    outer=st.integers(1, 40),
    relu=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_shape(height, width, images, stride, groups, inner, outer, relu, seed):
    inner += inner % 2 if groups > 1 else 0  # groups consist of pairs of channels
    rng = np.random.default_rng(seed)
    x = rounded(rng.standard_normal((images, height, width, groups * inner)))
    kernel = rounded(rng.standard_normal((3, 3, inner, groups * outer)))
    bias = rng.standard_normal(groups * outer).astype(np.float32)
    expected = direct_sum(x, kernel, bias, stride, groups, relu)
    actual = compute(x, kernel, bias, stride, groups, relu)
    size = np.abs(expected).max() + 1
    np.testing.assert_allclose(actual, expected, rtol=2**-8, atol=1e-5 * size)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 20),
    width=st.one_of(st.integers(1, 20), st.integers(21, 70)),
    images=st.integers(1, 5),
    groups=st.sampled_from([1, 1, 2, 3]),
    inner=st.one_of(st.integers(1, 20), st.integers(21, 70)),
    outer=st.integers(1, 40),
    relu=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_winograd_of_small_integers_is_exact(height, width, images, groups, inner, outer, relu, seed):
    """The transforms of these integers are exact in bfloat16, so that only the result is rounded."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-4, 5, (images, height, width, groups * inner)).astype(np.float32)
    kernel = 4 * rng.integers(-1, 2, (3, 3, inner, groups * outer)).astype(np.float32)
    bias = rng.integers(-9, 10, groups * outer).astype(np.float32)
    expected = rounded(direct_sum(x, kernel, bias, 1, groups, relu))
    actual = compute(x, kernel, bias, 1, groups, relu, "native_bf16_winograd2")
    np.testing.assert_array_equal(actual, expected)


def test_winograd_rounds_transformed_pixels_and_kernels_once():
    """Each of the few roundings adds about half a step of bfloat16, which is 2**-9 of a number."""
    rng = np.random.default_rng(0)
    x = rounded(np.maximum(rng.standard_normal((2, 14, 14, 64)), 0))
    kernel, bias = rng.standard_normal((3, 3, 64, 32)).astype(np.float32), np.zeros(32, np.float32)
    expected = direct_sum(x, kernel, bias, 1, 1, False)
    direct = relative_difference(expected, compute(x, rounded(kernel), bias, 1, 1, False))
    winograd = relative_difference(expected, compute(x, kernel, bias, 1, 1, False, "native_bf16_winograd2"))
    assert winograd < 2 * direct


def test_they_are_candidates_only_for_layers_that_they_can_compute():
    odd_groups = [algorithm.name for algorithm in candidates(LayerShape(14, 14, 12, 12, groups=4), "bfloat16")]
    assert odd_groups == ["direct"] + ["native_bf16_winograd2"] * (not native.bf16_in_tiles())
    assert ALGORITHMS["native_bf16"].refusal("float32", 1)
    assert ALGORITHMS["native_bf16"].refusal("bfloat16", 1, dilation=2)
    assert ALGORITHMS["native_bf16_winograd2"].refusal("bfloat16", 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_never_become_finite(value):
    x = np.ones((1, 9, 40, 16), np.float32)
    x[0, 4, 20, 3] = value
    actual = compute(x, np.ones((3, 3, 16, 16), np.float32), np.zeros(16, np.float32), 1, 1, relu=False)
    assert not np.isfinite(actual[0, 3:6, 19:22]).any()
    assert np.isfinite(actual[0, :3]).all()
    assert np.isfinite(actual[0, 6:]).all()
    assert np.isfinite(actual[0, :, 22:]).all()
    assert np.isfinite(actual[0, :, :17]).all()  # tiles read up to two pixels too many of these sixteen channels
    actual = compute(
        x, np.ones((3, 3, 16, 16), np.float32), np.zeros(16, np.float32), 1, 1, False, "native_bf16_winograd2"
    )
    finite = np.isfinite(actual[0])
    assert not finite[3:6, 19:22].any()
    finite[2:6, 18:22] = True  # Winograd's four tiles of 2 x 2 pixels
    assert finite.all()


@pytest.mark.slow
def test_without_tiles_the_vector_instructions_give_the_same(tmp_path):
    """On a processor with AMX, with a compiler that is told not to use it."""
    compiler = tmp_path / "c++"
    real = shutil.which("g++") or shutil.which("c++")
    compiler.write_text(f'#!/bin/sh\nexec {real} "$@" -mno-amx-tile\n', encoding="utf-8")
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path), "WITHOUT_TILES": "1"}
    tests = [__file__, "-k", "every_shape", str(ROOT / "tests" / "quantization" / "test_integer_convolutions.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.skipif("WITHOUT_TILES" not in os.environ, reason="run by the test above")
def test_every_shape_is_without_tiles():
    assert native.pack_bf16_kernel(np.zeros((3, 3, 2, 2), np.float32), 1).shape[3] == 3  # pairs: six channels, not 32


@pytest.mark.parametrize("images", [1, 3])
def test_every_layer_of_a_bfloat16_net_is_native(images, monkeypatch):
    import repvgg_jax as rv
    from repvgg_jax.conv import bf16
    from tests.helpers.random_weights import random_variables

    monkeypatch.setattr(bf16, "pays_on_cpu", lambda: True)  # the alternative is float32
    model = rv.create_model("RepVGG-A0", 10)
    variables = random_variables(model)
    pixels = np.random.default_rng(0).standard_normal((images, 64, 64, 3), np.float32)
    predict = rv.make_predictor(model, variables, 2, 64, dtype=jnp.bfloat16)
    assert predict.plan is not None
    of_stride_1 = "native_bf16" if native.bf16_in_tiles() else "native_bf16_winograd2"
    assert set(predict.plan.algorithms().values()) == {"native_bf16", of_stride_1}
    assert 1e-4 < relative_difference(jax.jit(model.apply)(variables, pixels), predict(pixels)) < 2e-2
