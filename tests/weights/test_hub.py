"""Claim: weights on the Hugging Face hub load by name, through the hub's own cache, and offline."""

import json
from pathlib import Path

import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.weights.hub import HubConfig
from tests.helpers.weight_files import assert_same_bits, random_model, refused

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "architecture": "repvgg_a0",
    "num_classes": 5,
    "num_features": 1280,
    "pretrained_cfg": {
        "input_size": [3, 192, 192],
        "crop_pct": 0.9,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "num_classes": 5,
        "label_names": ["ant", "bee", "cat", "dog", "eel"],
    },
}


class Cache:
    """A cache folder in huggingface_hub's layout: blobs, a snapshot of links to them, a reference to it."""

    def __init__(self, root: Path, repository: str):
        self.folder = root / f"models--{repository.replace('/', '--')}"
        self.snapshot = self.folder / "snapshots" / COMMIT
        for part in (self.snapshot, self.folder / "blobs", self.folder / "refs"):
            part.mkdir(parents=True)
        (self.folder / "refs" / "main").write_text(COMMIT, encoding="utf-8")

    def add(self, name: str, content: bytes) -> None:
        """Add a file."""
        blob = self.folder / "blobs" / f"blob-{len(list((self.folder / 'blobs').iterdir()))}"
        blob.write_bytes(content)
        (self.snapshot / name).symlink_to(Path("..") / ".." / "blobs" / blob.name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    from huggingface_hub import constants

    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return root


def written(tmp_path: Path, suffix: str = ".safetensors"):
    """Return a timm file of RepVGG-A0, and its contents."""
    model, variables = random_model("RepVGG-A0")
    rv.save_weights(tmp_path / f"w{suffix}", model, variables, family="timm")
    return (tmp_path / f"w{suffix}").read_bytes(), variables


def test_a_cached_repository_loads_by_name(hub, tmp_path):
    content, variables = written(tmp_path)
    cache = Cache(hub, "timm/repvgg_a0.rvgg_in1k")
    cache.add("model.safetensors", content)
    cache.add("config.json", json.dumps(CONFIG).encode())
    address = "hf://timm/repvgg_a0.rvgg_in1k"
    model, loaded = rv.load_weights(address, "RepVGG-A0")
    assert model.variant.name == "RepVGG-A0"
    assert_same_bits(variables, loaded)
    for form in (address, f"{address}@main", f"{address}@{COMMIT}/model.safetensors"):
        info = rv.inspect_weights(form)
        assert (info.family, info.num_classes) == ("timm", 5)
        assert info.preprocessing == rv.Preprocessing(192, 0.9, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        assert info.class_names == ("ant", "bee", "cat", "dog", "eel")


def test_old_repositories_and_those_without_a_config_load_too(hub, tmp_path):
    content, variables = written(tmp_path, ".pth")
    Cache(hub, "someone/own").add("pytorch_model.bin", content)
    assert_same_bits(variables, rv.load_weights("hf://someone/own")[1])
    info = rv.inspect_weights("hf://someone/own")
    assert info.class_names is None
    assert info.preprocessing == rv.Preprocessing()


@pytest.mark.usefixtures("hub")
def test_without_a_network_or_a_cached_copy_the_error_is_one_line():
    assert "cannot fetch hf://timm/repvgg_b3.rvgg_in1k" in refused("hf://timm/repvgg_b3.rvgg_in1k")
    for address in ("hf://", "hf://timm", "hf://timm/", "hf://a/b@c@d"):
        assert "is not a hub address" in refused(address)
    assert "cannot fetch hf://no spaces/allowed" in refused("hf://no spaces/allowed")


@pytest.mark.usefixtures("hub")
@pytest.mark.slow
def test_an_unreachable_hub_is_one_line_too(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot fetch hf://timm/repvgg_b3.rvgg_in1k" in refused("hf://timm/repvgg_b3.rvgg_in1k")


@pytest.mark.parametrize(
    "config", [b"not json", b"[]", b'{"pretrained_cfg": {"mean": "grey"}}', b'{"pretrained_cfg": {"input_size": []}}']
)
def test_a_damaged_config_is_named(config, hub, tmp_path):
    cache = Cache(hub, "someone/damaged")
    cache.add("model.safetensors", written(tmp_path)[0])
    cache.add("config.json", config)
    assert "hf://someone/damaged has a damaged config.json" in refused("hf://someone/damaged")


def test_class_names_of_another_count_are_ignored(tmp_path):
    rv.save_weights(tmp_path / "w.safetensors", *random_model("RepVGG-A0", num_classes=3))
    info = rv.inspect_weights(tmp_path / "w.safetensors")
    assert HubConfig(None, ("a", "b")).apply(info) == info


def test_without_huggingface_hub_the_error_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install -e '.[hub]' in your checkout" in refused("hf://timm/repvgg_a0.rvgg_in1k")


@pytest.mark.slow
def test_a_predictor_runs_on_hub_weights(hub, tmp_path):
    content, _ = written(tmp_path)
    Cache(hub, "timm/repvgg_a0.rvgg_in1k").add("model.safetensors", content)
    model, variables = rv.load_weights("hf://timm/repvgg_a0.rvgg_in1k")
    logits = rv.make_predictor(model, variables, 1, 32)(np.zeros((1, 32, 32, 3), np.float32))
    assert logits.shape == (1, 5)
