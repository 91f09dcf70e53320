"""Claim: anything that is not a weight file, or not a net's variables, is named in one line."""

from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest

import repvgg_jax as rv
from tests.helpers.commands import convert, error_of
from tests.helpers.weight_files import TINY, assert_same_bits, random_model, refused

SMALL = rv.Variant((1, 1, 1, 1), (4, 4, 4, 4, 8), image_size=32)


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    """Real exports by suffix, and a folder like a SavedModel."""
    folder = tmp_path_factory.mktemp("exports")
    net = random_model(SMALL, deploy=True)
    rv.export_onnx(folder / "d.onnx", *net)
    rv.export_stablehlo(folder / "d.stablehlo", *net)
    (folder / "d.savedmodel").mkdir()
    (folder / "d.savedmodel" / "saved_model.pb").write_bytes(b"")
    return {path.suffix: path for path in folder.iterdir()}


def test_an_export_is_recognised_whatever_its_name(exports, tmp_path):
    for suffix, words in (
        (".onnx", "an ONNX export, for another runtime, not weights"),
        (".stablehlo", "a StableHLO export (jax.export), for another runtime, not weights"),
        (".savedmodel", "is a SavedModel, an export for TensorFlow"),
    ):
        assert words in error_of(convert("--inspect", exports[suffix]))
        if suffix != ".savedmodel":
            (tmp_path / "w.bin").write_bytes(exports[suffix].read_bytes())
            assert words in refused(tmp_path / "w.bin")
    (tmp_path / "page.pth").write_text("<html>", encoding="utf-8")
    assert "a web page" in refused(tmp_path / "page.pth")


@pytest.mark.parametrize("url", ["https://example.com/RepVGG-A0-train.pth", "http://x/y", "abfss://bucket/w.pth"])
def test_urls_are_not_fetched(url, tmp_path):
    assert f"{url} is not fetched: download it first" in refused(url)
    assert "is not fetched" in error_of(convert(url, tmp_path / "out.pth"))
    assert "is not fetched" in error_of(convert("--inspect", url))


def test_a_tilde_is_the_home_folder_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    net = random_model(SMALL, deploy=True)
    rv.save_weights("~/w.safetensors", *net)
    rv.save_weights("~/timm.safetensors", *net, family="timm", preprocessing=rv.Preprocessing(48))
    assert_same_bits(net[1], rv.load_weights("~/w.safetensors")[1])
    assert rv.inspect_weights("~/timm.safetensors").preprocessing.image_size == 48
    rv.export_stablehlo("~/w.stablehlo", *net)
    rv.export_onnx("~/w.onnx", *net)
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)
    rv.save_quantized("~/int8.safetensors", rv.quantize(*net, images, "naive"))
    assert rv.load_quantized("~/int8.safetensors").variant == SMALL
    assert convert("~/w.safetensors", "~/out.pth").returncode == 0
    assert "exists already" in error_of(convert("~/w.safetensors", "~/out.pth"))
    assert "is the same file as" in error_of(convert("~/w.safetensors", tmp_path / "w.safetensors", "--overwrite"))
    names = {"w.safetensors", "timm.safetensors", "timm.safetensors.json", "w.stablehlo", "w.onnx", "int8.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} >= names | {"out.pth"}
    assert not (tmp_path / "~").exists()


def test_variables_of_something_else_are_refused(tmp_path):
    model, variables = random_model(TINY)
    deploy_model, deploy_variables = random_model(TINY, deploy=True)
    other = random_model(rv.Variant((1, 1, 1, 1), (4, 4, 4, 4, 8)))[1]
    text = jax.tree.map(lambda leaf: leaf, variables)
    text["params"]["linear"]["bias"] = "many"
    flat = jax.tree.map(lambda leaf: leaf, variables)
    flat["params"]["stage0"]["rbr_dense"]["conv"]["kernel"] = np.zeros(3, np.float32)
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pth"):
        for wrong, words in (
            (other, "does not fit the model; missing: params/stage1_1"),
            (deploy_variables, "missing: params/stage0/rbr_dense/conv/kernel"),
            (variables["params"], 'must be a dict with "params", as model.init gives, not stage0'),
            ({}, "not an empty one"),
            (None, "not a NoneType"),
            (np.zeros(3), "not a ndarray"),
            ({"params": 3}, "must be a dict"),
            ({"params": {}}, "missing: params/stage0"),
            (text, "params/linear/bias has <U4 values, not floats"),
            (flat, "params/stage0/rbr_dense/conv/kernel is [3], not [3, 3, 3, 8]"),
        ):
            with pytest.raises(rv.WeightsError) as caught:
                rv.save_weights(path, model, cast(Any, wrong))
            assert words in str(caught.value)
            assert "\n" not in str(caught.value)
        with pytest.raises(rv.WeightsError, match="missing: params/stage0/rbr_reparam/kernel"):
            rv.save_weights(path, deploy_model, variables)
        with pytest.raises(rv.WeightsError, match="writes a RepVGG, not a dict"):
            rv.save_weights(path, cast(Any, variables), cast(Any, model))
    assert not list(tmp_path.iterdir())


def test_inspect_shows_classes_and_preprocessing(tmp_path):
    names = tuple(f"class {number}" for number in range(12))
    model, variables = random_model(SMALL, num_classes=12)
    preprocessing = rv.Preprocessing(40, 0.8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    rv.save_weights(tmp_path / "w.safetensors", model, variables, preprocessing=preprocessing, class_names=names)
    shown = convert("--inspect", tmp_path / "w.safetensors").stdout.splitlines()
    images = "images: 40 pixels, centre crop 0.8 of the shorter side resized to 50"
    assert shown[1] == f"{images}, mean 0.1, 0.2, 0.3, std 0.4, 0.5, 0.6 (of pixel values in 0..1)"
    assert shown[2] == f"class names: {', '.join(names[:10])}, and 2 more"
    rv.save_weights(tmp_path / "bare.safetensors", model, variables)
    assert convert("--inspect", tmp_path / "bare.safetensors").stdout.splitlines()[2] == "class names: not in the file"
