"""Claim: the ONNX file contains the deploy form and nothing else, and other runtimes compute JAX's logits from it."""

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnx.numpy_helper
import onnx.reference
import pytest

import repvgg_jax as rv
from repvgg_jax.export.onnx_graph import OPSET
from repvgg_jax.net.activations import ACTIVATIONS
from tests.helpers.comparison import relative_difference
from tests.helpers.onnx_runtimes import in_onnxruntime, in_openvino, nchw
from tests.helpers.random_weights import random_variables
from tests.helpers.weight_files import TINY

GROUPED = dataclasses.replace(TINY, groups=4, name="Grouped")
D2SE = dataclasses.replace(TINY, squeeze_excite="before_relu", squeeze_excite_ratio=4, name="D2se")
PLUS = dataclasses.replace(D2SE, squeeze_excite="after_relu", auxiliary_heads=True, name="plus")
CLASSES = 5


def random_images(count: int, size: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, size, size, channels)).astype(np.float32)


def operators(path: Path) -> list[str]:
    """Return the graph's operators in order."""
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.fixture
def small(tmp_path):
    """A small net, its variables, and the path of the file to write."""
    model = rv.create_model(TINY, CLASSES)
    return model, random_variables(model), tmp_path / "net.onnx"


def check_same_logits(variant: str | rv.Variant, size: int, path: Path) -> None:
    """Compare the training form in JAX with the file in both runtimes."""
    model = rv.create_model(variant, CLASSES)
    variables = random_variables(model)
    images = random_images(2, size)
    rv.export_onnx(path, model, variables, image_size=size)
    expected = np.asarray(jax.jit(model.apply)(variables, images))
    assert 0.05 < expected.std() < 20, "the test's own weights are badly scaled"
    for run in (in_onnxruntime, in_openvino):
        assert relative_difference(expected, run(path, nchw(images))) <= 1e-5


@pytest.mark.parametrize(
    "variant",
    [pytest.param("RepVGG-A0", marks=pytest.mark.slow), GROUPED, pytest.param(D2SE, marks=pytest.mark.slow), PLUS],
    ids=["A0", "grouped", "D2se", "plus"],
)
def test_other_runtimes_give_the_same_logits(variant, tmp_path):
    check_same_logits(variant, 64, tmp_path / "net.onnx")


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "relu"])
def test_other_activations_and_dilation_give_the_same_logits(activation, tmp_path):
    check_same_logits(dataclasses.replace(TINY, activation=activation, output_stride=8), 40, tmp_path / "net.onnx")


def test_an_activation_function_is_refused(tmp_path):
    model = rv.create_model(TINY, CLASSES, activation=jax.nn.softplus)
    with pytest.raises(rv.RepVGGError, match="function; give it by name"):
        rv.export_onnx(tmp_path / "net.onnx", model, random_variables(model))
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", rv.list_models())
def test_every_variant_at_full_size_gives_the_same_logits(name, tmp_path):
    size = rv.create_model(name).variant.image_size
    check_same_logits(name, size, tmp_path / "net.onnx")


@pytest.mark.parametrize("name", ["RepVGG-A0", "RepVGG-B1g4"])
def test_a_plain_net_has_only_convolutions_and_relus(name, tmp_path):
    model = rv.create_model(name, CLASSES, deploy=True)
    variables = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32),
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))),
    )
    rv.export_onnx(tmp_path / "net.onnx", model, variables)
    *body, pool, flatten, head = operators(tmp_path / "net.onnx")
    assert body == ["Conv", "Relu"] * len(model.variant.blocks())
    assert [pool, flatten, head] == ["GlobalAveragePool", "Flatten", "Gemm"]


def test_squeeze_and_excite_adds_only_gates(tmp_path):
    gate = ["GlobalAveragePool", "Conv", "Relu", "Conv", "Sigmoid", "Mul"]
    for variant, block in ((D2SE, ["Conv", *gate, "Relu"]), (PLUS, ["Conv", "Relu", *gate])):
        model = rv.create_model(variant, CLASSES)
        rv.export_onnx(tmp_path / "net.onnx", model, random_variables(model))
        assert operators(tmp_path / "net.onnx")[:-3] == block * len(variant.blocks())


def test_an_nhwc_input_is_transposed_once_at_the_start(small):
    model, variables, path = small
    images = random_images(2, 32)
    rv.export_onnx(path, model, variables, image_size=32)
    plain, expected = operators(path), in_onnxruntime(path, nchw(images))
    rv.export_onnx(path, model, variables, image_size=32, input_layout="NHWC")
    assert operators(path) == ["Transpose", *plain]
    np.testing.assert_array_equal(in_onnxruntime(path, images), expected)


def test_the_batch_size_is_dynamic_and_onnxs_reference_agrees(small):
    model, variables, path = small
    rv.export_onnx(path, model, variables, image_size=32)
    images = random_images(3, 32)
    expected = np.asarray(jax.jit(model.apply)(variables, images))
    for count in (1, 3):
        for run in (in_onnxruntime, in_openvino):
            assert relative_difference(expected[:count], run(path, nchw(images[:count]))) <= 1e-5
    (reference,) = onnx.reference.ReferenceEvaluator(str(path)).run(None, {"images": nchw(images)})
    assert relative_difference(expected, reference) <= 1e-5


def test_images_need_neither_be_square_nor_have_three_channels(tmp_path):
    model = rv.create_model(TINY, CLASSES)
    variables = random_variables(model, in_channels=1)
    images = np.random.default_rng(1).normal(size=(2, 33, 47, 1)).astype(np.float32)
    rv.export_onnx(tmp_path / "net.onnx", model, variables, image_size=(33, 47))
    actual = in_onnxruntime(tmp_path / "net.onnx", nchw(images))
    assert relative_difference(jax.jit(model.apply)(variables, images), actual) <= 1e-5


@pytest.mark.parametrize("variant", [TINY, D2SE, PLUS], ids=["plain", "D2se", "plus"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_height_and_width_are_dynamic_on_request(layout, variant, tmp_path):
    model, path = rv.create_model(variant, CLASSES), tmp_path / "net.onnx"
    variables = random_variables(model)
    rv.export_onnx(path, model, variables, input_layout=layout, dynamic_size=True)
    (images,) = onnx.load(path).graph.input
    shape = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert shape == (["N", 3, "H", "W"] if layout == "NCHW" else ["N", "H", "W", 3])
    for height, width in ((64, 64), (33, 90)):
        x = np.random.default_rng(1).normal(size=(2, height, width, 3)).astype(np.float32)
        expected = np.asarray(jax.jit(model.apply)(variables, x))
        for run in (in_onnxruntime, in_openvino):
            assert relative_difference(expected, run(path, nchw(x) if layout == "NCHW" else x)) <= 1e-5


def test_the_file_describes_itself(small):
    model, variables, path = small
    preprocessing = rv.Preprocessing(image_size=96, crop_fraction=1.0)
    names = tuple("abcde")
    rv.export_onnx(path, model, variables, preprocessing=preprocessing, class_names=names)
    loaded = onnx.load(path)
    metadata = {entry.key: entry.value for entry in loaded.metadata_props}
    assert metadata["variant"] == "custom"
    assert metadata["input_layout"] == "NCHW"
    assert rv.Preprocessing.from_dict(json.loads(metadata["preprocessing"])) == preprocessing
    assert json.loads(metadata["class_names"]) == list(names)
    assert [opset.version for opset in loaded.opset_import] == [OPSET]
    (images,), (logits,) = loaded.graph.input, loaded.graph.output
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (images, logits)]
    assert (images.name, logits.name) == ("images", "logits")
    assert shapes == [["N", 3, 96, 96], ["N", CLASSES]]


def test_every_tensor_is_float32_whatever_the_models_dtype(small):
    _, variables, path = small
    model = rv.create_model(TINY, CLASSES, deploy=True, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), rv.fuse_variables(variables))
    rv.export_onnx(path, model, rounded, image_size=32)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}
    kernel = rounded["params"]["stage1_0"]["rbr_reparam"]["kernel"].astype(np.float32)
    np.testing.assert_array_equal(tensors["stage1_0/rbr_reparam/kernel"], kernel.transpose(3, 2, 0, 1))


def test_mistakes_are_clear_errors_and_leave_no_files(small):
    model, variables, path = small
    other = random_variables(rv.create_model(GROUPED, CLASSES))
    broken = jax.tree.map(np.copy, variables)
    broken["params"]["linear"]["bias"][0] = np.nan
    mistakes: tuple[tuple[Any, dict[str, Any], type[Exception], str], ...] = (
        (other, {}, rv.WeightsError, "does not fit|do not fit"),
        (broken, {}, rv.WeightsError, "NaN"),
        (variables, {"input_layout": "HWC"}, ValueError, "NCHW or NHWC, not 'HWC'"),
        (variables, {"image_size": 0}, ValueError, "image_size must be positive"),
        (variables, {"class_names": ("a",)}, ValueError, "1 class names for a model of 5 classes"),
    )
    for tree, options, error, words in mistakes:
        with pytest.raises(error, match=words):
            rv.export_onnx(path, model, tree, **options)
    with pytest.raises(rv.RepVGGError, match="there is no folder"):
        rv.export_onnx(path.parent / "none" / "net.onnx", model, variables)
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(rv.ExportError, match=r"pip install -e '\.\[export\]' in your checkout"),
    ):
        rv.export_onnx(path, model, variables)
    assert list(path.parent.iterdir()) == []
