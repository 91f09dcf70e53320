"""Claim: embeddings are the features that the classifier reads, in both forms, in predictors and in 8 bits."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import repvgg_jax as rv
from repvgg_jax import compiler
from repvgg_jax.preprocess import normalize
from tests.helpers.comparison import relative_difference
from tests.helpers.outlier_nets import deploy_net, images
from tests.helpers.parity import SMALL, flax_model, make_oracle, nchw, to_flax
from tests.helpers.random_weights import random_variables


def compiled(model, **options):
    """Return `model.apply`, compiled as a whole, which is faster than layer by layer."""
    return jax.jit(functools.partial(model.apply, **options))


def oracle_embedding(oracle: Any, x: np.ndarray) -> np.ndarray:
    """Return the input of PyTorch's classifier."""
    seen = []
    handle = oracle.linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        oracle.eval()(nchw(x))
    handle.remove()
    return seen[0].numpy()


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "grouped")) for name in SMALL])
def test_both_forms_and_a_predictor_give_the_input_of_pytorchs_classifier(name, tmp_path):
    oracle = make_oracle(name)
    model, variables = flax_model(name, "float32"), to_flax(oracle, name, tmp_path)
    x = images(5)
    expected = oracle_embedding(oracle, x)
    assert expected.shape == (5, model.variant.widths[-1])
    fused_model, fused = rv.to_deploy(model, variables)
    for net, tree in ((model, variables), (fused_model, fused)):
        assert relative_difference(expected, compiled(net, method="embed")(tree, x)) <= 1e-5
    predict = rv.make_predictor(model, variables, 2, x.shape[1], output="embedding")
    actual = predict(x)
    assert (actual.dtype, predict.output) == (np.float32, "embedding")
    assert relative_difference(expected, actual) <= 1e-5
    head = variables["params"]["linear"]
    logits = rv.make_predictor(model, variables, 2, x.shape[1])(x)
    assert relative_difference(logits, actual @ head["kernel"] + head["bias"]) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"float_last": True}, marks=pytest.mark.slow)],
    ids=["8 bits throughout", "float classifier"],
)
@pytest.mark.parametrize("name", ["plain", pytest.param("SE after ReLU", marks=pytest.mark.slow)])
def test_a_quantised_net_gives_the_float_nets_embedding_up_to_its_noise(name, options, monkeypatch):
    model, variables = deploy_net(name)
    net = rv.quantize(model, variables, images(), "equalized", **options)
    x = images(6, seed=1)
    embedding = np.asarray(compiled(net, method="embed")(net.variables, x))
    logits = compiled(model)(variables, x)
    noise = relative_difference(logits, net(x))
    # Equalisation scales the channels that the classifier reads, and its kernel by the inverse.
    kernel = net.params["linear"]["kernel"] * net.params["linear"].get("kernel_scale", 1.0)
    assert relative_difference(logits, embedding @ kernel + variables["params"]["linear"]["bias"]) <= (2 * noise)
    natively = rv.make_predictor(quantized=net, batch_size=4, image_size=32, output="embedding")
    np.testing.assert_array_equal(natively(x), embedding)
    monkeypatch.setenv(compiler.SWITCH, "0")
    in_xla = rv.make_predictor(quantized=net, batch_size=4, image_size=32, output="embedding")
    np.testing.assert_array_equal(in_xla(x), embedding)
    assert not in_xla.integer
    with pytest.raises(ValueError, match="method must be \"embed\" or None, not 'features'"):
        net.apply(net.variables, jnp.asarray(x), method=cast(Any, "features"))


def test_uint8_images_and_half_precision_give_embeddings():
    model, variables = deploy_net()
    preprocessing = rv.Preprocessing(32, 1.0)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    options: dict[str, Any] = dict(batch_size=2, image_size=32, preprocessing=preprocessing, output="embedding")
    expected = compiled(model, method="embed")(variables, normalize(pixels, preprocessing))
    assert relative_difference(expected, rv.make_predictor(model, variables, **options)(pixels)) <= 1e-5
    half = rv.make_predictor(model, variables, dtype=jnp.bfloat16, **options)(pixels)
    assert half.dtype == np.float32
    assert relative_difference(expected, half) <= 0.05


def test_an_unknown_output_is_refused():
    with pytest.raises(ValueError, match="output must be one of logits, embedding, not 'features'"):
        rv.make_predictor(*deploy_net(), output=cast(Any, "features"))


def test_embeddings_can_be_trained():
    """Gradients flow, and statistics follow the batch: metric learning needs no classifier."""
    model = rv.create_model(rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8)), 3)
    x = jnp.asarray(images(4))
    variables = random_variables(model)

    def loss(params):
        embedding, updates = model.apply(
            variables | {"params": params}, x, train=True, method="embed", mutable=["batch_stats"]
        )
        return jnp.square(embedding).mean(), updates

    gradient, updates = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert np.abs(gradient["stage0"]["rbr_dense"]["conv"]["kernel"]).max() > 0
    assert not np.any(gradient["linear"]["kernel"])
    before, after = variables["batch_stats"], updates["batch_stats"]
    assert np.any(before["stage4_0"]["rbr_dense"]["bn"]["mean"] != after["stage4_0"]["rbr_dense"]["bn"]["mean"])
