"""Claim: the CPU's integer convolutions give the same integers as the reference, so speed costs no accuracy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import repvgg_jax as rv
from repvgg_jax import compiler
from repvgg_jax.conv import native
from repvgg_jax.net.variants import BlockSpec
from repvgg_jax.quantization.arithmetic import SHIFT, InXla, NativeIntegers, pack_layer, pack_layers
from repvgg_jax.quantization.net import forward
from tests.helpers.outlier_nets import VARIANTS, deploy_net, images
from tests.helpers.random_weights import random_variables

pytestmark = pytest.mark.skipif(not native.int8_available(), reason="needs a C++ compiler and AVX-512 VNNI")


@settings(max_examples=12, deadline=None)
@given(
    signed=st.booleans(),
    images=st.integers(1, 3),
    height=st.integers(1, 31),
    width=st.integers(1, 31),
    stride=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2]),
    inner=st.integers(1, 40),
    outer=st.integers(1, 70),
)
def test_every_shape_gives_the_references_integers(signed, images, height, width, stride, groups, inner, outer):
    if groups > 1:
        inner *= 4
    rng = np.random.default_rng(height + 40 * width)
    dtype = np.int8 if signed else np.uint8
    info = np.iinfo(dtype)
    x = jnp.asarray(rng.integers(info.min, info.max + 1, (images, height, width, groups * inner)).astype(dtype))
    name = "stage0" if signed else "stage1_0"
    spec = BlockSpec(groups * inner, groups * outer, stride, groups, 1, name, "stage1", 1, stride)
    layer = {
        "kernel": rng.integers(-127, 128, (3, 3, inner, groups * outer)).astype(np.int8),
        "kernel_scale": rng.uniform(1e-5, 1e-2, groups * outer).astype(np.float32),
        "bias": rng.integers(-100_000, 100_000, groups * outer).astype(np.int32),
        "input_scale": np.float32(1),
    }
    factor = jnp.asarray(layer["kernel_scale"])
    packed = pack_layer(spec, layer, 1)
    reference, native_layers = InXla(integer=True), NativeIntegers()
    unsigned = jnp.asarray(x.astype(jnp.int32) + SHIFT * signed, jnp.uint8)
    np.testing.assert_array_equal(reference.totals(spec, x, layer), native_layers.totals(spec, unsigned, packed))
    np.testing.assert_array_equal(
        reference.rounded(spec, x, layer, factor), native_layers.rounded(spec, unsigned, packed, factor)
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layer_of_a_net_reads_the_references_integers(name):
    model, variables = deploy_net(name)
    net = rv.quantize(model, variables, images(), "per-channel")
    params = pack_layers(net.variant, net.params, net.in_channels)
    for spec in net.variant.blocks():
        assert ("packed" in params[spec.name]) == (spec.groups == 1 or spec.in_channels % 16 == 0)
    x = images(4, seed=1)
    run = jax.jit(forward, static_argnums=(0, 3))
    expected = run(net.variant, net.params, x, InXla(integer=True))
    actual = run(net.variant, params, x, NativeIntegers())
    actual["stage0"] = actual["stage0"].astype(np.int32) - SHIFT
    for layer in expected:
        np.testing.assert_array_equal(expected[layer], actual[layer], err_msg=layer)


def test_float_layers_and_groups_of_odd_channels_are_left_to_xla():
    model, variables = deploy_net("plain")
    net = rv.quantize(model, variables, images(), "per-channel", float_first=True)
    params = pack_layers(net.variant, net.params, net.in_channels)
    assert "packed" not in params["stage0"]
    odd = rv.Variant((1, 1, 1, 1), (6, 6, 6, 6, 6), groups=3)
    assert not native.supports_int8(6, 3)
    model = rv.create_model(odd, 4, deploy=True)
    net = rv.quantize(model, random_variables(model), images(), "per-channel")
    predict = rv.make_predictor(quantized=net, batch_size=2, image_size=32)
    np.testing.assert_array_equal(predict(images(2)), net(images(2)))


def test_the_predictor_states_whether_it_computes_in_integers(monkeypatch):
    model, variables = deploy_net()
    net = rv.quantize(model, variables, images(), "per-channel")
    fast = rv.make_predictor(quantized=net, batch_size=4, image_size=32)
    monkeypatch.setenv(compiler.SWITCH, "0")
    slow = rv.make_predictor(quantized=net, batch_size=4, image_size=32)
    assert (fast.integer, slow.integer) == (True, False)
    np.testing.assert_array_equal(fast(images(4)), slow(images(4)))
