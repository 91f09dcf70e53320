"""Claim: `python -m convert` exports files that compute JAX's logits, reports how close they are, or writes nothing."""

import dataclasses
import importlib.util
from unittest import mock

import jax
import numpy as np
import onnx
import onnxruntime
import pytest

import repvgg_jax as rv
from tests.helpers.commands import convert, error_of
from tests.helpers.comparison import relative_difference
from tests.helpers.photos import write_photos
from tests.helpers.random_weights import random_variables
from tests.helpers.weight_files import TINY

SMALL = dataclasses.replace(TINY, num_blocks=(1, 2, 1, 1), groups=2, name="Small", image_size=32)
NAMES = tuple("abcde")
FIND_SPEC = importlib.util.find_spec


def without(*missing: str):
    """Pretend that these packages are not installed."""
    return mock.patch(
        "importlib.util.find_spec", lambda name, *rest: None if name in missing else FIND_SPEC(name, *rest)
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training-form file of a small net, images, and JAX's logits."""
    path = tmp_path_factory.mktemp("trained") / "train.safetensors"
    model = rv.create_model(SMALL, num_classes=5)
    variables = random_variables(model)
    rv.save_weights(path, model, variables, class_names=NAMES)
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    return path, images, np.asarray(jax.jit(model.apply)(variables, images))


def test_onnx_is_exported(trained, tmp_path):
    path, images, expected = trained
    done = convert(path, tmp_path / "net.onnx")
    assert done.returncode == 0, done.stderr
    assert "Small, 5 classes, fused" in done.stdout
    assert "NCHW, relative difference from JAX" in done.stdout
    assert "on 2 random images" in done.stdout
    assert "on 2 photographs" in done.stdout
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    actual = session.run(None, {"images": images.transpose(0, 3, 1, 2)})[0]
    assert relative_difference(expected, actual) <= 1e-5
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert metadata["class_names"] == '["a", "b", "c", "d", "e"]'


@pytest.mark.parametrize("suffix", [".stablehlo", ".bin"])
def test_stablehlo_is_exported(suffix, trained, tmp_path):
    path, images, expected = trained
    done = convert(path, tmp_path / f"net{suffix}", "--input-layout", "NCHW")
    assert "NCHW, relative difference from JAX" in done.stdout, done.stderr
    program = jax.export.deserialize(bytearray((tmp_path / f"net{suffix}").read_bytes()))
    assert relative_difference(expected, program.call(images.transpose(0, 3, 1, 2))) <= 1e-5


def test_a_bin_file_is_written_for_pytorch_names_and_read_back(trained, tmp_path):
    assert convert(trained[0], tmp_path / "net.bin", "--to", "authors").returncode == 0
    assert rv.inspect_weights(tmp_path / "net.bin").family == "authors"
    done = convert(tmp_path / "net.bin", tmp_path / "net.onnx", "--image-size", 48)
    assert "already in deploy form; NCHW, relative" in done.stdout, done.stderr
    (shape,) = (value.type.tensor_type.shape for value in onnx.load(tmp_path / "net.onnx").graph.input)
    assert [d.dim_value for d in shape.dim[1:]] == [3, 48, 48]


def test_onnx_with_a_dynamic_size_is_compared_at_another_size_too(trained, tmp_path):
    done = convert(trained[0], tmp_path / "net.onnx", "--free-size")
    assert "on a random image of 64x33" in done.stdout, done.stderr
    (value,) = onnx.load(tmp_path / "net.onnx").graph.input
    assert [d.dim_param for d in value.type.tensor_type.shape.dim] == ["N", "", "H", "W"]


def test_int8_onnx_accepts_the_export_options(trained, tmp_path):
    write_photos(tmp_path / "photos", 8)
    int8 = ("--int8", "--calibration", tmp_path / "photos", "--method", "naive")
    done = convert(trained[0], tmp_path / "net.onnx", *int8, "--onnx-target", "tensorrt", "--input-layout", "NHWC",
                   "--image-size", "48")  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = onnx.load(tmp_path / "net.onnx")
    assert [d.dim_value for d in loaded.graph.input[0].type.tensor_type.shape.dim[1:]] == [48, 48, 3]
    integers = {tensor.data_type for tensor in loaded.graph.initializer} - {onnx.TensorProto.FLOAT}
    assert integers == {onnx.TensorProto.INT8}
    assert convert(trained[0], tmp_path / "free.onnx", *int8, "--free-size").returncode == 0
    dimensions = onnx.load(tmp_path / "free.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param for d in dimensions] == ["N", "", "H", "W"]


@pytest.mark.parametrize("output", ["net.savedmodel", "net/"])
def test_a_saved_model_is_exported(output, trained, tmp_path):
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    path, images, expected = trained
    done = convert(path, f"{tmp_path}/{output}")
    assert "NHWC, relative difference from JAX" in done.stdout, done.stderr
    signature = tf.saved_model.load(f"{tmp_path}/{output}").signatures["serving_default"]
    assert relative_difference(expected, signature(images=tf.constant(images))["logits"].numpy()) <= 1e-5
    assert "exists already" in error_of(convert(path, f"{tmp_path}/{output}"))


def test_the_comparison_can_use_the_users_images(trained, tmp_path):
    write_photos(tmp_path / "photos", 3)
    pictures = sorted(file for file in (tmp_path / "photos").rglob("*") if file.is_file())
    done = convert(trained[0], tmp_path / "net.onnx", "--check-images", pictures[0].parent, pictures[0])
    assert done.returncode == 0, done.stderr
    count = 1 + sum(file.parent == pictures[0].parent for file in pictures)
    assert f"on {count} given images" in done.stdout


def test_the_check_works_without_onnxruntime_and_scikit_learn(trained, tmp_path):
    with without("onnxruntime", "sklearn"), mock.patch("onnxruntime.InferenceSession", side_effect=AssertionError):
        done = convert(trained[0], tmp_path / "net.onnx")
    assert "on 2 random images (no real ones: pass some with --check-images, or install scikit-learn)" in done.stdout


@pytest.mark.parametrize("suffix", [".onnx", ".stablehlo"])
def test_an_export_with_other_logits_does_not_replace_the_existing_file(suffix, trained, tmp_path):
    output = tmp_path / f"net{suffix}"
    output.write_text("before", encoding="utf-8")
    with mock.patch("convert.exports.logits_of", return_value=np.ones((2, 5), np.float32)):
        message = error_of(convert(trained[0], output, "--overwrite"))
    assert "differs from JAX by" in message
    assert "nothing written" in message
    assert output.read_text(encoding="utf-8") == "before"
    assert list(tmp_path.iterdir()) == [output]


def test_a_mistake_is_one_line_before_anything_is_computed(trained, tmp_path):
    path, out = trained[0], tmp_path / "net.onnx"
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.png").write_text("no image", encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    int8 = ("--int8", "--calibration", "digits")
    with mock.patch("repvgg_jax.load_weights", side_effect=AssertionError):
        for arguments, words in (
            ((path, out, "--keep-training-form"), "always fused"),
            ((path, out, "--to", "timm"), "always fused"),
            ((path, tmp_path / "w.pth", "--check-images", "a.png"), "are for exports, not for weight files"),
            ((path, tmp_path / "w.pth", "--input-layout", "NHWC"), "are for exports"),
            ((path, out, "--image-size", "0"), "--image-size must be at least 1"),
            ((path, tmp_path / "w.pth", "--free-size"), "--free-size and --check-images are for exports"),
            ((path, tmp_path / "net.stablehlo", "--free-size"), "--free-size is for .onnx, not for"),
            ((path, out, "--onnx-target", "tensorrt"), "--onnx-target needs --int8"),
            ((path, tmp_path / "w.safetensors", *int8, "--onnx-target", "tensorrt"), "--onnx-target is for .onnx"),
            (
                (path, tmp_path / "w.safetensors", *int8, "--input-layout", "NHWC"),
                "are for exports, not for weight files",
            ),
            ((path, out, *int8, "--image-size", "-1"), "--image-size must be at least 1"),
            ((path, out, *int8, "--check-images", tmp_path / "no.png"), "--check-images compares"),
            ((path, out, "--image-size", "99999999"), "--image-size must be at most 16384, not 99999999"),
            ((path, tmp_path / "none" / "net.onnx"), "there is no folder"),
            ((path, out, "--check-images", tmp_path / "none.jpg"), "none.jpg: No such file"),
            ((path, out, "--check-images", tmp_path / "empty"), "empty holds no images"),
            ((path, out, "--check-images", tmp_path / "no.png"), "no.png: cannot be read as an image"),
        ):
            assert words in error_of(convert(*arguments))
        with without("onnx"):
            assert "pip install -e '.[export]' in your checkout" in error_of(convert(path, out))
        with without("tensorflow"):
            assert "pip install tensorflow" in error_of(convert(path, tmp_path / "net.savedmodel"))
    assert sorted(tmp_path.iterdir()) == before
