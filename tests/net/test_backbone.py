"""Claim: as a backbone, RepVGG gives features of documented strides, dilated as in timm, and can be partly frozen."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import repvgg_jax as rv
from repvgg_jax.conv.deploy import convolve
from repvgg_jax.trees import flatten
from tests.helpers import torchvision_reference  # noqa: F401 (timm imports torchvision)
from tests.helpers.comparison import relative_difference
from tests.helpers.parity import fuse, run
from tests.helpers.random_weights import random_variables
from tests.helpers.weight_files import assert_same_bits

SMALL = rv.Variant((1, 2, 2, 2), (8, 8, 12, 16, 24))
GATED = dataclasses.replace(SMALL, squeeze_excite="after_relu", squeeze_excite_ratio=4, auxiliary_heads=True)
# Equal widths: the strided blocks keep the number of channels, and still have no identity branch when dilated.
EVEN = rv.Variant((2, 2, 2, 2), (8, 8, 8, 8, 8))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("variant", ["RepVGG-B0", SMALL, GATED], ids=["B0", "small", "plus"])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_feature_info_matches_the_features(variant, output_stride, deploy):
    model = rv.create_model(variant, 5, deploy, output_stride=output_stride)
    images = jax.ShapeDtypeStruct((1, 128, 160, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    features = jax.eval_shape(lambda v, x: model.apply(v, x, method="features"), variables, images)
    described = {i.name: (1, 128 // i.stride, 160 // i.stride, i.channels) for i in model.feature_info}
    assert {name: feature.shape for name, feature in features.items()} == described
    assert [info.stride for info in model.feature_info] == [min(s, output_stride) for s in (2, 4, 8, 16, 32)]


@pytest.mark.parametrize("output_stride", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_dilated_features_equal_timms(output_stride, tmp_path):
    timm = pytest.importorskip("timm")
    model = rv.create_model("RepVGG-A0", 5)
    variables = random_variables(model)
    rv.save_weights(tmp_path / "w.safetensors", model, variables, family="timm")
    theirs = timm.create_model(
        "repvgg_a0",
        num_classes=5,
        output_stride=output_stride,
        checkpoint_path=str(tmp_path / "w.safetensors"),
    ).eval()
    images = noise(1, 64, 96, 3)
    with torch.no_grad():
        expected = theirs.forward_intermediates(torch.from_numpy(images.transpose(0, 3, 1, 2)), intermediates_only=True)
    dilated = rv.create_model("RepVGG-A0", 5, output_stride=output_stride)
    actual = run(lambda v, x: dilated.apply(v, x, method="features"), variables, images)
    deploy_model, fused = fuse(dilated, variables)
    fused_features = run(lambda v, x: deploy_model.apply(v, x, method="features"), fused, images)
    assert [info["reduction"] for info in theirs.feature_info] == [info.stride for info in dilated.feature_info]
    for index, feature in enumerate(expected):
        reference = feature.numpy().transpose(0, 2, 3, 1)
        assert relative_difference(reference, actual[f"stage{index}"]) <= 1e-5
        assert relative_difference(reference, fused_features[f"stage{index}"]) <= 1e-5


@pytest.mark.parametrize("variant", [SMALL, GATED, EVEN], ids=["small", "plus", "even widths"])
@pytest.mark.parametrize("output_stride", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_dilation_uses_the_same_weights_and_fuses_exactly(variant, output_stride):
    with jax.enable_x64(True):
        plain = rv.create_model(variant, 5, dtype=jnp.float64, param_dtype=jnp.float64)
        model = plain.clone(variant=dataclasses.replace(variant, output_stride=output_stride))
        images = noise(2, 64, 64, 3).astype(np.float64)
        shapes = [jax.eval_shape(m.init, jax.random.key(0), images) for m in (plain, model)]
        assert shapes[0] == shapes[1]
        variables = random_variables(plain, dtype=np.float64)
        deploy_model, fused = fuse(model, variables)
        expected, actual = run(model.apply, variables, images), run(deploy_model.apply, fused, images)
        assert relative_difference(expected, actual) <= 1e-12
        assert relative_difference(run(plain.apply, variables, images), expected) > 1e-3


def test_predictors_compute_dilated_layers_directly():
    model = rv.create_model(SMALL, 5, output_stride=8)
    variables, images = random_variables(model), noise(2, 64, 64, 3)
    predict = rv.make_predictor(model, variables, 2, 64)
    assert relative_difference(run(model.apply, variables, images), predict(images)) <= 1e-5
    dilations = {block.name: block.dilation for block in model.variant.blocks()}
    assert max(dilations.values()) == 4
    assert predict.plan is not None
    algorithms = predict.plan.algorithms()
    assert {algorithms[name] for name, dilation in dilations.items() if dilation > 1} == {"direct"}
    with pytest.raises(ValueError, match="im2col needs dilation 1, not 2"):
        convolve(jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, 27, 4)), jnp.zeros(4), algorithm="im2col", dilation=2)


def gradients_and_statistics(model: rv.RepVGG, variables, images):
    def loss(params):
        tree = {**variables, "params": params}
        features, changed = model.apply(tree, images, train=True, method="features", mutable=["batch_stats"])
        return sum(jnp.square(feature).mean() for feature in features.values()), changed

    gradient, changed = run(jax.grad(loss, has_aux=True), variables["params"])
    return flatten(gradient), flatten(changed["batch_stats"])


def test_frozen_stages_get_no_gradient_and_keep_their_statistics():
    model = rv.create_model(SMALL, 5, output_stride=16, frozen_stages=2)
    variables, images = random_variables(model), noise(2, 64, 64, 3)
    gradient, statistics = gradients_and_statistics(model, variables, images)
    before = flatten(variables["batch_stats"])
    for name, leaf in gradient.items():
        if not name.startswith("linear"):
            assert np.any(leaf) == (not name.startswith(("stage0", "stage1"))), name
    for name, leaf in statistics.items():
        assert np.array_equal(leaf, before[name]) == name.startswith(("stage0", "stage1")), name


def test_frozen_bn_trains_affine_parameters_with_running_statistics():
    model = rv.create_model(SMALL, 5, output_stride=8, frozen_bn=True)
    variables, images = random_variables(model), noise(2, 64, 64, 3)
    gradient, statistics = gradients_and_statistics(model, variables, images)
    before = flatten(variables["batch_stats"])
    assert all(np.array_equal(leaf, before[name]) for name, leaf in statistics.items())
    assert all(np.any(leaf) for name, leaf in gradient.items() if not name.startswith("linear"))
    training, _ = run(lambda v: model.apply(v, images, train=True, mutable=["batch_stats"]), variables)
    assert relative_difference(run(model.apply, variables, images), training) <= 1e-6


class Segmenter(nn.Module):
    """A larger model around a dilated, partly frozen backbone."""

    deploy: bool = False

    @nn.compact
    def __call__(self, images, train=False):
        options: dict[str, Any] = dict(output_stride=8, block="qarepvgg", frozen_stages=1)
        backbone = rv.create_model(SMALL, 1, self.deploy, **options, name="backbone")
        x = backbone.features(images, train)["stage4"]
        x = nn.Conv(6, (3, 3), name="neck")(x)
        return nn.Conv(4, (1, 1), name="head")(nn.BatchNorm(use_running_average=not train, name="bn")(x))


def test_fusing_a_dilated_backbone_does_not_change_the_rest_of_the_model():
    images = noise(2, 64, 64, 3)
    variables = run(lambda key: Segmenter().init(key, images), jax.random.key(0, impl="unsafe_rbg"))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: leaf * rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype), variables)
    fused = run(lambda tree: rv.fuse_variables(tree, ("backbone",)), variables)
    expected = run(Segmenter().apply, variables, images)
    assert expected.shape == (2, 8, 8, 4)
    assert relative_difference(expected, run(Segmenter(deploy=True).apply, fused, images)) <= 1e-5
    assert set(fused["batch_stats"]) == {"bn"}
    for name in ("neck", "head", "bn"):
        assert_same_bits(fused["params"][name], variables["params"][name])
