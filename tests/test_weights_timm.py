"""Claim: timm and this library compute the same from the same file, in both directions and both forms."""

import contextlib
import json

import numpy as np
import pytest
import torch
from conftest import relative_difference

import repvgg_jax as rv

_operators = torch.library.Library("torchvision", "FRAGMENT")
for _declaration in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    with contextlib.suppress(RuntimeError):  # torchvision's own operators are there where its build matches torch's
        _operators.define(_declaration)

timm = pytest.importorskip("timm")

IMAGES = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
QUICK = ("repvgg_a0", "repvgg_b0")


def timm_models():
    """Every RepVGG that timm has; all but the quickest marked slow."""
    names = timm.list_models("repvgg_*")
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


def our_name(name: str) -> str:
    """`repvgg_b1g4` -> `RepVGG-B1g4`."""
    letter, rest = name.removeprefix("repvgg_")[0], name.removeprefix("repvgg_")[1:]
    return f"RepVGG-{letter.upper()}{rest}"


@torch.no_grad()
def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Random BN statistics and affine parameters; logits stay of unit order through the depth."""
    generator = torch.Generator().manual_seed(0)

    def uniform(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            uniform(module.weight, 0.3, 0.9)
            uniform(module.bias, -0.3, 0.3)
            uniform(module.running_mean, -0.3, 0.3)
            uniform(module.running_var, 0.6, 1.6)
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.weight.normal_(0, module.weight[0].numel() ** -0.5, generator=generator)
            if module.bias is not None:
                uniform(module.bias, -0.3, 0.3)
    return model.eval()


@torch.no_grad()
def timm_logits(model: torch.nn.Module) -> np.ndarray:
    return model(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2))).numpy()


@pytest.mark.parametrize("name", timm_models())
def test_timms_own_models_give_the_same_logits_here(name, tmp_path):
    from timm.utils.model import reparameterize_model

    theirs = randomize(timm.create_model(name, num_classes=10))
    for form, model in (("training", theirs), ("deploy", reparameterize_model(theirs))):
        expected = timm_logits(model)
        assert 0.05 < expected.std() < 20, "the test's own weights are badly scaled"
        torch.save(model.state_dict(), tmp_path / "w.pth")
        ours, variables = rv.load_weights(tmp_path / "w.pth")
        assert ours == rv.create_model(our_name(name), 10, deploy=form == "deploy")
        assert relative_difference(expected, ours.apply(variables, IMAGES)) <= 1e-5


@pytest.mark.parametrize("name", timm_models())
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_takes_our_files_by_checkpoint_path(name, suffix, tmp_path):
    theirs = randomize(timm.create_model(name, num_classes=10))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model, variables = rv.load_weights(tmp_path / "theirs.pth")
    written = tmp_path / f"ours{suffix}"
    rv.save_weights(written, model, variables, family="timm")
    loaded = timm.create_model(name, num_classes=10, checkpoint_path=str(written))
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key]), key


def test_timm_takes_our_deploy_form(tmp_path):
    from timm.utils.model import reparameterize_model

    model, variables = rv.create_model("RepVGG-A0", 10), None
    theirs = randomize(timm.create_model("repvgg_a0", num_classes=10))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model, variables = rv.load_weights(tmp_path / "theirs.pth")
    rv.save_weights(tmp_path / "deploy.pth", *rv.to_deploy(model, variables), family="timm")
    deployed = reparameterize_model(timm.create_model("repvgg_a0", num_classes=10).eval())
    deployed.load_state_dict(torch.load(tmp_path / "deploy.pth", weights_only=True), strict=True)
    assert relative_difference(timm_logits(theirs), timm_logits(deployed)) <= 1e-5


def test_our_preprocessing_is_what_timm_says_of_its_models():
    for name in timm.list_models("repvgg_*"):
        theirs = timm.get_pretrained_cfg(name)
        ours = rv.create_model(our_name(name)).variant
        assert theirs.input_size == (3, ours.image_size, ours.image_size), name
        assert theirs.crop_pct == ours.crop_fraction, name
        assert json.dumps(theirs.mean) == json.dumps(rv.Preprocessing().mean)
