"""Claim: published weights load from the hub by a variant's name, completely or not at all; failures are one line."""

import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import repvgg_jax as rv
from repvgg_jax.weights.info import WeightsWarning
from repvgg_jax.weights.key_maps import TIMM
from repvgg_jax.weights.pretrained import PRETRAINED, find_pretrained
from repvgg_jax.weights.state_dict import items
from tests.helpers.hub import TOKEN, refusal, use_endpoint
from tests.helpers.random_weights import random_variables
from tests.helpers.repository import ROOT
from tests.helpers.weight_files import assert_same_bits

NAME, REPOSITORY = "RepVGG-A0", "timm/repvgg_a0.rvgg_in1k"
PINNED, PINNED_REPOSITORY = "RepVGG-A2", "timm/repvgg_a2.rvgg_in1k"
IMAGES = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)


@pytest.fixture
def small(monkeypatch) -> rv.Variant:
    """A small net under the names of two variants, for tests in which the values do not matter."""
    from repvgg_jax.net.variants import VARIANTS

    variant = rv.Variant((1, 1, 2, 1), (8, 8, 8, 16, 20), name=NAME)
    for name in (NAME, PINNED):
        monkeypatch.setitem(VARIANTS, name, dataclasses.replace(variant, name=name))
    return variant


def timm_file(folder: Path, name: str = NAME, num_classes: int = 1000):
    """Return timm's file of a variant with random weights, its model and its variables."""
    model = rv.create_model(name, num_classes)
    variables = random_variables(model)
    rv.save_weights(folder / "timm.safetensors", model, variables, family="timm")
    return (folder / "timm.safetensors").read_bytes(), model, variables


def refused(name: str = NAME) -> str:
    """Return the one-line error for a variant."""
    with pytest.raises(rv.WeightsError) as caught:
        rv.load_pretrained(name)
    assert "\n" not in f"{caught.value}"
    return f"{caught.value}"


def leftovers(folder: Path) -> list[str]:
    """Return the files in the hub's cache that hold data: no links, locks and references."""
    return [path.name for path in folder.glob("hub-cache/models--*/blobs/*")]


def test_the_logits_equal_those_of_the_original_net(fake_hub, tmp_path):
    content, model, variables = timm_file(tmp_path)
    fake_hub.add(REPOSITORY, {"model.safetensors": content, "config.json": b'{"architecture": "repvgg_a0"}'})
    loaded_model, loaded = rv.load_pretrained("repvgg-a0")
    assert loaded_model == model == rv.create_model(NAME)
    assert_same_bits(variables, loaded)
    logits = jax.jit(model.apply)
    np.testing.assert_array_equal(logits(variables, IMAGES), logits(loaded, IMAGES))
    assert np.abs(logits(loaded, IMAGES)).max() > 0.1

    assert_same_bits(loaded, rv.load_weights("hf://RepVGG-A0")[1])
    assert rv.inspect_weights("hf://RepVGG-A0").preprocessing == rv.Preprocessing()
    assert fake_hub.downloads("model.safetensors") == 1, "later loads use the cache"


def test_another_class_count_gets_a_new_classifier(fake_hub, small, tmp_path):
    content, _, variables = timm_file(tmp_path)
    fake_hub.add(REPOSITORY, {"model.safetensors": content})
    with pytest.warns(WeightsWarning, match="has 1000 classes, not 7: the classifier is newly initialised") as caught:
        model, loaded = rv.load_pretrained(NAME, num_classes=7)
    assert caught[0].filename == __file__
    assert model.num_classes == 7
    assert loaded["params"]["linear"]["kernel"].shape == (20, 7)
    assert_same_bits({"stage0": variables["params"]["stage0"]}, {"stage0": loaded["params"]["stage0"]})
    with pytest.raises(ValueError, match="num_classes"):
        rv.load_pretrained(NAME, num_classes=0)


def test_the_cache_works_offline_whether_filled_by_us_or_by_timm(fake_hub, small, tmp_path, monkeypatch):
    from huggingface_hub import constants

    content, _, variables = timm_file(tmp_path)
    for name, repository in ((NAME, REPOSITORY), (PINNED, PINNED_REPOSITORY)):
        fake_hub.add(repository, {"model.safetensors": content})
        _cache_as_timm(repository)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        before = len(fake_hub.requests)
        if name == NAME:
            _, loaded = rv.load_pretrained(name)
        else:
            with pytest.warns(WeightsWarning, match="revision dc6dcc7 of .* is not available; main is used instead"):
                _, loaded = rv.load_pretrained(name)
        assert_same_bits(variables, loaded)
        assert len(fake_hub.requests) == before
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def _cache_as_timm(repository: str) -> None:
    """Put a repository's file into the cache as timm does, without a pinned revision."""
    from huggingface_hub import hf_hub_download

    assert Path(hf_hub_download(repository, "model.safetensors")).is_symlink()


def test_the_tables_revision_is_used_if_there_is_one(fake_hub, small, tmp_path):
    content, _, variables = timm_file(tmp_path, PINNED)
    fake_hub.add(PINNED_REPOSITORY, {"model.safetensors": content}, commit=find_pretrained(PINNED).revision)
    fake_hub.add(PINNED_REPOSITORY, {"model.safetensors": b"something newer"})
    assert_same_bits(variables, rv.load_pretrained(PINNED)[1])


def test_without_that_revision_main_is_used_with_a_warning(fake_hub, small, tmp_path):
    content, _, variables = timm_file(tmp_path, PINNED)
    fake_hub.add(PINNED_REPOSITORY, {"model.safetensors": content})
    with pytest.warns(WeightsWarning, match="revision dc6dcc7 of .* is not available; main is used instead"):
        _, loaded = rv.load_pretrained(PINNED)
    assert_same_bits(variables, loaded)


def test_a_variant_without_weights_on_the_hub_points_to_the_authors(fake_hub):
    for name in set(rv.list_models()) - set(PRETRAINED):
        message = refused(name)
        assert f"no weights of {name} on the Hugging Face hub" in message
        assert "linked from https://github.com/DingXiaoH/RepVGG: download one" in message
    assert not fake_hub.requests
    with pytest.raises(rv.UnknownModelError, match="did you mean RepVGG-A0"):
        rv.load_pretrained("RepVGG-A00")


def test_the_hubs_refusals_are_distinguished(fake_hub, small, tmp_path, monkeypatch):
    where = fake_hub.url
    assert refused().endswith(" is missing or may not see it")
    assert f"{where} has no repository {REPOSITORY}, or the token of HF_TOKEN or `hf auth login`" in refused()
    content, _, variables = timm_file(tmp_path)
    repository = fake_hub.add(REPOSITORY, {"other.safetensors": content})
    assert refused().endswith(f"(model.safetensors): {REPOSITORY} has no such file")
    fake_hub.fault = refusal(403, "GatedRepo", "Access to this model is restricted")
    assert f"is restricted: request it at {where}/{REPOSITORY}" in refused()
    fake_hub.fault = refusal(403, "", "Forbidden")
    assert (
        f"{where} refuses it (403): the token of HF_TOKEN or `hf auth login` is missing, wrong or may not" in refused()
    )
    fake_hub.fault = refusal(401, "", "Invalid credentials in Authorization header")
    assert f"{where} refuses it (401)" in refused()
    fake_hub.fault = refusal(418, "", "I am a teapot")
    assert f"{where} answered 418: I am a teapot" in refused()

    fake_hub.fault = lambda method, path: None
    repository.private = True
    repository.commit({"model.safetensors": content})
    assert "has no repository" in refused()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_same_bits(variables, rv.load_pretrained(NAME)[1])


def test_offline_without_the_file_says_so(fake_hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused().endswith(f": HF_HUB_OFFLINE is set, and the cache ({tmp_path / 'hub-cache'}) does not have it")
    assert not fake_hub.requests


def test_an_unreachable_hub_says_so_once(fake_hub, tmp_path, monkeypatch, caplog):
    use_endpoint(monkeypatch, "http://127.0.0.1:9", str(tmp_path / "hub-cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # no waiting between huggingface_hub's attempts
    message = refused()
    assert "http://127.0.0.1:9 cannot be reached (" in message
    assert f"and the cache ({tmp_path / 'hub-cache'}) does not have it; download the file from " in message
    assert "from http://127.0.0.1:9/timm/repvgg_a0.rvgg_in1k on a machine with internet access" in message
    assert caplog.records == []


@pytest.mark.parametrize(("name", "sent"), [("cut short", lambda c: c[:-99]), ("changed", lambda c: c[:-1] + b"\x7f")])
def test_a_corrupted_download_leaves_no_files(name, sent, fake_hub, small, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # no waiting between huggingface_hub's attempts
    content, _, variables = timm_file(tmp_path)
    fake_hub.add(REPOSITORY, {"model.safetensors": content})
    fake_hub.sent = lambda path, content: sent(content)
    message = refused()
    assert "try again" in message
    assert not leftovers(tmp_path)
    fake_hub.sent = lambda path, content: content
    assert_same_bits(variables, rv.load_pretrained(NAME)[1])


def test_a_damaged_cached_file_is_named(fake_hub, small, tmp_path):
    content, _, _ = timm_file(tmp_path)
    fake_hub.add(REPOSITORY, {"model.safetensors": content})
    rv.load_pretrained(NAME)
    (blob,) = tmp_path.glob("hub-cache/models--*/blobs/*")
    blob.write_bytes(content[:-99])
    assert refused().endswith(f"; the cached copy is damaged: remove {blob} to download it again")
    blob.unlink()
    rv.load_pretrained(NAME)


def test_a_full_disk_says_so(fake_hub, small, tmp_path, monkeypatch):
    from huggingface_hub import file_download

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fake_hub.add(REPOSITORY, {"model.safetensors": timm_file(tmp_path)[0]})
    monkeypatch.setattr(file_download, "http_get", full)
    message = refused()
    assert f"the cache ({tmp_path / 'hub-cache'}) cannot be written: No space left on device" in message
    assert message.endswith("; HF_HUB_CACHE names another folder")
    assert not leftovers(tmp_path)


def test_endpoint_cache_and_token_come_from_the_environment(fake_hub, tmp_path):
    content, _, _ = timm_file(tmp_path)
    fake_hub.add(REPOSITORY, {"model.safetensors": content}).private = True
    script = (
        "import numpy as np, repvgg_jax as rv\n"
        "model, variables = rv.load_pretrained('RepVGG-A0')\n"
        "print(model.variant.name, float(np.asarray(variables['params']['linear']['bias']).sum()))"
    )
    environment = os.environ | {"HF_ENDPOINT": fake_hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    outputs = []
    for more in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment | more, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("RepVGG-A0 ")
    assert fake_hub.downloads("model.safetensors") == 1


def test_the_table_agrees_with_the_architectures_and_with_timm():
    for name, row in PRETRAINED.items():
        variant = rv.create_model(name).variant
        entries = items(TIMM, variant, False, 1000, 3)
        numbers = sum(8 if entry.leaf is None else 4 * int(np.prod(entry.file_shape)) for entry in entries)
        header = 100 * len(entries)
        assert numbers < row.megabytes * 1e6 + 5e5, name
        assert numbers + header > row.megabytes * 1e6 - 5e5, name
        published = variant.published
        assert published is not None
        if row.top1 is not None and published.top1 is not None:
            assert abs(row.top1 - published.top1) < 0.05, name


def test_timm_has_these_repositories_under_this_licence():
    from tests.helpers import torchvision_reference  # noqa: F401 (timm imports torchvision)

    timm = pytest.importorskip("timm")
    configs = {name: timm.get_pretrained_cfg(name) for name in timm.list_pretrained("repvgg_*")}
    theirs = {config.hf_hub_id: config.license for config in configs.values()}
    assert {row.repository: row.licence for row in PRETRAINED.values()} == theirs


def test_the_page_shows_the_table():
    rows = []
    for name, row in PRETRAINED.items():
        published = rv.create_model(name).variant.published
        repository = f"[{row.repository}](https://huggingface.co/{row.repository})"
        authors = published.top1 if published is not None else ""
        figures = f"{row.megabytes:g} | {row.top1 or ''} | {authors}"
        rows.append(f"| {name} | {repository} | {figures} | {row.licence} | {row.revision[:7]} |")
    assert "\n".join(rows) in (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
