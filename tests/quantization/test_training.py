"""Claim: quantisation-aware training trains the net that is deployed, which becomes integers without further loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import repvgg_jax as rv
from repvgg_jax.quantization.qat import RANGE, quantization_aware, quantized_net, with_ranges, without_ranges
from repvgg_jax.quantization.quantizer import fake_quantize_weights, weight_scale
from repvgg_jax.trees import flatten
from tests.helpers.comparison import relative_difference
from tests.helpers.outlier_nets import VARIANTS, images
from tests.helpers.random_weights import random_variables

PREPROCESSING = rv.Preprocessing(image_size=32)


@functools.cache
def trained_variables(name: str, seed: int = 0):
    """Return a quantisation-aware model, its variables with the ranges of one batch, and the plain variables."""
    plain = rv.create_model(VARIANTS[name], 10)
    variables = random_variables(plain, seed)
    model = quantization_aware(plain)
    step = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[1])
    seen = step(with_ranges(variables), images(16))
    return model, variables | seen, variables


def test_parameters_and_statistics_are_those_of_the_training_form():
    plain = rv.create_model(VARIANTS["SE after ReLU"], 10)
    x = jnp.zeros((1, 32, 32, 3))
    expected = jax.eval_shape(plain.init, jax.random.key(0), x)
    actual = jax.eval_shape(quantization_aware(plain).init, jax.random.key(0), x)
    assert flatten(without_ranges(actual)) == flatten(expected)
    assert jax.tree.map(jnp.shape, with_ranges(expected)) == jax.tree.map(jnp.shape, actual)


@pytest.mark.parametrize("name", ["plain", "SE before ReLU"])
def test_the_trained_net_is_the_deployed_net(name):
    model, variables, _ = trained_variables(name)
    net = quantized_net(model, variables, PREPROCESSING)
    x = images(32, seed=1)
    expected, actual = jax.jit(model.apply)(variables, x), net(x)
    # Sums of real numbers are now and then rounded the other way (by one unit of one activation).
    assert relative_difference(expected, actual) < 0.01
    assert (np.asarray(expected).argmax(-1) == np.asarray(actual).argmax(-1)).mean() > 0.95


def test_statistics_are_frozen_and_ranges_follow_the_largest_input():
    model, variables, before = trained_variables("plain")
    stats = flatten(variables["batch_stats"])
    for name, leaf in flatten(before["batch_stats"]).items():
        np.testing.assert_array_equal(leaf, stats[name])
    assert stats[f"stage0/{RANGE}"] == pytest.approx(np.abs(images(16)).max())
    step = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[1])
    later = step(variables, 2 * images(16))
    moved = later["batch_stats"]["stage0"][RANGE]
    assert moved == pytest.approx((0.99 + 0.01 * 2) * stats[f"stage0/{RANGE}"])


def test_evaluation_changes_no_range():
    model, variables, _ = trained_variables("plain")
    assert isinstance(jax.eval_shape(model.apply, variables, images(2)), jax.ShapeDtypeStruct)


def test_branches_get_the_gradient_of_the_quantised_equivalent_kernel():
    model, variables, _ = trained_variables("plain")
    x = jnp.asarray(images(8))

    def loss(params):
        return jnp.square(jnp.asarray(model.apply(variables | {"params": params}, x))).mean()

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    for branch in ("rbr_dense", "rbr_1x1"):
        assert np.abs(gradients["stage1_0"][branch]["conv"]["kernel"]).max() > 0
        assert np.abs(gradients["stage1_0"][branch]["bn"]["scale"]).max() > 0
    # The two branches' centre taps are added before rounding, so their gradients differ only by the factors of the BNs.
    stats = variables["batch_stats"]["stage1_0"]
    params = variables["params"]["stage1_0"]
    factors = [params[b]["bn"]["scale"] / jnp.sqrt(stats[b]["bn"]["var"] + 1e-5) for b in ("rbr_dense", "rbr_1x1")]
    dense, point = (gradients["stage1_0"][b]["conv"]["kernel"] for b in ("rbr_dense", "rbr_1x1"))
    np.testing.assert_allclose(dense[1, 1] / factors[0], point[0, 0] / factors[1], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_few_steps_recover_what_quantisation_lost():
    plain = rv.create_model(VARIANTS["plain"], 10)
    start = random_variables(plain)
    x = jnp.asarray(images(64))
    target = jax.jit(plain.apply)(start, x)
    model = quantization_aware(plain)
    optimizer = optax.adam(3e-5)

    @jax.jit
    def step(params, stats, state):
        def loss(params):
            logits, new = model.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
            return jnp.square(logits - target).mean(), new["batch_stats"]

        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), stats, state, value

    variables = with_ranges(start)
    params, stats, state = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])
    losses = []
    for _ in range(30):
        params, stats, state, value = step(params, stats, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    net = quantized_net(model, {"params": params, "batch_stats": stats}, PREPROCESSING)
    assert jnp.square(net(x) - target).mean() < 0.6 * losses[0]


def test_weights_keep_one_scale_per_channel():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 8)) * np.logspace(-2, 2, 8)
    kernel = kernel.astype(np.float32)
    rounded = fake_quantize_weights(jnp.asarray(kernel), weight_scale(kernel, per_channel=True))
    error = np.abs(rounded - kernel).max((0, 1, 2)) / np.abs(kernel).max((0, 1, 2))
    assert (error <= 0.5 / 127 + 1e-6).all()


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(rv.QuantizationError, match="needs the training form"):
        quantization_aware(rv.create_model(VARIANTS["plain"], 10, deploy=True))
    with pytest.raises(rv.QuantizationError, match="computes in float32, not bfloat16"):
        quantization_aware(rv.create_model(VARIANTS["plain"], 10, dtype=jnp.bfloat16))
    with pytest.raises(rv.QuantizationError, match="only nets with ReLU are quantised, this one has gelu"):
        quantization_aware(rv.create_model(VARIANTS["plain"], 10, activation="gelu"))
    plain = rv.create_model(VARIANTS["plain"], 10)
    with pytest.raises(rv.QuantizationError, match="no training step has set the range of stage0"):
        quantized_net(quantization_aware(plain), with_ranges(random_variables(plain)), PREPROCESSING)
