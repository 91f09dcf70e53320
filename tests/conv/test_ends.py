"""Claim: a native net rounds, pools and classifies as XLA does, for any shape; on integers, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import repvgg_jax as rv
from repvgg_jax.conv import native
from repvgg_jax.conv.native import ends
from repvgg_jax.net.model import global_average_pool
from repvgg_jax.quantization.quantizer import to_integers
from tests.helpers.comparison import relative_difference
from tests.helpers.random_weights import random_variables

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
needs_int8 = pytest.mark.skipif(not native.int8_available(), reason="needs AVX-512 VNNI")
needs_bf16 = pytest.mark.skipif(not native.bf16_available(), reason="needs AVX-512 BF16")


@needs_int8
@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 40_000), seed=st.integers(0, 99), signed=st.booleans())
def test_integers_are_those_of_the_quantizer(count, seed, signed):
    rng = np.random.default_rng(seed)
    scale = np.float32(2.0 ** rng.integers(-8, 3))  # a power of two, by which both can divide exactly
    x = np.concatenate([rng.normal(0, 100 * scale, count), scale * (rng.integers(-300, 300, 64) + 0.5)])
    x = jnp.asarray(x, jnp.float32)
    dtype, zero = (np.int8, 128) if signed else (np.uint8, 0)
    expected = np.asarray(to_integers(x, jnp.float32(scale), dtype)).astype(np.int32) + zero
    np.testing.assert_array_equal(ends.round_to_bytes(x, jnp.float32(1 / scale), zero), expected)


@needs_int8
def test_values_that_are_not_finite_saturate_and_nan_is_zero():
    x = jnp.asarray([np.nan, np.inf, -np.inf, 1e38, -1e38], jnp.float32)
    np.testing.assert_array_equal(ends.round_to_bytes(x, jnp.float32(10), 128), [128, 255, 0, 255, 0])


@settings(max_examples=30, deadline=None)
@given(images=st.integers(0, 5), height=st.integers(1, 9), channels=st.integers(1, 300))
def test_averages_of_float32_are_those_of_xla(images, height, channels):
    x = np.random.default_rng(height).normal(3, 1, (images, height, 7, channels)).astype(np.float32)
    actual = ends.average(jnp.asarray(x), 0.5)
    np.testing.assert_allclose(actual, 0.5 * x.astype(np.float64).mean((1, 2)), rtol=2e-6)


@needs_bf16
@settings(max_examples=20, deadline=None)
@given(images=st.integers(1, 3), height=st.integers(1, 9), channels=st.integers(1, 300))
def test_averages_of_bfloat16_are_sums_in_float32(images, height, channels):
    x = jnp.asarray(np.random.default_rng(height).normal(3, 1, (images, height, 7, channels)), jnp.bfloat16)
    np.testing.assert_allclose(ends.average(x), global_average_pool(x, jnp.float32), rtol=2e-6)


@needs_int8
@settings(max_examples=20, deadline=None)
@given(images=st.integers(1, 3), height=st.integers(1, 40), channels=st.integers(1, 300))
def test_averages_of_bytes_are_exact_sums(images, height, channels):
    x = np.random.default_rng(height).integers(0, 256, (images, height, 16, channels), np.uint8)
    factor = np.float32(height * 16)  # the average times the number of pixels is the sum
    np.testing.assert_array_equal(ends.average(jnp.asarray(x), factor), x.sum((1, 2), dtype=np.int64))


@settings(max_examples=30, deadline=None)
@given(images=st.integers(0, 40), inputs=st.integers(1, 200), classes=st.integers(1, 120))
def test_the_classifier_is_a_matrix_product(images, inputs, classes):
    rng = np.random.default_rng(inputs)
    x, kernel, bias = (rng.normal(size=s).astype(np.float32) for s in ((images, inputs), (inputs, classes), classes))
    packed = jax.tree.map(jnp.asarray, ends.pack_classifier(kernel, bias))
    actual = ends.classify(jnp.asarray(x), packed["packed"], packed["padded_bias"], classes)
    assert actual.shape == (images, classes)
    np.testing.assert_allclose(actual, x.astype(np.float64) @ kernel + bias, rtol=1e-5, atol=1e-4)


@needs_int8
@settings(max_examples=30, deadline=None)
@given(images=st.integers(0, 40), fours=st.integers(1, 400), classes=st.integers(1, 120))
def test_the_integer_classifier_is_exact(images, fours, classes):
    rng = np.random.default_rng(fours)
    x = rng.integers(0, 256, (images, 4 * fours), np.uint8)
    kernel = rng.integers(-127, 128, (4 * fours, classes)).astype(np.int8)
    bias = rng.integers(-100_000, 100_000, classes).astype(np.int32)
    factor = rng.uniform(1e-5, 1e-2, classes).astype(np.float32)
    packed = jnp.asarray(ends.pack_int8_classifier(kernel))
    padded_bias, padded_factor = (jnp.asarray(native.pad_channels(values, 1)) for values in (bias, factor))
    actual = ends.classify_int8(jnp.asarray(x), packed, padded_bias, padded_factor, classes)
    sums = x.astype(np.int64) @ kernel.astype(np.int64) + bias
    np.testing.assert_array_equal(actual, sums.astype(np.float32) * factor)


def test_shapes_that_do_not_fit_are_refused():
    x, bias = jnp.ones((2, 6)), jnp.ones(native.lanes())
    with pytest.raises(jax.errors.JaxRuntimeError, match="packed for another shape"):
        jax.block_until_ready(ends.classify(x, jnp.ones((1, 1, 1, 5, native.lanes())), bias, 3))


def test_a_native_predictor_leaves_nothing_to_xlas_threads():
    # What the first and last operation are decides whether XLA's threads wake up beside those of the convolutions.
    model = rv.create_model("RepVGG-A0", num_classes=7, deploy=True)
    variables = random_variables(model)
    predict = rv.make_predictor(model, variables, batch_size=2, image_size=64)
    assert predict.plan is not None
    if any("native" not in layer.algorithm for stage in predict.plan.stages for layer in stage.layers):
        pytest.skip("this machine's plan is not native")
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    assert relative_difference(predict(x), model.apply(variables, x)) < 1e-5
    instructions = predict._compiled.as_text() or ""
    assert " dot(" not in instructions
    assert " reduce(" not in instructions
