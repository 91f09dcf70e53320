"""Claim: timm and this library compute the same from the same file, in both directions and both forms."""

import json

import numpy as np
import pytest
import torch

import repvgg_jax as rv
from tests.helpers import torchvision_reference  # noqa: F401 (timm imports torchvision)
from tests.helpers.comparison import relative_difference

timm = pytest.importorskip("timm")
reparameterize_model = pytest.importorskip("timm.utils.model").reparameterize_model

IMAGES = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
QUICK = ("repvgg_a0",)


def timm_models():
    """Return every RepVGG in timm, all but the smallest marked slow."""
    names = timm.list_models("repvgg_*")
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


def our_name(name: str) -> str:
    """`repvgg_b1g4` -> `RepVGG-B1g4`."""
    letter, rest = name.removeprefix("repvgg_")[0], name.removeprefix("repvgg_")[1:]
    return f"RepVGG-{letter.upper()}{rest}"


@torch.no_grad()
def random_timm(name: str) -> torch.nn.Module:
    """Return timm's model with random weights, BN statistics and affine parameters; logits stay of unit order."""
    with torch.device("meta"):  # timm's own initialisation takes longer than everything else
        model = timm.create_model(name, num_classes=10)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)

    def uniform(tensor, low, high):
        tensor.uniform_(low, high, generator=generator)

    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            assert module.num_batches_tracked is not None
            uniform(module.weight, 0.3, 0.9)
            uniform(module.bias, -0.3, 0.3)
            uniform(module.running_mean, -0.3, 0.3)
            uniform(module.running_var, 0.6, 1.6)
            module.num_batches_tracked.fill_(3)
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            bound = (3 / module.weight[0].numel()) ** 0.5
            uniform(module.weight, -bound, bound)
            if module.bias is not None:
                uniform(module.bias, -0.3, 0.3)
    return model.eval()


@torch.no_grad()
def timm_logits(model: torch.nn.Module) -> np.ndarray:
    return model(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2))).numpy()


@pytest.mark.parametrize("name", timm_models())
def test_the_same_file_gives_the_same_logits_and_is_written_back_unchanged(name, tmp_path):
    theirs = random_timm(name)
    for form, model in (("deploy", reparameterize_model(theirs)), ("training", theirs)):
        expected = timm_logits(model)
        assert 0.05 < expected.std() < 20, "the test's own weights are badly scaled"
        torch.save(model.state_dict(), tmp_path / "theirs.pth")
        ours, variables = rv.load_weights(tmp_path / "theirs.pth")
        assert ours == rv.create_model(our_name(name), 10, deploy=form == "deploy")
        assert relative_difference(expected, ours.apply(variables, IMAGES)) <= 1e-5
    (tmp_path / "theirs.pth").unlink()
    for suffix in (".safetensors", ".pth") if name in QUICK else (".safetensors",):
        rv.save_weights(tmp_path / f"ours{suffix}", ours, variables, family="timm", num_batches_tracked=3)
        loaded = timm.create_model(name, num_classes=10, checkpoint_path=str(tmp_path / f"ours{suffix}"))
        assert list(loaded.state_dict()) == list(theirs.state_dict())
        for key, tensor in theirs.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[key]), key


@pytest.mark.slow
def test_timm_loads_our_deploy_form(tmp_path):
    theirs = random_timm("repvgg_a0")
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model, variables = rv.load_weights(tmp_path / "theirs.pth")
    rv.save_weights(tmp_path / "deploy.pth", *rv.to_deploy(model, variables), family="timm")
    deployed = reparameterize_model(timm.create_model("repvgg_a0", num_classes=10).eval())
    deployed.load_state_dict(torch.load(tmp_path / "deploy.pth", weights_only=True), strict=True)
    assert relative_difference(timm_logits(theirs), timm_logits(deployed)) <= 1e-5


def test_our_preprocessing_matches_timms():
    for name in timm.list_models("repvgg_*"):
        theirs = timm.get_pretrained_cfg(name)
        ours = rv.create_model(our_name(name)).variant
        assert theirs.input_size == (3, ours.image_size, ours.image_size), name
        assert theirs.crop_pct == ours.crop_fraction, name
        assert json.dumps(theirs.mean) == json.dumps(rv.Preprocessing().mean)
