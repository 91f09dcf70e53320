"""Claim: a conversion never costs a user a file: never its input, under any name, and no other file unless asked to."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

import repvgg_jax as rv
from convert import exports
from tests.helpers.commands import convert, error_of
from tests.helpers.random_weights import random_variables
from tests.helpers.weight_files import TINY, assert_same_bits

SMALL = dataclasses.replace(TINY, num_blocks=(1, 1, 1, 1), image_size=32)
CALIBRATE = ("--int8", "--method", "naive", "--calibration-images", "8", "--calibration")


@pytest.fixture
def source(tmp_path) -> Path:
    """A file in deploy form, which needs no fusing."""
    model = rv.create_model(SMALL, num_classes=5, deploy=True)
    rv.save_weights(tmp_path / "net.safetensors", model, random_variables(model))
    return tmp_path / "net.safetensors"


def names_of(source: Path) -> dict[str, str | Path]:
    """Return paths to one file, most of which differ from its path as text."""
    folder = source.parent
    (folder / "sub").mkdir()
    links = {"hard": folder / "hard.safetensors", "soft": folder / "soft.safetensors", "through": folder / "there"}
    os.link(source, links["hard"])
    links["soft"].symlink_to(source)
    links["through"].symlink_to(folder, target_is_directory=True)
    return {
        "itself": source,
        "detour": f"{folder}/sub/../{source.name}",
        "relative": os.path.relpath(source),
        "hard link": links["hard"],
        "link": links["soft"],
        "linked folder": links["through"] / source.name,
    }


def test_the_input_is_never_overwritten_under_any_name(source):
    before = source.read_bytes()
    for name, alias in names_of(source).items():
        for original, output in ((source, alias), (alias, source)):
            for options in ((), ("--overwrite",)):
                message = error_of(convert(original, output, *options))
                assert f"{output} is the same file as the input, {original}" in message, name
    assert source.read_bytes() == before


@pytest.mark.parametrize("output", ["out.safetensors", "out.pth", "out.onnx", "out.stablehlo", "int8.safetensors"])
def test_an_existing_file_is_replaced_only_on_request(output, source, tmp_path):
    (tmp_path / output).write_text("precious", encoding="utf-8")
    options = ()
    if output.startswith("int8"):
        from tests.helpers.photos import write_photos

        write_photos(tmp_path / "photos", 8)
        options = (*CALIBRATE, tmp_path / "photos")
    message = error_of(convert(source, tmp_path / output, *options))
    assert f"{output} exists already: choose another name, or replace it with --overwrite" in message
    assert (tmp_path / output).read_text(encoding="utf-8") == "precious"
    done = convert(source, tmp_path / output, *options, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / output).read_bytes().startswith(b"precious")


def test_a_broken_link_counts_as_an_existing_file(source, tmp_path):
    (tmp_path / "out.safetensors").symlink_to(tmp_path / "nowhere" / "w.safetensors")
    assert "exists already" in error_of(convert(source, tmp_path / "out.safetensors"))
    assert (tmp_path / "out.safetensors").is_symlink()


@pytest.fixture
def saved_model(monkeypatch):
    """A fake SavedModel export without TensorFlow: it writes a folder that holds the weights."""

    def write(path, model, variables, *, check, **_):
        Path(path).mkdir()
        (Path(path) / "saved_model.pb").write_bytes(b"new")
        check(Path(path))

    fake = dataclasses.replace(exports.SAVED_MODEL, write=write, check_installed=lambda: None)
    monkeypatch.setattr(exports, "SAVED_MODEL", fake)
    monkeypatch.setitem(exports.FORMATS, ".savedmodel", fake)
    return lambda run: monkeypatch.setitem(exports.FORMATS, ".savedmodel", dataclasses.replace(fake, run=run))


def test_a_saved_model_is_replaced_as_a_whole_and_only_on_request(source, tmp_path, saved_model, monkeypatch):
    same = {}

    def logits(model, variables, images):
        same["logits"] = np.ones((2, 5), np.float32)
        return same["logits"]

    monkeypatch.setattr(exports, "logits_of", logits)
    saved_model(lambda path, images: same["logits"])
    output = tmp_path / "net.savedmodel"
    output.mkdir()
    (output / "notes.txt").write_text("precious", encoding="utf-8")
    assert "exists already" in error_of(convert(source, output))
    assert "is not a SavedModel" in error_of(convert(source, output, "--overwrite"))
    assert (output / "notes.txt").read_text(encoding="utf-8") == "precious"
    (output / "saved_model.pb").write_bytes(b"old")
    before = sorted(tmp_path.iterdir())
    done = convert(source, output, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in output.iterdir()] == ["saved_model.pb"]
    assert (output / "saved_model.pb").read_bytes() == b"new"
    saved_model(lambda path, images: same["logits"] + 1)
    assert "differs from JAX" in error_of(convert(source, output, "--overwrite"))
    assert (output / "saved_model.pb").read_bytes() == b"new"
    assert sorted(tmp_path.iterdir()) == before


def test_a_new_name_needs_no_option(source, tmp_path):
    assert convert(source, tmp_path / "copy.safetensors").returncode == 0
    assert_same_bits(rv.load_weights(source)[1], rv.load_weights(tmp_path / "copy.safetensors")[1])
