"""Claim: what a file in a foreign format cannot store is reported, written to a side file, and read back with it."""

import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

import repvgg_jax as rv
from repvgg_jax.weights import WeightsWarning
from repvgg_jax.weights.options import WeightsOptions
from tests.helpers.commands import command, convert, error_of
from tests.helpers.random_weights import random_variables
from tests.helpers.weight_files import assert_same_bits

SMALL = rv.Variant((1, 1, 1, 1), (8, 8, 8, 16, 16))
NAMES = tuple("0123456789")
GREY = rv.Preprocessing(32, 1.0, (0.3053,), (0.3783,))
COLOUR = rv.Preprocessing(48, 0.9, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
FAMILIES = {"w.pth": None, "w.safetensors": "timm", "w.pt": "mmpretrain"}
SAID = ("--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.25", "0.3", "--image-size", "48", "--crop-fraction", "0.9")

pytestmark = pytest.mark.filterwarnings("ignore:.*is not a published variant:repvgg_jax.weights.WeightsWarning")


def net(channels: int = 3, **options):
    model = rv.create_model(SMALL, 10, deploy=True, **options)
    return model, random_variables(model, in_channels=channels)


@pytest.fixture
def native(tmp_path) -> Path:
    """A native file with everything that foreign formats cannot store."""
    rv.save_weights(tmp_path / "native.safetensors", *net(), preprocessing=COLOUR, class_names=NAMES)
    return tmp_path / "native.safetensors"


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_preprocessing_names_and_options_are_restored(name, family, tmp_path):
    model, variables = net(activation="silu", strides=(1, 2, 2, 2, 2))
    with pytest.warns(
        WeightsWarning, match=r"cannot hold strides \(1, 2, 2, 2, 2\), activation silu, image_size, crop_fraction, mean"
    ):
        rv.save_weights(tmp_path / name, model, variables, family=family, preprocessing=COLOUR, class_names=NAMES)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.json"]
    info = rv.inspect_weights(tmp_path / name)
    assert (info.preprocessing, info.class_names, info.variant) == (COLOUR, NAMES, model.variant)
    loaded, loaded_variables = rv.load_weights(tmp_path / name)
    assert loaded == model
    assert_same_bits(variables, loaded_variables)


def test_an_activation_function_must_be_given(tmp_path):
    model, variables = net(activation=jax.nn.celu)
    with pytest.warns(WeightsWarning, match="cannot hold activation celu"):
        rv.save_weights(tmp_path / "w.pth", model, variables)
    with pytest.raises(rv.WeightsError, match="activation is a Python function, which a file cannot hold; pass load_w"):
        rv.load_weights(tmp_path / "w.pth")
    assert rv.load_weights(tmp_path / "w.pth", model.variant)[0] == model


def test_no_side_file_is_written_if_the_file_stores_everything(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rv.save_weights(tmp_path / "w.pth", *net())
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_a_side_file_applies_only_to_its_own_weights(tmp_path):
    model, variables = net()
    path = tmp_path / "w.pth"
    with pytest.warns(WeightsWarning, match="cannot hold"):
        rv.save_weights(path, model, variables, preprocessing=COLOUR)
    state = torch.load(path, weights_only=True)
    state["linear.bias"] += 1  # as if trained further by another script and saved under the old name
    torch.save(state, path)
    with pytest.warns(WeightsWarning, match=r"w\.pth\.json is ignored: it was written for another file"):
        rv.load_weights(path)
    assert rv.inspect_weights(path).preprocessing == rv.Preprocessing()
    # They stay together if both are moved.
    with pytest.warns(WeightsWarning, match="cannot hold"):
        rv.save_weights(path, model, variables, preprocessing=COLOUR)
    for suffix in ("", ".json"):
        (tmp_path / f"w.pth{suffix}").rename(tmp_path / f"moved.pth{suffix}")
    assert rv.inspect_weights(tmp_path / "moved.pth").preprocessing == COLOUR
    # Saving again with nothing to store updates our side file.
    rv.save_weights(tmp_path / "moved.pth", model, variables)
    assert rv.inspect_weights(tmp_path / "moved.pth").preprocessing == rv.Preprocessing()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is ignored")
        rv.load_weights(tmp_path / "moved.pth")


@pytest.mark.parametrize("content", ['{"architecture": "repvgg_a0"}', "no json", "[1, 2]", '{"repvgg_jax": 3}'])
def test_an_unrelated_json_file_is_neither_read_nor_replaced(content, native, tmp_path):
    (tmp_path / "w.pth.json").write_text(content, encoding="utf-8")
    message = error_of(convert(native, tmp_path / "w.pth", "--overwrite"))
    assert "w.pth.json, which is to hold what" in message
    assert (tmp_path / "w.pth.json").read_text(encoding="utf-8") == content
    assert not (tmp_path / "w.pth").exists()
    rv.save_weights(tmp_path / "w.pth", *net())  # with nothing to store, nothing is in the way
    assert rv.inspect_weights(tmp_path / "w.pth").preprocessing == rv.Preprocessing()
    assert (tmp_path / "w.pth.json").read_text(encoding="utf-8") == content


def test_a_damaged_side_file_is_reported(native, tmp_path):
    assert convert(native, tmp_path / "w.pth").returncode == 0
    sound = json.loads((tmp_path / "w.pth.json").read_text(encoding="utf-8"))
    sound["repvgg_jax"]["preprocessing"]["std"] = [0, 0, 0]
    (tmp_path / "w.pth.json").write_text(json.dumps(sound), encoding="utf-8")
    assert "w.pth.json, which belongs to" in error_of(convert("--inspect", tmp_path / "w.pth"))
    (tmp_path / "w.pth.json").write_text('{"repvgg_jax": {', encoding="utf-8")
    with pytest.warns(WeightsWarning, match=r"w\.pth\.json cannot be read and is ignored"):
        rv.load_weights(tmp_path / "w.pth")


def test_convert_reports_what_goes_to_the_side_file_and_inspect_shows_it(native, tmp_path):
    done = convert(native, tmp_path / "w.pth")
    assert done.returncode == 0
    assert "w.pth cannot hold image_size, crop_fraction, mean, std, class_names: written to" in done.stderr
    shown = convert("--inspect", tmp_path / "w.pth").stdout
    images = "images: 48 pixels, centre crop 0.9 of the shorter side resized to 53"
    assert f"{images}, mean 0.5, 0.4, 0.3, std 0.2, 0.25, 0.3" in shown
    assert f"class names: {', '.join(NAMES)}" in shown
    # And back, without any loss.
    assert convert(tmp_path / "w.pth", tmp_path / "again.safetensors").returncode == 0
    info, before = rv.inspect_weights(tmp_path / "again.safetensors"), rv.inspect_weights(native)
    assert info == before


def test_the_digits_evaluate_the_same_from_every_format(tmp_path):
    rv.save_weights(tmp_path / "w.safetensors", *net(1), preprocessing=GREY, class_names=NAMES)
    assert convert(tmp_path / "w.safetensors", tmp_path / "w.pth").returncode == 0

    def evaluation(path: Path, *options: str) -> dict[str, float]:
        arguments = ("digits", "deploy", path, "--data-dir", tmp_path / "data", *options)
        done = command("train.evaluate", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    expected = evaluation(tmp_path / "w.safetensors")
    assert evaluation(tmp_path / "w.pth") == expected
    (tmp_path / "w.pth.json").unlink()
    options_given = ("--mean", "0.3053", "--std", "0.3783", "--image-size", "32", "--crop-fraction", "1")
    assert rv.inspect_weights(tmp_path / "w.pth").preprocessing != GREY
    assert evaluation(tmp_path / "w.pth", *options_given, "--class-names", *NAMES) == expected


def test_predict_has_options_for_what_a_file_does_not_store(native, tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    rv.save_weights(tmp_path / "w.pth", *rv.load_weights(native))
    answers = [
        command("repvgg_jax.__main__", "predict", path, tmp_path / "a.png", *options).stdout
        for path, options in (
            (native, ()),
            (tmp_path / "w.pth", (*SAID, "--class-names", tmp_path / "names.txt")),
        )
    ]
    assert answers[0]
    assert answers[1] == answers[0]


def test_class_names_are_given_as_words_or_as_a_file(native, tmp_path):
    info = rv.inspect_weights(native)
    names = tuple(f"a {number}" for number in range(10))
    for file, text in (("n.json", json.dumps(names)), ("n.txt", "\n".join(names) + "\n\n")):
        (tmp_path / file).write_text(text, encoding="utf-8")
        assert WeightsOptions(class_names=(str(tmp_path / file),)).apply(info).class_names == names
    assert WeightsOptions(class_names=names).apply(info).class_names == names
    assert WeightsOptions().apply(info) == info


def test_convert_writes_the_given_preprocessing_and_names(tmp_path):
    rv.save_weights(tmp_path / "w.pth", *net())
    done = convert(tmp_path / "w.pth", tmp_path / "told.safetensors", *SAID, "--class-names", *NAMES)
    assert done.returncode == 0, done.stderr
    info = rv.inspect_weights(tmp_path / "told.safetensors")
    assert (info.preprocessing, info.class_names) == (COLOUR, NAMES)
    names = ("a", "b", "c")
    convert(tmp_path / "w.pth", tmp_path / "fresh.safetensors", "--num-classes", "3", "--class-names", *names)
    assert rv.inspect_weights(tmp_path / "fresh.safetensors").class_names == names


def test_an_invalid_option_is_one_line(native, tmp_path):
    (tmp_path / "bad.json").write_text("[1, 2", encoding="utf-8")
    out = tmp_path / "out.safetensors"
    for options, words in (
        (("--mean", "0.5"), "--mean needs one number for each of 3 channels, not 1"),
        (("--std", "0.5", "0", "0.5"), "std must be positive"),
        (("--mean", "0", "nan", "0"), "--mean must be finite, not 0.0 nan 0.0"),
        (("--image-size", "0"), "--image-size must be at least 1"),
        (("--crop-fraction", "1.5"), "--crop-fraction must be above 0 and at most 1"),
        (("--class-names", "a", "b"), "--class-names gives 2 names for 10 classes"),
        (("--class-names", "~nobody/x"), "gives 1 name for 10 classes; there is no file called ~nobody/x"),
        (("--class-names", "x" * 300), "gives 1 name for 10 classes; there is no file called"),
        (("--class-names", tmp_path / "bad.json"), "cannot read --class-names"),
    ):
        assert words in error_of(convert(native, out, *options))
    assert not out.exists()
