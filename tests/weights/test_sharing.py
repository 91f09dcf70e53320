"""Claim: a user's net goes to the hub in one commit and loads from it bit for bit, for timm too on request."""

import json
from typing import Any

import jax
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import repvgg_jax as rv
from repvgg_jax.weights.model_card import MARK
from tests.helpers import torchvision_reference  # noqa: F401 (timm imports torchvision)
from tests.helpers.comparison import relative_difference
from tests.helpers.hub import TOKEN, refusal, use_endpoint
from tests.helpers.random_weights import random_variables
from tests.helpers.weight_files import assert_same_bits

REPO, ADDRESS = "me/flowers", "hf://me/flowers"
SMALL = rv.Variant((1, 1, 1, 1), (4, 4, 4, 8, 8), name="Small", image_size=48, activation="silu")
NAMES = ("dahlia", "pagoda: a tower", "ünïcode")
IMAGES = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
PREPROCESSING = rv.Preprocessing(48, 0.9, (0.5, 0.4, 0.3), (0.25, 0.2, 0.15))


@pytest.fixture
def account(fake_hub, monkeypatch):
    """The hub, with a token that may write."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return fake_hub


def small_net(seed: int = 0):
    model = rv.create_model(SMALL, 3)
    return model, random_variables(model, seed)


def page_of(hub) -> str:
    return hub.repositories[REPO].files()["README.md"].decode()


@pytest.mark.parametrize("deploy", [False, True], ids=["training", "deploy"])
def test_a_net_is_loaded_back_bit_for_bit(deploy, account):
    model, variables = small_net()
    if deploy:
        model, variables = rv.to_deploy(model, variables)
    described: dict[str, Any] = dict(preprocessing=PREPROCESSING, class_names=NAMES, num_batches_tracked=77)
    url = rv.push_to_hub(REPO, model, variables, **described)
    repository = account.repositories[REPO]
    assert url == f"{account.url}/{REPO}/commit/{repository.branches['main']}"
    assert set(repository.files()) == {".gitattributes", "README.md", "model.safetensors"}
    assert len(repository.commits) == 2, "the hub's own first commit, and one with everything"

    loaded_model, loaded = rv.from_hub(REPO)
    assert loaded_model == model
    assert_same_bits(variables, loaded)
    info = rv.inspect_weights(ADDRESS)
    assert (info.family, info.preprocessing, info.class_names) == ("native", PREPROCESSING, NAMES)
    assert (info.deploy, info.num_batches_tracked) == (deploy, 77)


def test_the_page_describes_the_net_and_how_to_load_it(account):
    model, variables = small_net()
    metrics = {"top1": 0.9889, "top5": 1.0, "calibration error": 0.01}
    described: dict[str, Any] = dict(preprocessing=PREPROCESSING, class_names=NAMES, license="apache-2.0")
    described["dataset"] = "my: digits"
    rv.push_to_hub(REPO, model, variables, metrics=metrics, **described)
    page = page_of(account)
    card: Any = ModelCard(page)
    data = yaml.safe_load(page.split("---\n")[1])
    assert data["library_name"] == "repvgg-jax"
    assert data["license"] == card.data.license == "apache-2.0"
    assert data["pipeline_tag"] == "image-classification"
    assert data["tags"] == ["image-classification", "repvgg", "jax", "flax"]
    results = {r.metric_name: (r.metric_type, r.metric_value, r.dataset_name) for r in card.data.eval_results}
    assert results == {
        "top1": ("accuracy", 0.9889, "my: digits"),
        "top5": ("top-5 accuracy", 1.0, "my: digits"),
        "calibration error": ("calibration error", 0.01, "my: digits"),
    }
    assert "Small" in page
    assert "training form, 3 classes (dahlia, pagoda: a tower, ünïcode)" in page
    assert "48 pixels, centre crop 0.9, mean 0.5, 0.4, 0.3, std 0.25, 0.2, 0.15" in page
    assert "| top1 | 0.9889 |" in page

    (code,) = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    assert len([line for line in code.splitlines() if line]) == 3
    names: dict[str, Any] = {}
    exec(code, names)
    logits = names["predict"](np.zeros((1, 48, 48, 3), np.float32))
    assert logits.shape == (1, 3)


def test_without_licence_and_metrics_the_page_states_none(account):
    rv.push_to_hub(REPO, *small_net())
    data = yaml.safe_load(page_of(account).split("---\n")[1])
    assert set(data) == {"library_name", "pipeline_tag", "tags"}


def test_timm_loads_its_copy(account, tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    model = rv.create_model("RepVGG-A0", 3)
    variables = random_variables(model)
    rv.push_to_hub(
        REPO, model, variables, preprocessing=PREPROCESSING, class_names=NAMES, num_batches_tracked=9, timm=True
    )
    files = account.repositories[REPO].files()
    assert set(files) == {".gitattributes", "README.md", "config.json", "model.safetensors", "timm.safetensors"}
    assert f'`timm.create_model("hf-hub:{REPO}", pretrained=True)`' in files["README.md"].decode()
    assert_same_bits(variables, rv.from_hub(REPO)[1])

    theirs = timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()
    with torch.no_grad():
        logits = theirs(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2))).numpy()
    assert relative_difference(logits, jax.jit(model.apply)(variables, IMAGES)) <= 1e-5
    assert theirs.state_dict()["stem.conv_kxk.bn.num_batches_tracked"] == 9
    assert tuple(theirs.pretrained_cfg["label_names"]) == NAMES
    data = timm.data.resolve_model_data_config(theirs)
    assert (list(data["input_size"]), data["interpolation"]) == ([3, 48, 48], "bilinear")
    assert (tuple(data["mean"]), tuple(data["std"])) == (PREPROCESSING.mean, PREPROCESSING.std)
    assert (data["crop_pct"], data["crop_mode"]) == (0.9, "center")


def test_the_copy_for_timm_has_the_same_config_as_timms_own(account):
    timm = pytest.importorskip("timm")
    model = rv.create_model("RepVGG-A0", 3)
    rv.push_to_hub(REPO, model, random_variables(model), timm=True)
    ours = json.loads(account.repositories[REPO].files()["config.json"])
    theirs = timm.get_pretrained_cfg("repvgg_a0").to_dict()
    built = timm.create_model("repvgg_a0", num_classes=3)
    assert (ours["num_features"], ours["global_pool"]) == (built.num_features, built.global_pool)
    skipped = {"hf_hub_filename", "custom_load", "num_classes", "fixed_input_size"}
    for key, value in ours["pretrained_cfg"].items():
        if key not in skipped:
            assert json.dumps(value) == json.dumps(theirs[key]), key


def test_a_net_for_grey_images_loads_in_timm_too(account):
    timm = pytest.importorskip("timm")
    model = rv.create_model("RepVGG-A0", 3)
    variables = random_variables(model, in_channels=1)
    rv.push_to_hub(REPO, model, variables, timm=True)
    theirs = timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()
    with torch.no_grad():
        logits = theirs(torch.from_numpy(IMAGES[..., :1].transpose(0, 3, 1, 2))).numpy()
    assert relative_difference(logits, jax.jit(model.apply)(variables, IMAGES[..., :1])) <= 1e-5


def test_nets_that_timm_cannot_build_are_refused_before_anything_is_sent(account):
    for model, words in (
        (rv.create_model(SMALL, 3), "timm cannot build Small, which is not one of its variants"),
        (rv.create_model("RepVGG-A0", 3, deploy=True), "builds only the training form"),
        (rv.create_model("RepVGG-A0", 3, epsilon=1e-3), "timm cannot build RepVGG-A0, with non-default options"),
    ):
        with pytest.raises(rv.WeightsError, match=words):
            rv.push_to_hub(REPO, model, random_variables(model), timm=True)
    assert not account.requests


def test_a_push_without_the_copy_for_timm_removes_the_previous_one(account):
    model = rv.create_model("RepVGG-A0", 3)
    rv.push_to_hub(REPO, model, random_variables(model), timm=True)
    rv.push_to_hub(REPO, *small_net())
    assert set(account.repositories[REPO].files()) == {".gitattributes", "README.md", "model.safetensors"}


def test_a_page_is_rewritten_unless_the_user_wrote_it(account):
    rv.push_to_hub(REPO, *small_net(), metrics={"top1": 0.5})
    rv.push_to_hub(REPO, *small_net(1), metrics={"top1": 0.6})
    assert "| top1 | 0.6 |" in page_of(account)
    repository = account.repositories[REPO]
    mine = page_of(account).replace(MARK, "My own words.")
    repository.commit(repository.files() | {"README.md": mine.encode()})
    rv.push_to_hub(REPO, *small_net(2), metrics={"top1": 0.7})
    assert page_of(account) == mine
    assert_same_bits(small_net(2)[1], rv.from_hub(REPO)[1])


def test_branches_commits_and_private_repositories_work(account, monkeypatch, tmp_path):
    rv.push_to_hub(REPO, *small_net(), private=True)
    first = account.repositories[REPO].branches["main"]
    rv.push_to_hub(REPO, *small_net(1), revision="longer")
    rv.push_to_hub(REPO, *small_net(2), revision="longer")
    rv.push_to_hub(REPO, *small_net(3))
    for revision, seed in ((None, 3), ("main", 3), ("longer", 2), (first, 0)):
        assert_same_bits(small_net(seed)[1], rv.from_hub(REPO, revision=revision)[1])
    assert account.repositories[REPO].private
    with pytest.raises(rv.WeightsError, match=f"{REPO} has no such revision"):
        rv.from_hub(REPO, revision="none")
    monkeypatch.delenv("HF_TOKEN")
    use_endpoint(monkeypatch, account.url, str(tmp_path / "another-cache"))
    with pytest.raises(
        rv.WeightsError, match="or the token of HF_TOKEN or `hf auth login` is missing or may not see it"
    ):
        rv.from_hub(REPO)


def test_class_counts_and_variants_are_treated_as_by_load_weights(account):
    rv.push_to_hub(REPO, *small_net())
    with pytest.warns(UserWarning, match="the classifier is newly initialised") as caught:
        model, _ = rv.from_hub(REPO, num_classes=5)
    assert caught[0].filename == __file__
    assert model.num_classes == 5
    with pytest.raises(rv.WeightsError, match="holds Small, not RepVGG-A0"):
        rv.from_hub(REPO, "RepVGG-A0")


def pushing(**options) -> str:
    """Return the one-line error of a push."""
    with pytest.raises(rv.WeightsError) as caught:
        rv.push_to_hub(options.pop("repo", REPO), *options.pop("net", small_net()), **options)
    assert "\n" not in f"{caught.value}"
    return f"{caught.value}"


def test_an_impossible_push_is_one_line_and_sends_nothing(account):
    for repo in ("flowers", "a/b/c", "a b/c", "", "hf://me/flowers"):
        assert "is not a repository name; expected OWNER/REPOSITORY" in pushing(repo=repo)
    assert "metrics must be names with finite numbers, not top1: nan" in pushing(metrics={"top1": float("nan")})
    assert "metrics must be names with finite numbers, not top1: '1'" in pushing(metrics={"top1": "1"})
    assert "metrics must be names" in pushing(metrics={"a|b": 1})
    assert "dataset must be a name" in pushing(dataset="two\nlines")
    assert "message must say something" in pushing(message=" ")
    assert "2 class names for a model of 3 classes" in pushing(class_names=("a", "b"))
    assert "variables" in pushing(net=(small_net()[0], {}))
    assert not account.requests


def test_the_hubs_refusals_of_a_push_are_one_line(account, monkeypatch, tmp_path):
    from huggingface_hub import constants

    account.fault = refusal(403, "", "You don't have the rights to create a model under the namespace me")
    assert f"cannot push to {REPO}: {account.url} refuses it (403): the token of HF_TOKEN" in pushing()
    account.fault = lambda method, path: refusal(500)(method, path) if "/commit/" in path else None
    assert f"cannot push to {REPO}: {account.url} answered 500" in pushing()
    assert set(account.repositories[REPO].files()) == {".gitattributes"}
    account.fault = lambda method, path: refusal(403)(method, path) if path.startswith("/lfs/") else None
    assert "refuses it (403)" in pushing(net=small_net(1))
    account.fault = lambda method, path: None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pushing() == f"cannot push to {REPO}: HF_HUB_OFFLINE is set"
    use_endpoint(monkeypatch, "http://127.0.0.1:9", str(tmp_path))
    assert f"cannot push to {REPO}: the connection to http://127.0.0.1:9 failed (" in pushing()
    monkeypatch.delenv("HF_TOKEN")
    use_endpoint(monkeypatch, account.url, str(tmp_path))
    assert "or the token of HF_TOKEN or `hf auth login` is missing or may not see it" in pushing()


def test_without_huggingface_hub_the_error_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "push_to_hub needs huggingface_hub: pip install -e '.[hub]'" in pushing()
    with pytest.raises(rv.WeightsError, match=r"hf://RepVGG-A0 needs huggingface_hub: pip install -e '.\[hub\]'"):
        rv.load_pretrained("RepVGG-A0")
