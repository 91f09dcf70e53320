"""Claim: weights load and save under every family's names without changing a bit, and the authors' code reads them."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

import repvgg_jax as rv
from repvgg_jax.net.layout import expected_shapes
from repvgg_jax.net.summary import summarize
from repvgg_jax.net.variants import VARIANTS
from repvgg_jax.trees import flatten
from repvgg_jax.weights.key_maps import FAMILIES
from tests.helpers import torch_oracle
from tests.helpers.weight_files import TINY, assert_same_bits, families_of, file_shapes, random_model, torch_state

LARGE = 15e6


def variants_by_size():
    """Return every published variant, the larger ones marked slow."""
    for name, variant in VARIANTS.items():
        large = summarize(variant).train_params > LARGE
        yield pytest.param(name, marks=pytest.mark.slow if large else ())


@pytest.mark.parametrize("deploy", [False, True], ids=["training", "deploy"])
@pytest.mark.parametrize("name", list(variants_by_size()))
def test_round_trips_through_every_family_keep_every_bit(name, deploy, tmp_path):
    variant = VARIANTS[name]
    families = families_of(variant)
    original = torch_state(variant, deploy, families[0])
    torch.save(original, tmp_path / "authors.pth")
    model, variables = rv.load_weights(tmp_path / "authors.pth")
    assert model == rv.create_model(name, num_classes=5, deploy=deploy)
    for family in families[1:]:
        between = tmp_path / f"{family.name}{'.safetensors' if family.name == 'timm' else '.pth'}"
        rv.save_weights(between, model, variables, family=family.name)
        info = rv.inspect_weights(between)
        assert (info.family, info.variant, info.deploy) == (family.name, variant, deploy)
        model, variables = rv.load_weights(between)
        between.unlink()
    rv.save_weights(tmp_path / "again.pth", model, variables, num_batches_tracked=7)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert list(again) == list(original)
    for key, tensor in original.items():
        assert again[key].dtype == tensor.dtype, key
        assert again[key].shape == tensor.shape, key
        assert again[key].numpy().tobytes() == tensor.numpy().tobytes(), key


@pytest.mark.parametrize("deploy", [False, True], ids=["training", "deploy"])
@pytest.mark.parametrize("name", VARIANTS)
def test_written_keys_order_shapes_and_dtypes_match_the_authors(name, deploy):
    with torch.device("meta"):
        theirs = torch_oracle.create(name, 10, deploy).state_dict()
    ours = file_shapes(families_of(VARIANTS[name])[0], VARIANTS[name], deploy)
    assert list(ours) == list(theirs)
    assert ours == {key: tuple(tensor.shape) for key, tensor in theirs.items()}


@pytest.mark.parametrize("name", ["RepVGG-A0", "RepVGGplus-L2pse"])  # for the others, timm is the oracle
@pytest.mark.slow
def test_the_oracle_loads_our_files_strictly_and_computes_the_same(name, tmp_path):
    from tests.helpers.comparison import relative_difference
    from tests.helpers.random_weights import random_variables

    model = rv.create_model(name, num_classes=5)
    variables = random_variables(model)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    fused = jax.jit(rv.fuse_variables)(variables)
    for form, weights in ((model, variables), (model.clone(deploy=True), fused)):
        rv.save_weights(tmp_path / "w.pth", form, weights)
        oracle = torch_oracle.create(name, 5, form.deploy)
        oracle.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True), strict=True)
        with torch.no_grad():
            theirs = oracle.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2)))
        assert relative_difference(theirs, form.apply(weights, images)) <= 1e-5


@pytest.mark.parametrize("deploy", [False, True], ids=["training", "deploy"])
def test_expected_shapes_match_the_flax_modules(deploy):
    plus = dataclasses.replace(TINY, squeeze_excite="after_relu", squeeze_excite_ratio=2, auxiliary_heads=True)
    for variant in (
        VARIANTS["RepVGG-A0"],
        dataclasses.replace(TINY, groups=2),
        dataclasses.replace(TINY, squeeze_excite="before_relu"),
        plus,
    ):
        model = rv.create_model(variant, 7, deploy)
        images = jax.ShapeDtypeStruct((1, 32, 32, 4), np.float32)
        tree = jax.eval_shape(model.init, jax.random.key(0), images)
        traced = {leaf: array.shape for leaf, array in flatten(tree).items()}
        assert traced == expected_shapes(variant, deploy, 7, 4)


def test_native_files_keep_every_bit_and_the_step_count(tmp_path):
    model, variables = random_model("RepVGG-A0")
    rv.save_weights(tmp_path / "w.safetensors", model, variables, num_batches_tracked=123)
    assert_same_bits(variables, rv.load_weights(tmp_path / "w.safetensors")[1])
    assert rv.inspect_weights(tmp_path / "w.safetensors").num_batches_tracked == 123


def test_step_counts_are_zero_unless_known(tmp_path):
    model, variables = random_model("RepVGG-A0")
    rv.save_weights(tmp_path / "w.pth", model, variables)
    state = torch.load(tmp_path / "w.pth", weights_only=True)
    counters = [tensor for key, tensor in state.items() if key.endswith("num_batches_tracked")]
    assert len(counters) == 22 * 2 + 17
    assert all(tensor.dtype == torch.int64 and tensor.shape == () and tensor == 0 for tensor in counters)


def test_parts_without_a_name_in_a_family_are_an_error(tmp_path):
    model, variables = random_model("RepVGG-A0")
    plus, plus_variables = rv.create_model("RepVGGplus-L2pse", 5, deploy=True), None
    plus_variables = random_model(plus.variant, deploy=True)[1]
    for family in ("timm", "mmpretrain"):
        with pytest.raises(rv.WeightsError, match=r"have no name for the post_se\.down of RepVGGplus-L2pse"):
            rv.save_weights(tmp_path / "w.pth", plus, plus_variables, family=family)
    with pytest.raises(rv.WeightsError, match=r"native weights are \.safetensors files"):
        rv.save_weights(tmp_path / "w.pth", model, variables, family="native")
    with pytest.raises(rv.WeightsError, match=f"unknown naming scheme 'keras'; known: native, {', '.join(FAMILIES)}"):
        rv.save_weights(tmp_path / "w.pth", model, variables, family="keras")
    assert not list(tmp_path.iterdir())
