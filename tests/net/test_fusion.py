"""Claim: a fused RepVGG gives the outputs of the training form, for every variant, up to rounding."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import repvgg_jax as rv
from repvgg_jax.net.blocks import DeployBlock, RepVGGBlock
from repvgg_jax.net.fusion import fuse_variables
from repvgg_jax.net.kernel_algebra import identity_kernel
from tests.helpers.comparison import relative_difference
from tests.helpers.random_weights import random_variables


def block_case(seed, features, in_channels, size, **options):
    """Return a training-form block with random variables, its deploy form, and an input."""
    block, deploy = RepVGGBlock(features, **options), DeployBlock(features, **options)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, *size, in_channels))
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)

    def random(path, leaf):
        values = rng.uniform(0.3, 2.0, leaf.shape)
        return values if path[-1].key in ("var", "scale") else rng.normal(0, 0.5, leaf.shape)

    return block, deploy, jax.tree_util.tree_map_with_path(random, shapes), x


@pytest.mark.slow
@pytest.mark.parametrize("name", rv.list_models())
def test_every_variant_fuses_to_the_same_logits(name):
    size = 224
    images = np.random.default_rng(1).normal(size=(1, size, size, 3))
    model = rv.create_model(name)
    variables = random_variables(model)
    deploy_model, deploy_variables = rv.to_deploy(model, variables)
    expected = np.asarray(jax.jit(model.apply)(variables, images.astype(np.float32)))
    actual = np.asarray(jax.jit(deploy_model.apply)(deploy_variables, images.astype(np.float32)))
    assert 0.05 < expected.std() < 20, "the test's own weights are badly scaled"
    assert relative_difference(expected, actual) <= 1e-5
    # The figure in the authors' FAQ, the sum of squared differences, for logits of unit scale.
    unit = expected.std()
    assert np.square((expected - actual) / unit).sum() <= 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("name", rv.list_models())
def test_every_variant_fuses_exactly_in_float64(name):
    with jax.enable_x64(True):
        images = np.random.default_rng(1).normal(size=(1, 224, 224, 3))
        model = rv.create_model(name, dtype=jnp.float64, param_dtype=jnp.float64)
        variables = random_variables(model, dtype=np.float64)
        deploy_model, deploy_variables = rv.to_deploy(model, variables)
        expected = jax.jit(model.apply)(variables, images)
        actual = jax.jit(deploy_model.apply)(deploy_variables, images)
        assert relative_difference(expected, actual) <= 1e-12


@settings(max_examples=10, deadline=None)
@given(
    data=st.data(),
    groups=st.sampled_from([1, 2, 4]),
    stride=st.sampled_from([1, 2]),
    squeeze_excite=st.sampled_from([None, "before_relu", "after_relu"]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_every_block_fuses_exactly(data, groups, stride, squeeze_excite, size):
    in_channels = groups * data.draw(st.integers(1, 3))
    features = data.draw(st.one_of(st.just(in_channels), st.integers(1, 3).map(lambda n: groups * n)))
    with jax.enable_x64(True):
        options = dict(stride=stride, groups=groups, squeeze_excite=squeeze_excite, squeeze_width=2)
        options |= dict(dtype=jnp.float64, param_dtype=jnp.float64)
        block, deploy, variables, x = block_case(data.draw(st.integers(0, 99)), features, in_channels, size, **options)
        expected = np.asarray(jax.jit(block.apply)(variables, x))
        actual = np.asarray(jax.jit(deploy.apply)(fuse_variables(variables), x))
        assert actual.shape == (2, -(-size[0] // stride), -(-size[1] // stride), features)
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_identity_kernel_returns_its_input_for_grouped_convolutions():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 5, 12)), jnp.float32)
    for groups in (1, 2, 3, 4):
        y = jax.lax.conv_general_dilated(
            x,
            identity_kernel(12, groups),
            (1, 1),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        np.testing.assert_array_equal(y, x)


def test_to_deploy_does_not_modify_its_inputs():
    model = rv.create_model("RepVGG-A0", num_classes=4)
    variables = random_variables(model)
    before = jax.tree.map(np.copy, variables)
    rv.to_deploy(model, variables)
    jax.tree.map(np.testing.assert_array_equal, before, variables)
    assert not model.deploy


def test_fusion_is_differentiable_in_every_branch():
    with jax.enable_x64(True):
        _, _, variables, _ = block_case(0, 4, 4, (3, 3), dtype=jnp.float64, param_dtype=jnp.float64)

        def loss(params):
            kernel, bias = rv.equivalent_kernel_bias(params, variables["batch_stats"])
            return jnp.square(kernel).sum() + jnp.square(bias).sum()

        check_grads(loss, (variables["params"],), order=1, modes=("rev",))
        gradient = jax.jit(jax.grad(loss))(variables["params"])
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_fusion_under_jit_equals_fusion_outside():
    model = rv.create_model(rv.Variant((1, 2, 1, 1), (8, 8, 12, 16, 20), groups=4), num_classes=4)
    variables = random_variables(model)
    eager = rv.to_deploy(model, variables)[1]
    jitted = jax.jit(lambda v: rv.to_deploy(model, v)[1])(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), eager, jitted)


BACKBONE = rv.Variant((1, 2, 2, 1), (8, 8, 12, 16, 20))


class Segmenter(nn.Module):
    """A larger model with a RepVGG inside and a BatchNorm of its own."""

    deploy: bool = False

    @nn.compact
    def __call__(self, images):
        backbone = rv.create_model(BACKBONE, num_classes=2, deploy=self.deploy, name="backbone")
        x = backbone.features(images)["stage3"]
        return nn.Conv(5, (1, 1), name="head")(nn.BatchNorm(use_running_average=True, name="head_bn")(x))


def test_only_the_backbone_of_a_larger_model_is_fused():
    images = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    variables: dict[str, Any] = dict(jax.jit(Segmenter().init)(jax.random.key(0), images))
    backbone = random_variables(rv.create_model(BACKBONE, num_classes=2))
    for collection in ("params", "batch_stats"):
        for name in variables[collection]["backbone"]:
            variables[collection]["backbone"][name] = backbone[collection][name]
    variables["params"]["head_bn"]["scale"] += 0.5

    fused = fuse_variables(variables, ("backbone",))
    expected = jax.jit(Segmenter().apply)(variables, images)
    actual = jax.jit(Segmenter(deploy=True).apply)(fused, images)
    assert relative_difference(expected, actual) <= 1e-5
    assert set(fused["batch_stats"]) == {"head_bn"}
    assert fused["params"]["head"] is variables["params"]["head"]


def test_auxiliary_heads_are_dropped_from_the_deploy_form():
    model = rv.create_model("RepVGGplus-L2pse", num_classes=3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    fused = jax.eval_shape(lambda v: rv.to_deploy(model, v)[1], shapes)
    assert "stage1_aux" in shapes["params"]
    assert not [name for name in fused["params"] if name.endswith("_aux")]
    assert set(fused) == {"params"}


def test_fusing_anything_else_is_a_clear_error():
    model = rv.create_model("RepVGG-A0", num_classes=2)
    variables = random_variables(model)
    deploy_model, fused = rv.to_deploy(model, variables)
    with pytest.raises(rv.FusionError, match="already in deploy form"):
        rv.to_deploy(deploy_model, fused)
    with pytest.raises(rv.FusionError, match="stage0: this block is already fused"):
        fuse_variables(fused)
    with pytest.raises(rv.FusionError, match=r"no running statistics .* rbr_dense, rbr_1x1"):
        fuse_variables({"params": variables["params"]})
    block, stats = (dict(tree["stage1_1"]) for tree in (variables["params"], variables["batch_stats"]))
    del block["rbr_1x1"], stats["rbr_1x1"]
    cut = {
        "params": variables["params"] | {"stage1_1": block},
        "batch_stats": variables["batch_stats"] | {"stage1_1": stats},
    }
    with pytest.raises(
        rv.FusionError, match="stage1_1 has the branches rbr_dense, rbr_identity; RepVGG-A0's are rbr_de"
    ):
        rv.to_deploy(model, cut)
    with pytest.raises(rv.FusionError, match="rbr_5x5 is not a known kind of branch: it holds conv"):
        rv.equivalent_kernel_bias(block | {"rbr_5x5": {"conv": block["rbr_dense"]["conv"]}}, stats)
    with pytest.raises(rv.FusionError, match="nothing to fuse"):
        fuse_variables({"params": {"head": {"kernel": np.zeros(3)}}})
    with pytest.raises(rv.FusionError, match="no neck in params; there are linear, stage0"):
        fuse_variables(variables, ("neck",))
