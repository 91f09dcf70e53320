"""Claim: QARepVGG checkpoints, under their authors' names, load and save strictly and compute what PyTorch computes.

The module below is written from the papers' formulas and the names in its authors' state dicts (`QARepVGGBlockV2` of
cxxgtxy/QARepVGG, which YOLOv6 calls `QARepVGGBlock`); it shares no code with either.
"""

import numpy as np
import pytest
import torch
from torch import nn

import repvgg_jax as rv
from repvgg_jax.trees import flatten, unflatten
from tests.helpers.comparison import relative_difference
from tests.helpers.random_weights import random_variables
from tests.helpers.weight_files import assert_same_bits, refused

pytestmark = pytest.mark.filterwarnings("ignore:.*is not a published variant:repvgg_jax.weights.WeightsWarning")

BLOCKS, WIDTHS = (2, 1, 3, 1), (8, 8, 12, 16, 24)


class ConvBN(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, stride: int, groups: int):
        super().__init__()
        self.add_module("conv", nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """ReLU(BN(BN(3x3) + 1x1 + x))."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, deploy: bool):
        super().__init__()
        if deploy:
            self.rbr_reparam = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups)
        else:
            self.rbr_identity = nn.Identity() if inputs == outputs and stride == 1 else None
            self.rbr_dense = ConvBN(inputs, outputs, stride, groups)
            self.rbr_1x1 = nn.Conv2d(inputs, outputs, 1, stride, groups=groups, bias=False)
            self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "rbr_reparam"):
            return torch.relu(self.rbr_reparam(x))
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return torch.relu(self.bn(y if self.rbr_identity is None else y + self.rbr_identity(x)))


class Net(nn.Module):
    def __init__(self, blocks=BLOCKS, widths=WIDTHS, groups=1, classes=5, deploy=False):
        super().__init__()
        inputs, index = 3, 0
        for stage, (count, width) in enumerate(zip((1, *blocks), widths, strict=True)):
            row = []
            for position in range(count):
                split = groups if index and index % 2 == 0 else 1
                row.append(Block(inputs, width, 1 if position else 2, split, deploy))
                inputs, index = width, index + 1
            setattr(self, f"stage{stage}", row[0] if stage == 0 else nn.Sequential(*row))
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in range(5):
            x = getattr(self, f"stage{stage}")(x)
        return self.linear(x.mean((2, 3)))


@torch.no_grad()
def randomized(net: Net) -> Net:
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.6, 1.4),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
            ):
                assert tensor is not None
                tensor.uniform_(low, high)
            assert module.num_batches_tracked is not None
            module.num_batches_tracked.fill_(77)
    return net.eval()


def ours() -> tuple[rv.RepVGG, dict]:
    """Return a model of the same shape, and random variables; the identity's scale is the constant 1."""
    model = rv.create_model(rv.Variant(BLOCKS, WIDTHS), 5, block="qarepvgg")
    variables = flatten(random_variables(model))
    identities = {name: np.float32(1) for name in variables if name.endswith("rbr_identity/scale")}
    assert identities
    return model, unflatten(variables | identities)


IMAGES = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)


@torch.no_grad()
def logits_of(net: Net) -> np.ndarray:
    return net(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2))).numpy()


@pytest.mark.parametrize("groups", [1, 2])
def test_their_files_load_and_compute_the_same_in_both_forms(groups, tmp_path):
    theirs = randomized(Net(groups=groups))
    torch.save({"model": theirs.state_dict(), "epoch": 119}, tmp_path / "theirs.pth")
    info = rv.inspect_weights(tmp_path / "theirs.pth")
    assert (info.family, info.variant.block, info.variant.groups, info.num_batches_tracked) == (
        "qarepvgg",
        "qarepvgg",
        groups,
        77,
    )
    model, variables = rv.load_weights(tmp_path / "theirs.pth")
    expected = logits_of(theirs)
    assert relative_difference(expected, model.apply(variables, IMAGES)) < 2e-6
    deploy, fused = rv.to_deploy(model, variables)
    assert relative_difference(expected, deploy.apply(fused, IMAGES)) < 1e-5
    rv.save_weights(tmp_path / "deploy.pth", deploy, fused)
    plain = Net(groups=groups, deploy=True)
    plain.load_state_dict(torch.load(tmp_path / "deploy.pth"), strict=True)
    assert relative_difference(expected, logits_of(plain)) < 1e-5


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_they_load_our_files_strictly(suffix, tmp_path):
    model, variables = ours()
    rv.save_weights(tmp_path / f"ours{suffix}", model, variables, family="authors", num_batches_tracked=3)
    if suffix == ".pth":
        state = torch.load(tmp_path / "ours.pth", weights_only=True)
    else:
        from safetensors.torch import load_file

        state = load_file(tmp_path / "ours.safetensors")
    theirs = Net().eval()
    theirs.load_state_dict(state, strict=True)
    if suffix == ".pth":
        assert list(state) == list(theirs.state_dict())
    assert relative_difference(logits_of(theirs), model.apply(variables, IMAGES)) < 2e-6
    again, loaded = rv.load_weights(tmp_path / f"ours{suffix}")
    assert again == model
    assert_same_bits(dict(sorted(flatten(variables).items())), dict(sorted(flatten(loaded).items())))


def test_a_published_variant_is_recognised_with_these_blocks(tmp_path):
    from repvgg_jax.net.variants import VARIANTS

    net = Net((2, 4, 14, 1), VARIANTS["RepVGG-A0"].widths)
    torch.save(net.state_dict(), tmp_path / "a0.pth")
    for name in (None, "RepVGG-A0"):
        model = rv.load_weights(tmp_path / "a0.pth", name)[0]
        assert (model.variant.name, model.variant.block) == ("RepVGG-A0", "qarepvgg")
        assert model == rv.create_model("RepVGG-A0", 5, block="qarepvgg")
    assert "holds RepVGG-A0, not RepVGG-A1" in refused(tmp_path / "a0.pth", name="RepVGG-A1")


def test_a_file_with_incomplete_blocks_is_refused(tmp_path):
    state = Net().state_dict()
    del state["stage3.1.bn.running_var"]
    torch.save(state, tmp_path / "w.pth")
    assert "missing: stage3.1.bn.running_var" in refused(tmp_path / "w.pth")
    # YOLOv6 keeps the last BN next to the fused convolution, which is neither form.
    state = Net(deploy=True).state_dict() | {f"stage0.bn.{leaf}": torch.ones(8) for leaf in ("weight", "bias")}
    torch.save(state, tmp_path / "w.pth")
    assert "unexpected: stage0.bn.weight, stage0.bn.bias" in refused(tmp_path / "w.pth")


def test_anything_the_family_has_no_name_for_is_refused(tmp_path):
    gated = rv.create_model(
        rv.Variant(BLOCKS, WIDTHS, squeeze_excite="before_relu", squeeze_excite_ratio=4), 5, block="qarepvgg"
    )
    with pytest.raises(rv.WeightsError, match=r"qarepvgg files have no name for the se\.down"):
        rv.save_weights(tmp_path / "w.pth", gated, random_variables(gated))
    model, variables = ours()
    for family in ("timm", "mmpretrain"):
        with pytest.raises(rv.WeightsError, match=f"{family} files have no name for the"):
            rv.save_weights(tmp_path / "w.pth", model, variables, family=family)
    variables["batch_stats"]["stage1_1"]["rbr_identity"]["scale"] = np.float32(2)
    with pytest.raises(rv.WeightsError, match=r"rbr_identity/scale, which is 2\.0 and not 1"):
        rv.save_weights(tmp_path / "w.pth", model, variables)
    assert not list(tmp_path.iterdir())
