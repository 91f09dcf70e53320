"""Claim: scales, ranges and equalisation do what the papers describe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.quantization.calibration import BINS, THRESHOLDS, Histogram, channel_ranges, input_scales
from repvgg_jax.quantization.equalize import equalize_activations, equalize_weights, input_ranges, output_ranges, pairs
from repvgg_jax.quantization.quantizer import fake_quantize, to_integers, weight_scale
from repvgg_jax.quantization.stack import layer_inputs, layers_of
from tests.helpers.comparison import relative_difference
from tests.helpers.outlier_nets import VARIANTS, deploy_net, images
from tests.helpers.random_weights import random_variables


def histogram(values: np.ndarray, levels: int = 255) -> Histogram:
    values = np.abs(values)
    return Histogram(np.histogram(values, BINS, (0, values.max()))[0], float(values.max()), levels)


def logits(variant: rv.Variant, layers, x: np.ndarray) -> np.ndarray:
    linear = layers["linear"]
    return np.asarray(layer_inputs(variant, layers, x)["linear"]) @ linear["kernel"] + linear["bias"]


def test_rounding_is_to_the_nearest_ties_to_even_and_saturates():
    x = jnp.asarray([-300.0, -2.5, -0.5, 0.5, 1.5, 2.5, 126.6, 300.0])
    np.testing.assert_array_equal(to_integers(x, jnp.float32(1), np.int8), [-128, -2, 0, 0, 2, 2, 127, 127])
    np.testing.assert_array_equal(to_integers(x, jnp.float32(1), np.uint8), [0, 0, 0, 0, 2, 2, 127, 255])


def test_the_straight_through_estimator_passes_gradients_only_inside_the_range():
    x = jnp.asarray([-200.0, -1.3, 0.0, 0.7, 126.9, 200.0])
    gradient = jax.grad(lambda x: (fake_quantize(x, jnp.float32(1), -127, 127) * jnp.arange(1.0, 7.0)).sum())(x)
    np.testing.assert_array_equal(gradient, [0, 2, 3, 4, 5, 0])


def test_a_scale_gets_no_gradient():
    for x in (0.7, -1.3, 200.0, -200.0):
        assert jax.grad(lambda scale, x=x: fake_quantize(jnp.float32(x), scale, -127, 127))(jnp.float32(1)) == 0


def test_a_weight_scale_makes_the_largest_weight_127():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 6)).astype(np.float32)
    kernel[..., 2] = 0
    scale = weight_scale(kernel, per_channel=True)
    assert (np.abs(np.rint(kernel / scale)).max((0, 1, 2)) == [127, 127, 0, 127, 127, 127]).all()
    assert (weight_scale(kernel, per_channel=False) == np.abs(kernel).max() / 127).all()


def test_minmax_covers_everything_and_percentile_cuts_the_tail():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(0, 1, 100_000), [50.0]])
    assert THRESHOLDS["minmax"](histogram(values)) == 50
    assert THRESHOLDS["percentile"](histogram(values)) == pytest.approx(1, abs=50 / BINS)


def test_mse_finds_the_threshold_of_a_gaussian():
    # Banner et al., 2019, table 1: 3.92 deviations for 8 bits.
    values = np.random.default_rng(0).normal(size=2_000_000)
    assert THRESHOLDS["mse"](histogram(values, 127)) == pytest.approx(3.92, abs=0.15)


def test_mse_has_the_least_error_of_all_thresholds():
    values = np.abs(np.random.default_rng(0).standard_t(3, 100_000))

    def error(threshold: float) -> float:
        scale = threshold / 255
        return np.square(values - scale * np.clip(np.rint(values / scale), 0, 255)).mean()

    best = THRESHOLDS["mse"](histogram(values))
    assert error(best) <= 1.02 * min(error(values.max() * share) for share in np.linspace(0.02, 1, 200))


def test_entropy_clips_a_long_tail_and_keeps_a_uniform_distribution():
    rng = np.random.default_rng(0)
    laplace = np.abs(rng.laplace(size=1_000_000))
    assert THRESHOLDS["entropy"](histogram(laplace)) < 0.8 * laplace.max()
    assert THRESHOLDS["entropy"](histogram(rng.uniform(0, 3, 1_000_000))) > 2.9


def test_scales_follow_from_the_largest_input_of_each_layer():
    model, variables = deploy_net()
    layers = layers_of(variables["params"])
    inputs = layer_inputs(model.variant, layers, jnp.asarray(images()))
    scales = input_scales(model.variant, layers, images(), "minmax")
    assert scales.keys() == inputs.keys() == layers.keys() | {"pool"}
    for name, x in inputs.items():
        assert scales[name] == pytest.approx(np.abs(x).max() / (127 if name == "stage0" else 255), rel=1e-5)


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("name", VARIANTS)
def test_equalisation_does_not_change_the_function(name, by):
    model = rv.create_model(VARIANTS[name], 10, deploy=True)
    layers = layers_of(random_variables(model)["params"])
    if by == "weights":
        equalized = equalize_weights(model.variant, layers)
    else:
        ranges = channel_ranges(model.variant, layers, images())
        equalized = equalize_activations(model.variant, layers, ranges)
    assert relative_difference(layers["stage1_0"]["kernel"], equalized["stage1_0"]["kernel"]) > 0.05
    x = images(4, seed=1)
    assert relative_difference(logits(model.variant, layers, x), logits(model.variant, equalized, x)) < 2e-5


@pytest.mark.parametrize("name", ["plain", "grouped"])
def test_equalised_layers_write_and_read_each_channel_with_the_same_range(name):
    model, variables = deploy_net(name)
    layers = equalize_weights(model.variant, layers_of(variables["params"]))
    for writer, reader, groups in pairs(model.variant):
        written = output_ranges(layers[writer]["kernel"])
        np.testing.assert_allclose(written, input_ranges(layers[reader]["kernel"], groups), rtol=0.02)


def test_equalised_activations_have_similar_ranges_in_all_channels():
    model, variables = deploy_net()
    before = layers_of(variables["params"])
    after = equalize_activations(model.variant, before, channel_ranges(model.variant, before, images()))

    def unevenness(layers) -> float:
        ranges = channel_ranges(model.variant, layers, images())
        return float(np.mean([np.log(ranges[r][ranges[r] > 0]).std() for r in ranges if r not in ("stage0", "linear")]))

    assert unevenness(after) < 0.5 * unevenness(before)
