"""Claim: `python -m convert --int8` writes a quantised file that every other command accepts, or says why not."""

import json
from unittest import mock

import numpy as np
import onnx
import pytest
from PIL import Image

import repvgg_jax as rv
from convert.calibration_images import calibration_images
from repvgg_jax.errors import DataWarning
from repvgg_jax.preprocess import normalize
from tests.helpers.commands import command, error_of
from tests.helpers.random_weights import random_variables

SMALL = rv.Variant((1, 1, 1, 1), (8, 8, 8, 16, 16), name="Small", image_size=32)
PREPROCESSING = rv.Preprocessing(image_size=32, crop_fraction=1.0)


@pytest.fixture
def folder(tmp_path):
    """A data set `data/{train,val}/{a,b}` of random pictures, and a net for it in `float.safetensors`."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                picture = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((40, 32))
                picture.save(tmp_path / "data" / split / name / f"{index}.png")
    model = rv.create_model(SMALL, 2)
    rv.save_weights(
        tmp_path / "float.safetensors",
        model,
        random_variables(model),
        preprocessing=PREPROCESSING,
        class_names=("a", "b"),
    )
    return tmp_path


def convert(folder, output: str, *options: object):
    return command("convert.__main__", folder / "float.safetensors", folder / output, "--int8", *options)


def test_a_quantised_file_is_written_evaluated_and_used_to_predict(folder):
    done = convert(folder, "int8.safetensors", "--calibration", folder / "data", "--method", "corrected", "--report")
    assert done.returncode == 0, done.stderr
    assert "INT8 (corrected) from 16 calibration images; signal-to-noise ratio: " in done.stdout
    assert "stage1_0 " in done.stdout
    info = rv.inspect_weights(folder / "int8.safetensors")
    assert (info.quantized, info.class_names, info.preprocessing) == (True, ("a", "b"), PREPROCESSING)

    done = command("train.evaluate", folder / "data", "deploy", folder / "int8.safetensors")
    net = rv.load_quantized(folder / "int8.safetensors")
    pixels = calibration_images(folder / "data" / "val", PREPROCESSING)
    assert json.loads(done.stdout.splitlines()[-1])["images"] == len(pixels) == 6
    predictions = np.asarray(net(normalize(pixels, PREPROCESSING))).argmax(-1)
    order = np.random.default_rng(0).permutation(6)  # the order in which they were read
    assert json.loads(done.stdout.splitlines()[-1])["top1"] == pytest.approx((predictions == order // 3).mean())

    done = command("repvgg_jax.__main__", "predict", folder / "int8.safetensors", folder / "data/val/a/0.png")
    assert "0.png: " in done.stdout
    assert "INT8 deploy form" in command("convert.__main__", "--inspect", folder / "int8.safetensors").stdout


def test_an_onnx_file_has_quantised_layers(folder):
    done = convert(folder, "int8.onnx", "--calibration", folder / "data", "--method", "naive", "--float-first")
    assert done.returncode == 0, done.stderr
    operators = [node.op_type for node in onnx.load(folder / "int8.onnx").graph.node]
    # The inputs of four of the five blocks, of the pool and of the classifier.
    assert operators.count("QuantizeLinear") == 6


def test_calibration_images_are_training_images_prepared_for_evaluation(folder):
    images = calibration_images(folder / "data", PREPROCESSING, 4)
    assert images.shape == (4, 32, 32, 3)
    assert images.dtype == np.uint8
    everything = calibration_images(folder / "data", PREPROCESSING)
    assert len(everything) == 16
    np.testing.assert_array_equal(images, everything[:4])
    digits = calibration_images("digits", rv.Preprocessing(32, 1.0, (0.3,), (0.4,)), 20)
    assert digits.shape == (20, 32, 32, 1)


@pytest.fixture
def partly_unreadable(folder):
    """The data set with two of its 17 training images unreadable: one too elongated, one not an image."""
    train = folder / "data" / "train"
    Image.new("RGB", (100_000, 1)).save(train / "a" / "3.png")
    (train / "deep" / "er").mkdir(parents=True)
    (train / "deep" / "er" / "x.jpg").write_bytes(b"no image")
    return train


def test_unreadable_calibration_images_are_named_counted_and_skipped(folder, partly_unreadable):
    with pytest.warns(DataWarning) as caught:
        images = calibration_images(folder / "data", PREPROCESSING, 100)
    assert len(images) == 15
    assert np.all(images.reshape(15, -1).std(1) > 0)
    *named, counted = [f"{warning.message}" for warning in caught]
    assert [words.split(":")[0] for words in named] == ["calibration image left out"] * 2
    assert sorted(name for words in named for name in ("3.png", "x.jpg") if name in words) == ["3.png", "x.jpg"]
    assert counted == "2 calibration images could not be read; 15 others are used"


@pytest.mark.usefixtures("partly_unreadable")
@pytest.mark.filterwarnings("ignore::repvgg_jax.errors.DataWarning")
def test_unreadable_calibration_images_are_replaced_by_others(folder):
    images = calibration_images(folder / "data", PREPROCESSING, 10)
    assert images.shape == (10, 32, 32, 3)


def test_the_command_calibrates_with_the_readable_images(folder, partly_unreadable):
    done = convert(folder, "int8.safetensors", "--calibration", folder / "data", "--method", "naive")
    assert done.returncode == 0, done.stderr
    assert "from 15 calibration images" in done.stdout
    assert done.stderr.count("calibration image left out: ") == 2
    assert f"{partly_unreadable / 'deep' / 'er' / 'x.jpg'}: cannot be read as an image" in done.stderr


def test_one_readable_image_is_too_few_and_the_unreadable_one_is_named(folder, partly_unreadable):
    for file in partly_unreadable.rglob("*.png"):
        file.unlink()
    Image.new("RGB", (32, 32)).save(partly_unreadable / "a" / "only.png")
    done = convert(folder, "none.safetensors", "--calibration", folder / "data", "--method", "naive")
    assert done.returncode == 2
    assert "x.jpg: cannot be read" in done.stderr  # the reason why there are too few
    assert "one image is too few to calibrate with" in done.stderr.splitlines()[-1]


def test_a_mistake_is_one_line_and_leaves_no_files(folder):
    source, data = folder / "float.safetensors", folder / "data"
    assert convert(folder, "int8.safetensors", "--calibration", data, "--method", "naive").returncode == 0
    (folder / "one").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "one" / "a.png")
    (folder / "broken").mkdir()
    (folder / "broken" / "a.png").write_bytes(b"no image")
    (folder / "empty").mkdir()
    gelu = folder / "gelu.safetensors"
    other = rv.create_model(SMALL, 2, activation="gelu")
    rv.save_weights(gelu, other, random_variables(other), preprocessing=PREPROCESSING)
    before = sorted(folder.iterdir())
    out, int8 = folder / "out.safetensors", folder / "int8.safetensors"
    quantize = ("--int8", "--calibration", data)
    for arguments, words in (
        ((source, out, "--int8"), "--int8 needs --calibration DATA"),
        ((source, out, "--calibration", data), "--calibration needs --int8"),
        ((source, out, "--float-last"), "--float-last needs --int8"),
        ((source, folder / "out.pth", *quantize), "quantised nets are .safetensors or .onnx files, not '.pth'"),
        ((source, out, *quantize, "--method", "best"), "unknown quantisation method 'best'"),
        ((source, out, *quantize, "--to", "timm"), "remove --keep-training-form and --to"),
        ((source, out, *quantize, "--calibration-images", "0"), "--calibration-images must be at least 1"),
        ((source, out, "--int8", "--calibration", folder / "one"), "one image is too few to calibrate with"),
        ((source, out, "--int8", "--calibration", folder / "empty"), "empty holds no images"),
        ((source, out, "--int8", "--calibration", folder / "nowhere"), "is not a folder"),
        ((source, out, "--int8", "--calibration", folder / "broken"), "a.png: cannot be read as an image"),
        ((int8, out, *quantize), "holds a quantised net (INT8), and float weights are needed here"),
        ((gelu, out, *quantize), "only nets with ReLU are quantised"),
        ((int8, folder / "out.pth"), "holds a quantised net (INT8), and float weights are needed here"),
    ):
        with mock.patch("repvgg_jax.load_weights", side_effect=AssertionError):  # before anything is computed
            assert words in error_of(command("convert.__main__", *arguments))
    assert "which has no training form" in error_of(command("train.evaluate", data, "train", int8))
    error = error_of(command("train.main", "--preset", "digits", "--quantization", "qat"))
    assert "pass a file in training form with --init" in error
    assert sorted(folder.iterdir()) == before
