"""Claim: QARepVGG's block, MobileOne's copies and Diverse Branch Block's branches train, fuse exactly, and are saved.

The oracle is an independent PyTorch block with the same weights.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import repvgg_jax as rv
from repvgg_jax.net.blocks import DeployBlock, RepVGGBlock
from repvgg_jax.net.fusion import fuse_variables
from repvgg_jax.net.layout import expected_shapes
from repvgg_jax.net.summary import summarize
from repvgg_jax.trees import flatten
from tests.helpers.comparison import relative_difference
from tests.helpers.parity import fuse, initial_variables, run
from tests.helpers.random_weights import random_variables
from tests.helpers.torch_block import TorchBlock, random_block, torch_state
from tests.helpers.weight_files import assert_same_bits
from train.presets import parse

ALL = rv.Branches(dense_copies=3, dbb_1x1_3x3=True, dbb_1x1_avg=True, strips=True)
OPTIONS: dict[str, dict[str, Any]] = {
    "qarepvgg": dict(block="qarepvgg"),
    "mobileone": dict(branches=rv.Branches(dense_copies=3)),
    "dbb": dict(branches=rv.Branches(dbb_1x1_3x3=True, dbb_1x1_avg=True)),
    "acnet": dict(branches=rv.Branches(strips=True)),
    "all": dict(block="qarepvgg", branches=ALL),
    "no identity": dict(branches=rv.Branches(identity=False)),
    "no point": dict(block="qarepvgg", branches=rv.Branches(point=False)),
    "neither": dict(branches=rv.Branches(identity=False, point=False)),
}
EACH = [
    option if option in ("qarepvgg", "all", "neither") else pytest.param(option, marks=pytest.mark.slow)
    for option in OPTIONS
]
VARIANT = rv.Variant((1, 2, 2, 1), (8, 8, 12, 16, 24), groups=2)


def small_model(option: str, dtype: Any = jnp.float32, **more: Any) -> rv.RepVGG:
    return rv.create_model(VARIANT, 5, dtype=dtype, param_dtype=dtype, **OPTIONS[option], **more)


@settings(max_examples=8, deadline=None)
@given(
    data=st.data(),
    groups=st.sampled_from([1, 2]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2, 4]),
    block=st.sampled_from(["repvgg", "qarepvgg"]),
    branches=st.builds(rv.Branches, st.sampled_from([1, 3]), *5 * [st.booleans()]),
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
)
def test_every_block_equals_pytorchs_and_fuses_exactly(data, groups, stride, dilation, block, branches, size):
    inputs = groups * data.draw(st.integers(1, 3))
    outputs = data.draw(st.sampled_from([inputs, 2 * groups]))
    options = dict(stride=stride, groups=groups, dilation=dilation)
    with jax.enable_x64(True):
        dtypes = dict(dtype=jnp.float64, param_dtype=jnp.float64)
        ours = RepVGGBlock(outputs, **options, **dtypes, block=block, branches=branches)
        seed = data.draw(st.integers(0, 99))
        x = np.random.default_rng(seed).normal(size=(2, *size, inputs))
        variables = random_block(seed, ours, x)
        identity = stride == 1 and inputs == outputs
        theirs = TorchBlock(inputs, outputs, stride, groups, dilation, identity, block, branches).double()
        missing, unexpected = theirs.load_state_dict(torch_state(variables), strict=False)
        assert not unexpected
        assert all(key.endswith("num_batches_tracked") for key in missing)
        image = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            expected = theirs.eval()(image).numpy().transpose(0, 2, 3, 1)
            trained = theirs.train()(image).numpy().transpose(0, 2, 3, 1)
        actual = run(ours.apply, variables, x)
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)
        fused = run(lambda v: DeployBlock(outputs, **options, **dtypes).apply(fuse_variables(v), x), variables)
        np.testing.assert_allclose(fused, expected, rtol=1e-9, atol=1e-11)
        training, changed = run(lambda v: ours.apply(v, x, True, mutable=["batch_stats"]), variables)
        np.testing.assert_allclose(training, trained, rtol=1e-7, atol=1e-8)
        moved = torch_state(dict(changed))
        for key, value in theirs.state_dict().items():
            if key.endswith(("running_mean", "running_var")):
                np.testing.assert_allclose(moved[key], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [pytest.param(np.float32, 1e-5, marks=pytest.mark.slow), (np.float64, 1e-12)],
    ids=["float32", "float64"],
)
@pytest.mark.parametrize("option", EACH)
def test_whole_nets_fuse_to_the_same_logits(option, dtype, tolerance):
    with jax.enable_x64(True):
        model = small_model(option, jnp.dtype(dtype))
        variables = random_variables(model, dtype=dtype)
        deploy_model, deploy_variables = fuse(model, variables)
        assert set(deploy_variables) == {"params"}
        assert set(deploy_variables["params"]["stage1_0"]) == {"rbr_reparam"}
        images = np.random.default_rng(0).normal(size=(2, 40, 48, 3)).astype(dtype)
        expected, actual = run(model.apply, variables, images), run(deploy_model.apply, deploy_variables, images)
        assert actual.dtype == dtype
        assert 0.02 < np.std(expected) < 50, "the test's own weights are badly scaled"
        assert relative_difference(expected, actual) <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_published_variants_fuse_with_every_option(option):
    model = rv.create_model("RepVGG-A0", **OPTIONS[option])
    variables = random_variables(model)
    deploy_model, deploy_variables = fuse(model, variables)
    images = np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32)
    expected, actual = jax.jit(model.apply)(variables, images), jax.jit(deploy_model.apply)(deploy_variables, images)
    assert relative_difference(expected, actual) <= 1e-5


def test_a_new_qarepvgg_has_an_identity_branch_of_weight_one():
    model = small_model("qarepvgg")
    (variables,) = initial_variables(model)
    constants = {name: leaf for name, leaf in flatten(variables["batch_stats"]).items() if leaf.ndim == 0}
    with_identity = [block.name for block in VARIANT.blocks() if block.may_be_identity]
    assert constants == {f"{name}/rbr_identity/scale": 1.0 for name in with_identity}
    images = np.ones((2, 32, 32, 3), np.float32)
    _, changed = run(lambda v: model.apply(v, images, train=True, mutable=["batch_stats"]), variables)
    assert flatten(changed["batch_stats"])["stage2_1/rbr_identity/scale"] == 1.0


@pytest.mark.parametrize("option", OPTIONS)
def test_the_equivalent_kernel_is_differentiable_in_every_parameter(option):
    with jax.enable_x64(True):
        block = RepVGGBlock(4, groups=2, dtype=jnp.float64, param_dtype=jnp.float64, **OPTIONS[option])
        variables = random_block(0, block, np.zeros((1, 5, 5, 4)))

        def loss(params):
            kernel, bias = rv.equivalent_kernel_bias(params, variables["batch_stats"])
            return jnp.square(kernel).sum() + jnp.square(bias).sum()

        check_grads(loss, (variables["params"],), order=1, modes=("rev",))
        gradient = jax.grad(loss)(variables["params"])
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("option", OPTIONS)
def test_missing_statistics_are_an_error_that_names_the_branch(option):
    variables = random_variables(small_model(option))
    block, stats = variables["params"]["stage1_0"], dict(variables["batch_stats"]["stage1_0"])
    last = "bn" if "bn" in stats else sorted(stats)[-1]
    del stats[last]
    with pytest.raises(rv.FusionError, match=rf"no running statistics \(batch_stats\) for {last}"):
        rv.equivalent_kernel_bias(block, stats)


@pytest.mark.parametrize("option", EACH)
def test_predictors_and_native_files_support_every_option(option, tmp_path):
    model = small_model(option)
    variables = random_variables(model)
    images = np.random.default_rng(0).normal(size=(3, 40, 40, 3)).astype(np.float32)
    rv.save_weights(tmp_path / "w.safetensors", model, variables)
    loaded, loaded_variables = rv.load_weights(tmp_path / "w.safetensors")
    assert loaded == model
    assert_same_bits(variables, loaded_variables)
    predict = rv.make_predictor(loaded, loaded_variables, 2, 40)
    assert relative_difference(run(model.apply, variables, images), predict(images)) <= 1e-5
    rv.save_weights(tmp_path / "deploy.safetensors", *rv.to_deploy(model, variables))
    deployed = rv.make_predictor(*rv.load_weights(tmp_path / "deploy.safetensors"), 2, 40)
    np.testing.assert_array_equal(deployed(images), predict(images))


@pytest.mark.parametrize("option", OPTIONS)
def test_layout_and_summary_match_the_tree(option):
    model = small_model(option)
    tree = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32))
    shapes = {name: leaf.shape for name, leaf in flatten(tree).items()}
    assert shapes == expected_shapes(model.variant, False, 5, 3)
    counted = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("params/"))
    cost = summarize(model.variant, num_classes=5)
    assert cost.train_params == counted
    plain = summarize(VARIANT, num_classes=5)
    assert (cost.params, cost.flops, cost.winograd_muls) == (plain.params, plain.flops, plain.winograd_muls)


def test_pytorch_families_cannot_store_the_options(tmp_path):
    model = small_model("all")
    for option in OPTIONS:
        model = small_model(option)
        with pytest.raises(rv.WeightsError, match=r"(authors|qarepvgg) files have no name for "):
            rv.save_weights(tmp_path / "w.pth", model, random_variables(model))
    assert not list(tmp_path.iterdir())
    deployed = rv.to_deploy(model, random_variables(model))
    rv.save_weights(tmp_path / "deploy.pth", *deployed)
    assert_same_bits(deployed[1], rv.load_weights(tmp_path / "deploy.pth", deployed[0].variant)[1])


def test_a_file_with_other_blocks_is_refused(tmp_path):
    plain = rv.create_model(VARIANT, 5)
    rv.save_weights(tmp_path / "w.safetensors", plain, random_variables(plain))
    with pytest.raises(rv.WeightsError, match="missing: params/stage0/rbr_1x1/kernel"):
        rv.load_weights(tmp_path / "w.safetensors", dataclasses.replace(VARIANT, block="qarepvgg"))


def test_training_accepts_the_options():
    options = ["--block", "qarepvgg", "--dense-copies", "3", "--dbb-1x1-avg", "--no-point", "--activation", "silu"]
    config = parse(["--preset", "digits", *options, "--stem-stride", "1", "--dropout", "0.2"]).model
    assert config.branches == rv.Branches(dense_copies=3, dbb_1x1_avg=True, point=False)
    assert (config.block, config.activation, config.stem_stride, config.dropout) == ("qarepvgg", "silu", 1, 0.2)


@pytest.mark.slow
def test_a_run_with_options_writes_them_to_its_files(tmp_path, runs):
    done = runs.finish(
        tmp_path / "run", epochs=1, warmup_epochs=0, block="qarepvgg", dense_copies=2, dbb_1x1_3x3=True, dropout=0.1
    )
    assert done.returncode == 0, done.stderr
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    model, variables = rv.load_weights(tmp_path / "run" / "final.safetensors")
    assert (model.variant.block, model.variant.branches) == ("qarepvgg", rv.Branches(2, True))
    deploy_model, fused = rv.load_weights(tmp_path / "run" / "deploy.safetensors")
    assert relative_difference(run(model.apply, variables, images), run(deploy_model.apply, fused, images)) <= 1e-5


@pytest.mark.parametrize("copies", [0, 9, 1.5])
def test_the_number_of_copies_is_bounded(copies):
    with pytest.raises(ValueError, match=f"dense_copies must be 1 to 8, not {copies}"):
        rv.Branches(copies)
