"""Claim: post-training quantisation gives an integer net whose outputs are close to the float net's, or refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.quantization import AdaRoundOptions, Method
from repvgg_jax.quantization.adaround import learn_rounding
from repvgg_jax.quantization.arithmetic import InXla
from repvgg_jax.quantization.methods import METHODS, MIN_IMAGES
from repvgg_jax.quantization.net import LARGEST_BIAS, forward
from repvgg_jax.quantization.quantizer import WEIGHT_LEVELS, fake_quantize_activations, fake_quantize_weights
from repvgg_jax.quantization.stack import FloatOperations, with_readers
from tests.helpers.comparison import relative_difference
from tests.helpers.outlier_nets import VARIANTS, deploy_net, images
from tests.helpers.random_weights import random_variables


def sqnr(net: rv.QuantizedNet, model: rv.RepVGG, variables, x: np.ndarray) -> float:
    """Return the logits' signal-to-quantisation-noise ratio in dB."""
    return -20 * np.log10(relative_difference(jax.jit(model.apply)(variables, x), net(x)))


@pytest.mark.parametrize("name", VARIANTS)
def test_integer_and_float_arithmetic_agree_in_every_layer(name):
    model, variables = deploy_net(name)
    net = rv.quantize(model, variables, images(), "per-channel")
    run = jax.jit(forward, static_argnums=(0, 3))
    whole = run(net.variant, net.params, images(4, seed=1), InXla(integer=True))
    floats = run(net.variant, net.params, images(4, seed=1), InXla(integer=False))
    assert set(whole) == {*net.params, "logits", "embedding"}
    for name in whole:
        if name in net.params:
            assert whole[name].dtype == (jnp.int8 if name == "stage0" else jnp.uint8)
        np.testing.assert_array_equal(whole[name], floats[name], err_msg=name)


def test_fake_quantised_layers_agree_with_the_integers_within_one_unit():
    # The plain float net with `fake_quantize` around each layer multiplies real numbers, so its sums have float32's
    # rounding, which can now and then change how a value is rounded to an integer.
    model, variables = deploy_net()
    net = rv.quantize(model, variables, images(), "per-channel")
    seen = forward(net.variant, net.params, jnp.asarray(images(4, seed=1)), InXla(integer=True))
    units = {name: net.params[name]["input_scale"] for name in net.params}
    equal = total = 0
    for spec, reader in with_readers(net.variant.blocks()):
        layer = net.params[spec.name]
        real = seen[spec.name].astype(jnp.float32) * units[spec.name]
        kernel = layer["kernel"] * layer["kernel_scale"]
        fake = {
            "kernel": fake_quantize_weights(kernel, layer["kernel_scale"]),
            "bias": layer["bias"] * (layer["kernel_scale"] * units[spec.name]),
        }
        output = FloatOperations(net.variant, {spec.name: fake}).conv(spec, real, activate=True)
        actual = fake_quantize_activations(output, units[reader], np.uint8) / units[reader]
        difference = np.abs(np.rint(actual) - np.asarray(seen[reader], np.float32))
        assert difference.max() <= 1
        equal, total = equal + (difference == 0).sum(), total + difference.size
    assert equal / total > 0.999


@pytest.mark.parametrize(
    "name", ["grouped", *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name != "grouped")]
)
def test_per_channel_scales_and_equalisation_improve_the_logits(name):
    model, variables = deploy_net(name)
    test = images(32, seed=1)
    methods = ("naive", "per-channel", "equalized")
    naive, by_channel, equalized = (
        sqnr(rv.quantize(model, variables, images(32), m), model, variables, test) for m in methods
    )
    assert naive < 6
    assert by_channel > naive + 0.5
    assert equalized > max(20, by_channel + 10)


@pytest.mark.slow
def test_learned_rounding_helps_if_the_weights_are_what_loses_accuracy():
    # With one scale per channel of equalised weights, the loss would be in the activations.
    model, variables = deploy_net()
    test = images(32, seed=1)
    learned, nearest = (
        sqnr(rv.quantize(model, variables, images(64), method), model, variables, test)
        for method in (dataclasses.replace(METHODS["naive"], adaround=AdaRoundOptions(steps=150)), "naive")
    )
    assert learned > nearest + 1


def test_overfitted_rounding_is_not_used():
    # Ten weights per training image, and targets that only noise keeps the weights from reproducing.
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(512, 1)).astype(np.float32)
    x = rng.normal(size=(64, 512)).astype(np.float32)
    targets = x @ kernel + rng.normal(size=(64, 1)).astype(np.float32)
    scale = np.abs(kernel).max(0) / WEIGHT_LEVELS
    layer = {"kernel": kernel, "bias": np.zeros(1, np.float32)}
    rounded = learn_rounding(None, layer, scale, x, targets, relu=False, options=AdaRoundOptions(steps=150))
    np.testing.assert_array_equal(rounded, np.rint(kernel / scale))


def test_bias_correction_removes_the_mean_error_of_each_channel():
    model, variables = deploy_net()
    x = images(32)
    errors = {}
    for corrected in (False, True):
        net = rv.quantize(model, variables, x, Method(per_channel=False, equalize=True, bias_correction=corrected))
        difference = np.asarray(net(x)) - np.asarray(model.apply(variables, x))
        errors[corrected] = np.abs(difference.mean(0)).max()
    assert errors[True] < errors[False] / 5


def test_training_and_deploy_form_give_the_same_quantised_net():
    model = rv.create_model(VARIANTS["plain"], 10)
    variables = random_variables(model)
    nets = [rv.quantize(*form, images(), "naive") for form in ((model, variables), rv.to_deploy(model, variables))]
    jax.tree.map(np.testing.assert_array_equal, *(net.params for net in nets))


def test_weight_scales_are_per_tensor_or_per_channel():
    model, variables = deploy_net()
    for per_channel in (False, True):
        layer = rv.quantize(model, variables, images(), "naive", per_channel=per_channel).params["stage2_1"]
        assert layer["kernel"].dtype == np.int8
        assert layer["kernel_scale"].shape == (24,)
        assert len(np.unique(layer["kernel_scale"])) == (24 if per_channel else 1)
        assert (np.abs(layer["kernel"]).max((0, 1, 2)) == 127).sum() == (24 if per_channel else 1)


def test_first_and_last_layer_can_stay_in_float():
    model, variables = deploy_net()
    both = rv.quantize(model, variables, images(), "per-channel", float_first=True, float_last=True)
    none = rv.quantize(model, variables, images(), "per-channel")
    for name in ("stage0", "linear"):
        assert both.params[name]["kernel"].dtype == np.float32
        assert none.params[name]["kernel"].dtype == np.int8
    assert both.params["stage1_0"]["kernel"].dtype == np.int8
    test = images(32, seed=1)
    assert sqnr(both, model, variables, test) > sqnr(none, model, variables, test)


def test_dead_channels_are_harmless():
    # A channel without weights keeps its bias, even if its unit would be too small for it.
    model, variables = deploy_net()
    layer = variables["params"]["stage1_0"]["rbr_reparam"]
    layer["kernel"] = np.asarray(layer["kernel"]) * (np.arange(16) > 2)
    layer["bias"] = np.where(np.arange(16) > 0, np.asarray(layer["bias"]), 0).astype(np.float32)
    net = rv.quantize(model, variables, images(32), "equalized")
    assert np.abs(net.params["stage1_0"]["bias"].astype(np.int64)).max() <= LARGEST_BIAS
    assert sqnr(net, model, variables, images(32, seed=1)) > 15


def test_the_report_shows_which_layer_loses_most():
    model, variables = deploy_net()
    worst = variables["params"]["stage2_1"]["rbr_reparam"]
    worst["kernel"] = np.asarray(worst["kernel"]) * np.where(np.arange(24) == 5, 1000, 1).astype(np.float32)
    worst["bias"] = np.asarray(worst["bias"]) * np.where(np.arange(24) == 5, 1000, 1).astype(np.float32)
    naive, channelwise = (rv.quantize(model, variables, images(), m).report for m in ("naive", "per-channel"))
    names = [report.name for report in naive]
    assert names == [*(spec.name for spec in model.variant.blocks()), "linear"]
    place = names.index("stage2_1")
    assert max(naive, key=lambda report: report.spread).name == "stage2_1"
    assert naive[place].largest_weight == pytest.approx(np.abs(worst["kernel"]).max())
    assert channelwise[place].output_sqnr > naive[place].output_sqnr + 3
    assert naive[0].network_sqnr == pytest.approx(naive[0].output_sqnr, abs=0.1)
    table = rv.report_table(naive).splitlines()
    assert len(table) == 1 + len(names)
    assert table[1].startswith("stage0 ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[:1], f"one image is too few to calibrate with: give at least {MIN_IMAGES}"),
        (lambda x: x[:3], "3 images are too few"),
        (lambda x: np.where(np.arange(len(x))[:, None, None, None] == 5, np.nan, x), "calibration image 5 has NaN"),
        (lambda x: x[..., :1], r"must have shape \[N, H, W, 3\], not \[16, 32, 32, 1\]"),
        (lambda x: x[0], r"must have shape \[N, H, W, 3\], not \[32, 32, 3\]"),
        (lambda x: (x * 50).clip(0, 255).astype(np.uint8), "are uint8: normalise them"),
    ],
)
def test_unsuitable_calibration_images_are_refused(change, words):
    model, variables = deploy_net()
    with pytest.raises(rv.QuantizationError, match=words):
        rv.quantize(model, variables, change(images()))


def test_the_preprocessing_sets_the_size_and_normalises():
    model, variables = deploy_net()
    preprocessing = rv.Preprocessing(image_size=32)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    net = rv.quantize(model, variables, pixels, "naive", preprocessing=preprocessing)
    assert net.preprocessing == preprocessing
    assert net.params["stage0"]["input_scale"] == pytest.approx((pixels.max() / 255 - 0.406) / 0.225 / 127, rel=0.02)
    with pytest.raises(rv.QuantizationError, match=r"must have shape \[N, 32, 32, 3\], not \[8, 16, 16, 3\]"):
        rv.quantize(model, variables, pixels[:, :16, :16], preprocessing=preprocessing)


def test_an_unknown_method_is_refused():
    with pytest.raises(
        rv.QuantizationError, match="unknown quantisation method 'best'; choose from naive, per-channel"
    ):
        rv.quantize(*deploy_net(), images(), "best")
