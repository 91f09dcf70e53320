"""Claim: a custom architecture needs only its numbers, and works everywhere that a published one does."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import repvgg_jax as rv
from repvgg_jax.net.activations import ACTIVATIONS
from repvgg_jax.net.summary import summarize
from repvgg_jax.weights import WeightsWarning
from tests.helpers.comparison import relative_difference
from tests.helpers.parity import cast, fuse, run
from tests.helpers.random_weights import random_variables
from tests.helpers.weight_files import assert_same_bits

BLOCKS, WIDTHS = (1, 2, 1, 1), (8, 8, 12, 16, 24)
VARIANT = rv.Variant(num_blocks=BLOCKS, widths=WIDTHS)
TORCH_ACTIVATIONS = {
    "relu": torch.nn.ReLU,
    "relu6": torch.nn.ReLU6,
    "leaky_relu": torch.nn.LeakyReLU,
    "gelu": torch.nn.GELU,
    "silu": torch.nn.SiLU,
}


def squash(x):
    return jnp.tanh(x)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_lists_of_numbers_work_like_tuples():
    numbers: Any = dict(num_blocks=[*BLOCKS], widths=[*WIDTHS])
    assert rv.Variant(**numbers) == VARIANT
    assert hash(rv.Variant(**numbers)) == hash(VARIANT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_blocks=(1, 2, 3)), r"num_blocks must be four positive numbers \(stages 1 to 4\), not \(1, 2, 3\)"),
        (dict(num_blocks=(1, 2, 3, 0)), "num_blocks must be four positive numbers"),
        (dict(num_blocks=5), r"num_blocks must be four positive numbers \(stages 1 to 4\), not 5"),
        (dict(widths=(8, 8, 8, 8, 8.5)), "widths must be five positive numbers"),
        (dict(groups=5), "stage2_0: 8 -> 12 channels cannot be split into 5 groups"),
        (dict(groups=0), "groups must be a positive whole number, not 0"),
        (dict(squeeze_excite="yes"), "squeeze_excite must be one of None, before_relu, after_relu, not 'yes'"),
        (dict(strides=(3, 2, 2, 2, 2)), r"strides must be five numbers, each 1 or 2 \(stages 0 to 4\), not \(3, 2"),
        (dict(output_stride=4), "output_stride must be one of 8, 16, 32, not 4"),
        (dict(activation="swish"), "unknown activation 'swish'; known: relu, relu6, leaky_relu, gelu, silu"),
        (dict(block="resnet"), "block must be one of repvgg, qarepvgg, not 'resnet'"),
        (dict(branches=3), "branches must be a Branches, not 3"),
    ],
)
def test_numbers_that_do_not_describe_a_net_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        rv.Variant(**(dict(num_blocks=BLOCKS, widths=WIDTHS) | fields))


def test_options_change_a_published_variant_and_drop_its_published_figures():
    changes: dict[str, Any] = dict(strides=(1, 2, 2, 2, 2), activation="silu")
    plain, changed = rv.create_model("RepVGG-A0"), rv.create_model("RepVGG-A0", **changes)
    assert dataclasses.replace(plain.variant, **changes) == changed.variant
    assert plain.variant.published.top1 == 72.41
    assert changed.variant.published.top1 is None
    assert rv.create_model("RepVGG-A0", block="repvgg").variant.published.top1 == 72.41


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_pytorchs(name):
    x = np.linspace(-8, 8, 101, dtype=np.float32)
    theirs = TORCH_ACTIVATIONS[name]()(torch.from_numpy(x))
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("activation", "place"),
    [
        ("gelu", "before_relu"),
        (squash, "after_relu"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("gelu", None), ("gelu", "after_relu"))),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((squash, None), (squash, "before_relu"))),
    ],
)
def test_forms_and_predictor_agree_for_other_activations(activation, place):
    variant = dataclasses.replace(VARIANT, squeeze_excite=place, squeeze_excite_ratio=4)
    model = rv.create_model(variant, 5, activation=activation)
    variables, images = random_variables(model), noise(3, 40, 40, 3)
    expected = run(model.apply, variables, images)
    relu = run(rv.create_model(variant, 5).apply, variables, images)
    assert relative_difference(relu, expected) > 1e-3
    deployed = fuse(model, variables)
    assert relative_difference(expected, run(deployed[0].apply, deployed[1], images)) <= 1e-5
    assert relative_difference(expected, rv.make_predictor(model, variables, 2, 40)(images)) <= 1e-5


@pytest.mark.parametrize("channels", [1, 3])
def test_a_stem_of_stride_one_keeps_small_images_large(channels):
    model = rv.create_model(VARIANT, 5, strides=(1, 2, 2, 2, 2))
    variables, images = random_variables(model, in_channels=channels), noise(2, 32, 32, channels)
    features = jax.eval_shape(lambda v: model.apply(v, images, method="features"), variables)
    assert [feature.shape[1] for feature in features.values()] == [32, 16, 8, 4, 2]
    assert [info.stride for info in model.feature_info] == [1, 2, 4, 8, 16]
    predict = rv.make_predictor(model, variables, 2, 32)
    assert relative_difference(run(model.apply, variables, images), predict(images)) <= 1e-5
    strided = summarize(VARIANT, image_size=32, num_classes=5, in_channels=channels)
    finer = summarize(model.variant, image_size=32, num_classes=5, in_channels=channels)
    body, finer_body = strided.flops - 24 * 5, finer.flops - 24 * 5
    assert finer_body == 4 * body


class TestDropout:
    model = rv.create_model(VARIANT, 24, dropout=0.5)
    images = noise(4, 32, 32, 3)

    def test_it_drops_pooled_features_in_training_only(self):
        variables = random_variables(self.model)
        kept = rv.create_model(VARIANT, 24)
        evaluated = [run(model.apply, variables, self.images) for model in (self.model, kept)]
        np.testing.assert_array_equal(*evaluated)
        head = {"kernel": np.eye(24, dtype=np.float32), "bias": np.zeros(24, np.float32)}
        ones = cast({**variables, "params": {**variables["params"], "linear": head}}, "float64")

        def logits(model):
            # In float64, since the two programs round differently, and BN divides by the deviation of a few values.
            model = model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
            options = dict(train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)})
            return np.asarray(run(lambda v: model.apply(v, self.images, **options)[0], ones))

        with jax.enable_x64(True):
            dropped, whole = logits(self.model), logits(kept)
        gone = dropped == 0
        assert 0.3 < gone[whole != 0].mean() < 0.7
        np.testing.assert_allclose(dropped[~gone], 2 * whole[~gone], rtol=1e-10)

    def test_training_without_the_dropout_rng_is_an_error_that_names_it(self):
        variables = random_variables(self.model)
        with pytest.raises(Exception, match="dropout"):
            self.model.apply(variables, self.images, train=True, mutable=["batch_stats"])

    @pytest.mark.parametrize("rate", [-0.1, 1.0])
    def test_the_share_is_checked(self, rate):
        with pytest.raises(ValueError, match=f"dropout must be at least 0 and below 1, not {rate}"):
            rv.create_model(VARIANT, dropout=rate)


OPTIONS: dict[str, Any] = dict(strides=(1, 2, 2, 2, 2), output_stride=8, activation="gelu")


@pytest.mark.parametrize("deploy", [False, True], ids=["training", "deploy"])
def test_native_files_describe_a_custom_variant_completely(deploy, tmp_path):
    model = rv.create_model(VARIANT, 5, deploy, **OPTIONS)
    variables = random_variables(model)
    rv.save_weights(tmp_path / "w.safetensors", model, variables)
    loaded, loaded_variables = rv.load_weights(tmp_path / "w.safetensors")
    assert loaded == model
    assert_same_bits(variables, loaded_variables)


def test_a_modified_published_variant_still_loads_by_its_name(tmp_path):
    model = rv.create_model("RepVGG-A0", 2, deploy=True, activation="silu")
    rv.save_weights(tmp_path / "w.safetensors", model, random_variables(model))
    assert rv.load_weights(tmp_path / "w.safetensors", "RepVGG-A0")[0] == model
    with pytest.raises(rv.WeightsError, match="holds RepVGG-A0, not RepVGG-A1"):
        rv.load_weights(tmp_path / "w.safetensors", "RepVGG-A1")


def test_an_activation_function_is_restored_from_the_variant(tmp_path):
    model = rv.create_model(VARIANT, 5, activation=squash)
    rv.save_weights(tmp_path / "w.safetensors", model, random_variables(model))
    with pytest.raises(rv.WeightsError, match=r"activation is a Python function, .* pass load_weights its Variant"):
        rv.load_weights(tmp_path / "w.safetensors")
    assert rv.load_weights(tmp_path / "w.safetensors", model.variant)[0] == model


@pytest.mark.parametrize("family", ["authors", "timm", "mmpretrain"])
def test_pytorch_files_need_the_variant_or_the_side_file_for_options(family, tmp_path):
    model = rv.create_model(VARIANT, 5, **OPTIONS)
    variables = random_variables(model)
    with pytest.warns(WeightsWarning, match=r"cannot hold strides \(1, 2, 2, 2, 2\), output_stride 8, activation gelu"):
        rv.save_weights(tmp_path / "w.pth", model, variables, family=family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, loaded_variables = rv.load_weights(tmp_path / "w.pth", model.variant)
    assert loaded == model
    assert_same_bits(variables, loaded_variables)
    with pytest.warns(WeightsWarning, match="is not a published variant"):
        assert rv.load_weights(tmp_path / "w.pth")[0].variant == model.variant
    (tmp_path / "w.pth.json").unlink()
    with pytest.warns(WeightsWarning, match="is not a published variant"):
        assert rv.load_weights(tmp_path / "w.pth")[0].variant == VARIANT


def test_a_variant_that_the_weights_do_not_fit_is_refused(tmp_path):
    model = rv.create_model(VARIANT, 5)
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pth"):
        rv.save_weights(path, model, random_variables(model))
        with pytest.raises(rv.WeightsError):
            rv.load_weights(path, dataclasses.replace(VARIANT, widths=(8, 8, 12, 16, 32)))


@pytest.mark.parametrize(
    "change",
    [dict(activation="tanh"), dict(strides=[True] * 5), dict(output_stride=1), dict(block="x"), dict(branches=[1])],
    ids=str,
)
def test_a_damaged_description_is_refused(change, tmp_path, monkeypatch):
    from repvgg_jax.weights import header

    model = rv.create_model(VARIANT, 5, **OPTIONS)
    honest = header.variant_to_json(model.variant)
    assert isinstance(honest, dict)
    monkeypatch.setattr(header, "variant_to_json", lambda variant: honest | change)
    rv.save_weights(tmp_path / "w.safetensors", model, random_variables(model))
    with pytest.raises(rv.WeightsError, match="damaged header"):
        rv.load_weights(tmp_path / "w.safetensors")


def test_plain_variants_are_described_as_in_earlier_releases():
    from repvgg_jax.weights import header

    described = header.variant_to_json(VARIANT)
    assert isinstance(described, dict)
    assert not {"strides", "output_stride", "activation", "block", "branches"} & set(described)


def test_bfloat16_supports_every_option():
    model = rv.create_model(
        VARIANT, 5, dtype=jnp.bfloat16, block="qarepvgg", branches=rv.Branches(2, True, True), **OPTIONS
    )
    variables, images = random_variables(model), noise(2, 32, 32, 3)
    exact = run(model.clone(dtype=jnp.float32).apply, variables, images)
    assert 1e-4 < relative_difference(exact, run(model.apply, variables, images)) < 0.05


@pytest.mark.parametrize(
    ("strides", "output_stride", "reductions"),
    [((1, 1, 2, 1, 2), 32, [1, 1, 2, 2, 4]), ((2, 1, 2, 2, 2), 8, [2, 2, 4, 8, 8])],
)
def test_every_stage_has_its_own_stride(strides, output_stride, reductions, tmp_path):
    model = rv.create_model(VARIANT, 5, strides=strides, output_stride=output_stride)
    assert [info.stride for info in model.feature_info] == reductions
    variables, images = random_variables(model), noise(2, 32, 32, 3)
    assert "rbr_identity" in variables["params"]["stage1_0"], "stride 1 and as many channels as before"
    features = jax.eval_shape(lambda v: model.apply(v, images, method="features"), variables)
    assert [feature.shape[1] for feature in features.values()] == [32 // reduction for reduction in reductions]
    expected = run(model.apply, variables, images)
    deploy_model, deploy_variables = fuse(model, variables)
    assert relative_difference(expected, run(deploy_model.apply, deploy_variables, images)) <= 1e-5
    assert relative_difference(expected, rv.make_predictor(model, variables, 2, 32)(images)) <= 1e-5
    rv.save_weights(tmp_path / "w.safetensors", model, variables)
    assert rv.load_weights(tmp_path / "w.safetensors")[0] == model
