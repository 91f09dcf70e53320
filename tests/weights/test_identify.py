"""Claim: a file is identified by its contents, whatever wraps it, and is loaded completely or not at all."""

import dataclasses
import re
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch

import repvgg_jax as rv
from repvgg_jax.net.variants import VARIANTS
from repvgg_jax.trees import unflatten
from repvgg_jax.weights import WeightsWarning
from repvgg_jax.weights.identify import identify
from repvgg_jax.weights.key_maps import EMA_KEYS, FAMILIES, MODEL_KEYS
from tests.helpers.weight_files import (
    TINY,
    assert_same_bits,
    families_of,
    file_shapes,
    random_arrays,
    refused,
    torch_state,
)

pytestmark = pytest.mark.filterwarnings("ignore::repvgg_jax.weights.WeightsWarning")


@pytest.mark.parametrize("deploy", [False, True], ids=["training", "deploy"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_family_and_form_is_identified_by_keys_and_shapes(name, deploy):
    for family in families_of(VARIANTS[name]):
        for channels, classes in ((3, 1000), (1, 7)):
            identified = identify(file_shapes(family, VARIANTS[name], deploy, classes, channels), "file")
            assert (identified.family, identified.variant, identified.deploy) == (family, VARIANTS[name], deploy)
            assert (identified.in_channels, identified.num_classes) == (channels, classes)


@pytest.mark.parametrize(
    "custom",
    [
        TINY,
        dataclasses.replace(TINY, groups=2),
        dataclasses.replace(TINY, num_blocks=(1, 1, 1, 1), groups=4),
        dataclasses.replace(TINY, squeeze_excite="before_relu", squeeze_excite_ratio=4),
        dataclasses.replace(TINY, squeeze_excite="after_relu", squeeze_excite_ratio=2, auxiliary_heads=True),
    ],
)
def test_unpublished_variants_are_inferred_and_reported_as_custom(custom, tmp_path):
    family = families_of(custom)[0] if custom.squeeze_excite != "after_relu" else FAMILIES["authors-plus"]
    torch.save(torch_state(custom, family=family), tmp_path / "w.pth")
    with pytest.warns(WeightsWarning, match="not a published variant"):
        model, variables = rv.load_weights(tmp_path / "w.pth")
    assert model.variant == custom
    assert_same_bits(unflatten(random_arrays(custom)), variables)


@pytest.mark.parametrize("key", [*MODEL_KEYS, *EMA_KEYS, "any"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "module._orig_mod.net.body."])
def test_wrappers_and_prefixes_are_removed(key, prefix, tmp_path):
    state = {prefix + name: tensor for name, tensor in torch_state(TINY).items()}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}}
    torch.save({"epoch": 3, key: state, "best_acc1": torch.tensor(72.4), "optimizer": optimizer}, tmp_path / "w.tar")
    assert_same_bits(unflatten(random_arrays(TINY)), rv.load_weights(tmp_path / "w.tar")[1])
    counted = {"n_averaged": torch.tensor(5), **state}
    torch.save(counted, tmp_path / "averaged.pth")
    assert_same_bits(unflatten(random_arrays(TINY)), rv.load_weights(tmp_path / "averaged.pth")[1])


@pytest.mark.parametrize("prefix", ["", "backbone.", "module."])
def test_prefixes_that_look_like_another_familys_are_distinguished(prefix, tmp_path):
    """MMPretrain's own names begin with `backbone.`, and timm's continue with `stages.`."""
    for family in families_of(TINY):
        state = {prefix + name: tensor for name, tensor in torch_state(TINY, family=family).items()}
        torch.save(state, tmp_path / "w.pth")
        assert rv.inspect_weights(tmp_path / "w.pth").family == family.name
        assert_same_bits(unflatten(random_arrays(TINY)), rv.load_weights(tmp_path / "w.pth")[1])


def test_two_networks_in_one_file_are_refused(tmp_path):
    torch.save({"student": torch_state(TINY), "teacher": torch_state(TINY)}, tmp_path / "w.pth")
    assert "several of its entries hold tensors: student, teacher" in refused(tmp_path / "w.pth")


def test_the_moving_average_is_loaded_only_on_request(tmp_path):
    trained, averaged = torch_state(TINY), torch_state(TINY, seed=1)
    torch.save({"model": trained, "ema": {f"module.{k}": v for k, v in averaged.items()}}, tmp_path / "w.pth")
    assert_same_bits(unflatten(random_arrays(TINY)), rv.load_weights(tmp_path / "w.pth")[1])
    assert_same_bits(unflatten(random_arrays(TINY, seed=1)), rv.load_weights(tmp_path / "w.pth", ema=True)[1])
    torch.save({"model": trained}, tmp_path / "none.pth")
    assert "no moving average" in refused(tmp_path / "none.pth", ema=True)
    torch.save({"ema": averaged}, tmp_path / "only.pth")
    with pytest.warns(WeightsWarning, match="only a moving average"):
        rv.load_weights(tmp_path / "only.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_dtype_becomes_float32(dtype, suffix, tmp_path):
    from safetensors.torch import save_file

    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in torch_state(TINY).items()}
    (torch.save if suffix == ".pth" else save_file)(state, tmp_path / f"w{suffix}")
    assert rv.inspect_weights(tmp_path / f"w{suffix}").dtype == str(dtype).removeprefix("torch.")
    _, variables = rv.load_weights(tmp_path / f"w{suffix}")
    kernel = np.asarray(variables["params"]["stage1_1"]["rbr_dense"]["conv"]["kernel"])
    assert kernel.dtype == np.float32
    expected = state["stage1.1.rbr_dense.conv.weight"].float().permute(2, 3, 1, 0).numpy()
    np.testing.assert_array_equal(kernel, expected)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_all_formats_layouts_and_missing_counters_load_the_same(legacy, protocol, tmp_path):
    state = {k: v for k, v in torch_state(TINY).items() if not k.endswith("num_batches_tracked")}
    state = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in state.items()}
    state = {k: torch.nn.Parameter(v) if k.endswith("weight") else v for k, v in state.items()}
    path = tmp_path / "w.pt"
    torch.save(OrderedDict(state), path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    assert_same_bits(unflatten(random_arrays(TINY)), rv.load_weights(tmp_path / "w.pt")[1])
    assert rv.inspect_weights(tmp_path / "w.pt").num_batches_tracked is None


def test_a_name_is_checked_against_the_file(tmp_path):
    torch.save(torch_state(VARIANTS["RepVGG-A1"]), tmp_path / "w.pth")
    assert rv.load_weights(tmp_path / "w.pth", "repvgg-a1")[0].variant.name == "RepVGG-A1"
    assert refused(tmp_path / "w.pth", name="RepVGG-B0").endswith("w.pth holds RepVGG-A1, not RepVGG-B0")
    assert "did you mean" in refused(tmp_path / "w.pth", name="RepVGG-A9")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_another_class_count_gets_a_new_head_and_a_warning(suffix, tmp_path):
    torch.save(torch_state(TINY), tmp_path / "w.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeightsWarning)
        model, original = rv.load_weights(tmp_path / "w.pth")
    path = tmp_path / f"w{suffix}"
    rv.save_weights(path, model, original)
    with pytest.warns(WeightsWarning, match="has 5 classes, not 3: the classifier is newly initialised"):
        model, variables = rv.load_weights(path, num_classes=3)
    again = rv.load_weights(path, num_classes=3)[1]
    assert model.num_classes == 3
    head = variables["params"].pop("linear")
    assert_same_bits(head, again["params"]["linear"])
    assert head["kernel"].shape == (20, 3)
    assert 0.5 * 20**-0.5 < np.abs(head["kernel"]).max() <= 20**-0.5
    del original["params"]["linear"]
    assert_same_bits(original, variables)
    with pytest.raises(ValueError, match="at least 1"):
        rv.load_weights(path, num_classes=0)


def test_new_auxiliary_heads_and_files_without_a_head(tmp_path):
    plus = dataclasses.replace(TINY, squeeze_excite="after_relu", squeeze_excite_ratio=2, auxiliary_heads=True)
    state = torch_state(plus, family=FAMILIES["authors-plus"])
    torch.save(state, tmp_path / "w.pth")
    params = rv.load_weights(tmp_path / "w.pth", num_classes=3)[1]["params"]
    assert [params[f"{stage}_aux"]["linear"]["kernel"].shape[1] for stage in ("stage1", "stage3_first")] == [3, 3]
    headless = {key: tensor for key, tensor in torch_state(TINY).items() if not key.startswith("linear")}
    torch.save(headless, tmp_path / "backbone.pth")
    assert "missing: linear.weight, linear.bias" in refused(tmp_path / "backbone.pth")
    assert rv.inspect_weights(tmp_path / "backbone.pth").num_classes == 0
    with pytest.warns(WeightsWarning, match="has no classifier, not 3"):
        assert rv.load_weights(tmp_path / "backbone.pth", num_classes=3)[0].num_classes == 3


def test_missing_unexpected_and_misshapen_keys_are_listed_in_one_error(tmp_path):
    state = torch_state(VARIANTS["RepVGG-A0"])
    for position in range(11):
        del state[f"stage3.{position}.rbr_dense.bn.bias"]
    state["neck.weight"] = torch.zeros(2)
    state["linear.bias"] = torch.zeros(4)
    torch.save(state, tmp_path / "w.pth")
    for name in (None, "RepVGG-A0"):
        message = refused(tmp_path / "w.pth", name=name)
        assert re.search(r"missing: stage3\.0\.rbr_dense\.bn\.bias, .*, and 1 more; unexpected: neck\.weight", message)
        assert "wrong shape: linear.bias is [4], not [5]" in message
        assert message.count("rbr_dense.bn.bias") == 10


def test_a_new_family_needs_only_a_table(tmp_path, monkeypatch):
    stages = {stage: path.replace("stage", "level") for stage, path in FAMILIES["authors"].stages.items()}
    fifth = dataclasses.replace(FAMILIES["authors"], name="fifth", stages=stages, heads={"linear": "top"})
    torch.save(torch_state(TINY, family=fifth), tmp_path / "w.pth")
    assert "a RepVGG in any known naming scheme" in refused(tmp_path / "w.pth")
    monkeypatch.setitem(FAMILIES, "fifth", fifth)
    model, variables = rv.load_weights(tmp_path / "w.pth")
    assert_same_bits(unflatten(random_arrays(TINY)), variables)
    rv.save_weights(tmp_path / "again.pth", model, variables, family="fifth")
    assert rv.inspect_weights(tmp_path / "again.pth").family == "fifth"


def test_a_part_of_a_network_is_refused(tmp_path):
    state = torch_state(VARIANTS["RepVGG-A0"])
    torch.save({k: v for k, v in state.items() if not k.startswith("stage4")}, tmp_path / "w.pth")
    assert refused(tmp_path / "w.pth").endswith("not all of a RepVGG's: nothing of stage4")
    assert "missing: stage4.0.rbr_dense.conv.weight" in refused(tmp_path / "w.pth", name="RepVGG-A0")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    assert "a RepVGG in any known naming scheme" in refused(tmp_path / "other.pth")
    mixed = {k if k.startswith("stage2") else f"module.{k}": v for k, v in state.items()}
    torch.save(mixed, tmp_path / "mixed.pth")
    assert "unexpected: module.stage0" in refused(tmp_path / "mixed.pth")
