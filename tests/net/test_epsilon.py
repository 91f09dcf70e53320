"""Claim: nets trained with a BatchNorm epsilon other than 1e-5 compute, train, fuse and are saved with theirs."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import repvgg_jax as rv
from repvgg_jax.net.blocks import DeployBlock, RepVGGBlock
from repvgg_jax.preprocess import Preprocessing
from repvgg_jax.quantization.qat import quantization_aware, quantized_net, with_ranges
from repvgg_jax.trees import flatten
from repvgg_jax.weights import WeightsWarning
from tests.helpers import torch_oracle
from tests.helpers.architecture import write_variant
from tests.helpers.commands import convert
from tests.helpers.comparison import relative_difference
from tests.helpers.outlier_nets import images as calibration_images
from tests.helpers.parity import cast, leaves_of, make_oracle, nchw, numpy_logits, run
from tests.helpers.random_weights import random_variables
from tests.helpers.torch_block import TorchBlock, random_block, torch_state
from tests.helpers.weight_files import assert_same_bits, safetensors_bytes
from train.presets import parse

EPSILON = 1e-3
IMAGES = np.random.default_rng(0).normal(size=(2, 40, 48, 3)).astype(np.float32)
SMALLEST = rv.Variant((1, 2, 1, 1), (8, 8, 8, 16, 16), name="Small")

pytestmark = pytest.mark.filterwarnings("ignore:.* is not a published variant:repvgg_jax.weights.WeightsWarning")


def with_small_variances(variables: dict[str, Any]) -> dict[str, Any]:
    """Return running variances so small that 1e-5 instead of 1e-3 changes a single layer by several per cent."""

    def smaller(path: Any, leaf: Any) -> Any:
        return leaf * 1e-2 if path[-1].key == "var" else leaf

    return jax.tree_util.tree_map_with_path(smaller, variables)


def oracle_of(name: str) -> torch_oracle.RepVGG:
    """Return a net with small running variances and epsilon 1e-3, as PyTorch's YOLO trainers produce it."""
    if name == "smallest":
        oracle = torch_oracle.randomize(
            torch_oracle.RepVGG((1, 1, 1, 1), (0.125, 0.0625, 0.03125, 0.03125), 1, 5, False)
        )
    else:
        oracle = make_oracle(name, 5)
    for module in oracle.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = EPSILON
            assert module.running_var is not None
            module.running_var.mul_(0.02)
    return oracle


@pytest.fixture(params=["plus", pytest.param("grouped", marks=pytest.mark.slow)])
def in_float64(request, tmp_path) -> Iterator[tuple[torch_oracle.RepVGG, rv.RepVGG, dict[str, Any]]]:
    """A PyTorch net with that epsilon, our model of its file, and our variables, all in float64."""
    oracle = oracle_of(request.param)
    torch.save(oracle.state_dict(), tmp_path / "yolo.pth")
    model, variables = rv.load_weights(tmp_path / "yolo.pth", epsilon=EPSILON)
    assert model.variant.epsilon == EPSILON
    with jax.enable_x64(True), torch.no_grad():
        model = model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
        yield oracle.double(), model, cast(variables, "float64")


def test_both_forms_give_pytorchs_logits_and_another_epsilon_does_not(in_float64):
    oracle, model, variables = in_float64
    images = IMAGES.astype(np.float64)
    expected = oracle.eval()(nchw(IMAGES, "float64"))
    assert relative_difference(expected, run(model.apply, variables, images)) <= 1e-10
    deploy_model, deploy_variables = rv.to_deploy(model, variables)
    assert relative_difference(expected, run(deploy_model.apply, deploy_variables, images)) <= 1e-10
    usual = model.clone(variant=dataclasses.replace(model.variant, epsilon=1e-5))
    assert relative_difference(expected, run(usual.apply, variables, images)) > 1e-2


def test_a_backbone_with_that_epsilon_is_fused_like_the_model_alone(in_float64):
    _, model, variables = in_float64
    inside = {collection: {"backbone": tree} for collection, tree in variables.items()}
    fused = rv.fuse_variables(inside, ("backbone",), epsilon=EPSILON)
    _, deploy_variables = rv.to_deploy(model, variables)
    jax.tree.map(np.testing.assert_array_equal, fused["params"]["backbone"], deploy_variables["params"])


def test_a_training_step_gives_pytorchs_logits_and_statistics(in_float64):
    oracle, model, variables = in_float64

    def in_training(variables: Any, images: Any) -> Any:
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    expected = numpy_logits(oracle.train()(nchw(IMAGES, "float64")))
    logits, changed = run(in_training, variables, IMAGES.astype(np.float64))
    for head, values in numpy_logits(logits).items():
        assert relative_difference(expected[head], values) <= 1e-8
    theirs = leaves_of(oracle, model.variant)
    for leaf, values in flatten(changed).items():
        assert relative_difference(theirs[leaf], values) <= 1e-8


@pytest.mark.parametrize("block", [pytest.param("repvgg", marks=pytest.mark.slow), "qarepvgg"])
def test_every_branch_of_a_block_uses_the_epsilon(block):
    branches = rv.Branches(2, dbb_1x1_3x3=True, dbb_1x1_avg=True)
    with jax.enable_x64(True):
        dtypes = dict(dtype=jnp.float64, param_dtype=jnp.float64)
        ours = RepVGGBlock(4, **dtypes, block=block, branches=branches, epsilon=EPSILON)
        x = np.random.default_rng(0).normal(size=(2, 5, 6, 4))
        variables = with_small_variances(random_block(0, ours, x))
        theirs = TorchBlock(4, 4, 1, 1, 1, True, block, branches).double()
        theirs.load_state_dict(torch_state(variables), strict=False)
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = EPSILON
        with torch.no_grad():
            expected = theirs.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(run(ours.apply, variables, x), expected, rtol=1e-9, atol=1e-11)
        tree = variables["params"], variables["batch_stats"]
        kernel, bias = rv.equivalent_kernel_bias(*tree, epsilon=EPSILON)
        fused = {"params": {"rbr_reparam": {"kernel": kernel, "bias": bias}}}
        deployed: Any = DeployBlock(4, **dtypes).apply(fused, x)
        np.testing.assert_allclose(deployed, expected, rtol=1e-9, atol=1e-11)
        assert relative_difference(kernel, rv.equivalent_kernel_bias(*tree)[0]) > 1e-2


def test_native_files_store_the_epsilon_and_others_have_a_side_file(tmp_path):
    model = rv.create_model(SMALLEST, 5, epsilon=EPSILON)
    variables = with_small_variances(random_variables(model))
    rv.save_weights(tmp_path / "w.safetensors", model, variables)
    loaded, loaded_variables = rv.load_weights(tmp_path / "w.safetensors")
    assert loaded == model
    assert_same_bits(variables, loaded_variables)
    # A Variant provides what a file cannot store; this file stores it.
    assert rv.load_weights(tmp_path / "w.safetensors", SMALLEST)[0].variant.epsilon == EPSILON
    assert rv.load_weights(tmp_path / "w.safetensors", epsilon=1e-4)[0].variant.epsilon == 1e-4
    with pytest.warns(WeightsWarning, match=r"cannot hold epsilon 0\.001"):
        rv.save_weights(tmp_path / "w.pth", model, variables)
    assert rv.load_weights(tmp_path / "w.pth")[0].variant.epsilon == EPSILON
    assert rv.load_weights(tmp_path / "w.pth", SMALLEST)[0].variant.epsilon == EPSILON
    assert rv.load_weights(tmp_path / "w.pth", epsilon=1e-4)[0].variant.epsilon == 1e-4
    (tmp_path / "w.pth.json").unlink()
    assert rv.load_weights(tmp_path / "w.pth")[0].variant.epsilon == 1e-5
    assert rv.load_weights(tmp_path / "w.pth", model.variant)[0] == model
    deployed = rv.to_deploy(model, variables)
    rv.save_weights(tmp_path / "deploy.pth", *deployed)  # no warning: the weights already include it
    rv.save_weights(tmp_path / "deploy.safetensors", *deployed)
    assert rv.load_weights(tmp_path / "deploy.safetensors")[0] == deployed[0]


def test_headers_with_the_default_epsilon_have_not_changed(tmp_path):
    model = rv.create_model(SMALLEST, 5)
    rv.save_weights(tmp_path / "w.safetensors", model, random_variables(model))
    header = tmp_path.joinpath("w.safetensors").read_bytes()
    assert b"epsilon" not in header  # so earlier releases can read it, and their files can be read
    assert rv.inspect_weights(tmp_path / "w.safetensors").variant.epsilon == 1e-5


@pytest.mark.parametrize("value", [0, -1e-3, 1, "1e-3", None, True, [1e-3]])
def test_a_header_with_an_invalid_epsilon_is_damaged(value, tmp_path):
    model = rv.create_model(dataclasses.replace(SMALLEST, epsilon=EPSILON), 5)
    path = tmp_path / "w.safetensors"
    rv.save_weights(path, model, random_variables(model))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    described = json.loads(header["__metadata__"]["repvgg_jax"])
    described["variant"]["epsilon"] = value
    header["__metadata__"]["repvgg_jax"] = json.dumps(described)
    path.write_bytes(safetensors_bytes(header, data[8 + length :]))
    with pytest.raises(rv.WeightsError, match="damaged header"):
        rv.load_weights(path)


@pytest.mark.parametrize("value", [0, 1.0, -1, float("nan"), "1e-3", True])
def test_an_invalid_epsilon_is_refused(value, tmp_path):
    with pytest.raises(ValueError, match="epsilon must be a number above 0 and below 1"):
        rv.create_model("RepVGG-A0", epsilon=value)
    with pytest.raises(ValueError, match="epsilon must be a number above 0 and below 1"):
        rv.load_weights(tmp_path / "none.pth", epsilon=value)


def test_convert_accepts_an_epsilon(tmp_path):
    oracle = oracle_of("smallest")
    torch.save(oracle.state_dict(), tmp_path / "yolo.pth")
    done = convert(tmp_path / "yolo.pth", tmp_path / "deploy.safetensors", "--epsilon", EPSILON)
    assert done.returncode == 0, done.stderr
    model, variables = rv.load_weights(tmp_path / "deploy.safetensors")
    with torch.no_grad():
        expected = oracle.eval()(nchw(IMAGES))
    assert relative_difference(expected, run(model.apply, variables, IMAGES)) <= 1e-5
    done = convert(tmp_path / "yolo.pth", tmp_path / "w.safetensors", "--epsilon", EPSILON, "--keep-training-form")
    assert done.returncode == 0, done.stderr
    assert "BatchNorm epsilon 0.001" in convert("--inspect", tmp_path / "w.safetensors").stdout
    done = convert(tmp_path / "yolo.pth", tmp_path / "x.safetensors", "--epsilon", 0)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--epsilon must be above 0 and below 1, not 0.0" in done.stderr
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.slow
def test_quantised_nets_use_the_epsilon():
    model = rv.create_model(dataclasses.replace(SMALLEST, num_blocks=(1, 1, 1, 1)), 5, epsilon=EPSILON)
    variables = with_small_variances(random_variables(model))
    x = calibration_images(16)
    expected = run(model.apply, variables, x)
    net = rv.quantize(model, variables, x, "per-channel")
    qat = quantization_aware(model)
    start = with_ranges(variables)
    _, changed = run(lambda tree: qat.apply(tree, x, train=True, mutable=["batch_stats"]), start)
    trained = quantized_net(qat, start | changed, Preprocessing(32, 1.0, (0.0,) * 3, (1.0,) * 3))
    for quantized in (net, trained):
        assert quantized.variant.epsilon == EPSILON
        assert relative_difference(expected, quantized(x)) < 0.1


def test_training_takes_the_epsilon_from_the_option_or_the_initial_weights(tmp_path):
    from train.run import set_up

    net = write_variant(tmp_path, dataclasses.replace(SMALLEST, name="Small"))
    model = rv.create_model(SMALLEST, 10, epsilon=EPSILON)
    variables = random_variables(model, in_channels=1)
    rv.save_weights(tmp_path / "w.safetensors", model, variables)

    def epsilon_of(*options: Any) -> float:
        where = ("--workdir", tmp_path / f"run{len(options)}", "--data-dir", Path(tmp_path))
        config = parse([str(word) for word in ("--preset", "digits", "--model", net, *where, *options)])
        return set_up(config).model.variant.epsilon

    assert epsilon_of() == 1e-5
    assert epsilon_of("--epsilon", EPSILON) == EPSILON
    assert epsilon_of("--init", tmp_path / "w.safetensors") == EPSILON
    assert epsilon_of("--init", tmp_path / "w.safetensors", "--epsilon", 1e-4) == 1e-4
