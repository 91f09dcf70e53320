"""Claim: a RepVGG inside another model's file is found by its prefix, and tensors outside it are named."""

import pytest
import torch

import repvgg_jax as rv
from repvgg_jax.trees import unflatten
from repvgg_jax.weights.key_maps import FAMILIES
from tests.helpers import torchvision_reference  # noqa: F401 (timm imports torchvision)
from tests.helpers.commands import convert, error_of
from tests.helpers.weight_files import TINY, assert_same_bits, families_of, random_arrays, refused, torch_state

pytestmark = pytest.mark.filterwarnings("ignore::repvgg_jax.weights.WeightsWarning")


def under(prefix: str, state: dict) -> dict:
    return {prefix + key: tensor for key, tensor in state.items()}


def body(state: dict) -> dict:
    return {key: tensor for key, tensor in state.items() if "linear" not in key and "head" not in key}


def without_head(variables: dict) -> dict:
    params = {name: tree for name, tree in variables["params"].items() if name != "linear"}
    return variables | {"params": params}


@pytest.mark.parametrize("where", ["first", "last"])
def test_stray_tensors_in_a_lightning_checkpoint_are_named(where, tmp_path):
    stray = {"criterion.weight": torch.ones(5), "metrics.total": torch.zeros(1)}
    net = under("model.", torch_state(TINY))
    state = stray | net if where == "first" else net | stray
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.ckpt")
    message = refused(tmp_path / "w.ckpt")
    assert "other tensors: criterion.weight, metrics.total;" in message
    assert 'prefix="model." (--prefix model.)' in message
    assert "rbr_dense" not in message  # none of the hundred valid keys
    assert_same_bits(unflatten(random_arrays(TINY)), rv.load_weights(tmp_path / "w.ckpt", prefix="model.")[1])
    assert "criterion.weight" in error_of(convert(tmp_path / "w.ckpt", tmp_path / "out.pth"))
    kept = (tmp_path / "out.safetensors", "--prefix", "model.", "--keep-training-form")
    assert convert(tmp_path / "w.ckpt", *kept).returncode == 0
    assert_same_bits(unflatten(random_arrays(TINY)), rv.load_weights(tmp_path / "out.safetensors")[1])
    assert "5 classes" in convert("--inspect", tmp_path / "w.ckpt", "--prefix", "model.").stdout


@pytest.mark.parametrize("prefix", ["encoder.", "backbone.", "module.detector.backbone."])
@pytest.mark.parametrize("family", [family.name for family in families_of(TINY)])
def test_an_encoder_or_backbone_without_a_classifier_is_loaded(family, prefix, tmp_path):
    """In a U-Net or a detector; MMDetection's own names include the prefix."""
    net = body(torch_state(TINY, family=FAMILIES[family]))
    if family == "mmpretrain":
        net = {key.removeprefix("backbone."): tensor for key, tensor in net.items()}
        if not prefix.endswith("backbone."):
            prefix += "backbone."
    outer = prefix.split(".")[0] if prefix.count(".") > 1 else ""
    other = {"decoder.0.weight": torch.ones(3), "neck.conv.weight": torch.ones(2)}
    torch.save(under(prefix, net) | under(f"{outer}." if outer else "", other), tmp_path / "w.pth")
    message = refused(tmp_path / "w.pth")
    assert "neck.conv.weight" in message
    assert "--prefix" in message
    assert "num_classes=N" in refused(tmp_path / "w.pth", prefix=prefix)
    model, variables = rv.load_weights(tmp_path / "w.pth", prefix=prefix, num_classes=7)
    assert model.num_classes == 7
    assert_same_bits(without_head(unflatten(random_arrays(TINY))), without_head(variables))
    assert rv.inspect_weights(tmp_path / "w.pth", prefix=prefix).num_classes == 0


def test_the_prefix_chooses_between_several_networks(tmp_path):
    state = under("student.", torch_state(TINY)) | under("teacher.", torch_state(TINY, seed=1))
    torch.save(state, tmp_path / "w.pth")
    assert "holds several networks: student., teacher.; choose one with prefix=" in refused(tmp_path / "w.pth")
    for prefix, seed in (("student.", 0), ("teacher.", 1)):
        assert_same_bits(
            unflatten(random_arrays(TINY, seed=seed)), rv.load_weights(tmp_path / "w.pth", prefix=prefix)[1]
        )
    assert "no keys that begin with net.; they begin with student., teacher." in refused(
        tmp_path / "w.pth", prefix="net."
    )


def test_a_prefix_is_also_found_after_a_common_wrapper(tmp_path):
    state = under("module.", under("encoder.", torch_state(TINY)) | {"decoder.weight": torch.ones(2)})
    torch.save(state, tmp_path / "w.pth")
    for prefix in ("encoder.", "module.encoder."):
        assert_same_bits(unflatten(random_arrays(TINY)), rv.load_weights(tmp_path / "w.pth", prefix=prefix)[1])


def test_native_files_have_no_prefix(tmp_path):
    rv.save_weights(tmp_path / "w.safetensors", rv.create_model(TINY, 5), unflatten(random_arrays(TINY)))
    assert "is a native file" in refused(tmp_path / "w.safetensors", prefix="encoder.")


def test_timms_feature_extractor_is_loaded_without_a_made_up_head(tmp_path):
    timm = pytest.importorskip("timm")
    net = timm.create_model("repvgg_a0", features_only=True)
    torch.save(net.state_dict(), tmp_path / "features.pth")
    info = rv.inspect_weights(tmp_path / "features.pth")
    assert (info.family, info.variant.name, info.num_classes) == ("timm-features", "RepVGG-A0", 0)
    assert "num_classes=N" in refused(tmp_path / "features.pth")
    model, variables = rv.load_weights(tmp_path / "features.pth", num_classes=3)
    theirs = net.state_dict()["stages_2.5.conv_kxk.conv.weight"].permute(2, 3, 1, 0).numpy()
    assert (variables["params"]["stage3_5"]["rbr_dense"]["conv"]["kernel"] == theirs).all()
    with pytest.raises(rv.WeightsError, match="timm-features files have no name for the classifier"):
        rv.save_weights(tmp_path / "out.pth", model, variables, family="timm-features")
