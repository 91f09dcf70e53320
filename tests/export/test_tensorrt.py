"""Claim: `target="tensorrt"` writes what TensorRT's parser accepts, and other runtimes compute the same from it.

TensorRT is not available here: its published rules are listed below as data, each with its source, and checked.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import repvgg_jax as rv
from repvgg_jax.net.walk import walk
from repvgg_jax.quantization.net import dequantized
from repvgg_jax.quantization.stack import FloatOperations
from tests.helpers.onnx_runtimes import in_onnxruntime, in_openvino, nchw
from tests.helpers.outlier_nets import VARIANTS, deploy_net, images

DOCS = "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/"


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A QuantizeLinear or DequantizeLinear and its surroundings; arrays are None if they are computed in the graph."""

    node: onnx.NodeProto
    scale: np.ndarray | None
    zero: np.ndarray | None
    integers: np.ndarray | None
    weight_of: str | None
    """The operator that reads the result as its weights or bias."""
    place: int
    """Index of that input: 1 for weights, 2 for a bias."""
    axis: int | None
    output_axis: int
    """Output axis of that operator's weights."""


Rule = tuple[str, str, Callable[[Quantizer], bool]]

RULES: tuple[Rule, ...] = (
    (
        "zero-points are 0: symmetric quantisation only",
        DOCS + "work-quantized-types.html; shiftIsAllZeros in the parser, github.com/NVIDIA/TensorRT/issues/2774",
        lambda q: q.zero is not None and not q.zero.any(),
    ),
    (
        "quantised tensors are int8, not uint8",
        DOCS + "work-quantized-types.html, supported data types",
        lambda q: (
            q.zero is not None and q.zero.dtype == np.int8 and (q.integers is None or q.integers.dtype == np.int8)
        ),
    ),
    (
        "no int32 bias through DequantizeLinear: 'only activation types allowed as input to this layer'",
        "github.com/microsoft/onnxruntime/issues/14229, github.com/onnx/onnx-tensorrt/issues/850",
        lambda q: q.place != 2,
    ),
    (
        "activations have one scale, which is a positive constant",
        DOCS + "work-quantized-types.html, quantization granularities",
        lambda q: q.scale is not None and bool((q.scale > 0).all()) and (q.weight_of is not None or q.scale.ndim == 0),
    ),
    (
        "weights have one scale, or one per output channel",
        DOCS + "work-quantized-types.html, quantization granularities",
        lambda q: q.weight_of is None or q.scale is None or q.scale.ndim == 0 or q.axis == q.output_axis == 0,
    ),
    (
        "weights are in -127..127",
        "the range of INT8 weights, developer guide, ONNX support of Q/DQ",
        lambda q: q.integers is None or int(q.integers.min()) >= -127,
    ),
)


def quantizers(model: onnx.ModelProto) -> list[Quantizer]:
    """Return every one in the graph."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    result = []
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        readers = [(r, list(r.input).index(node.output[0])) for r in model.graph.node if node.output[0] in r.input]
        reader, place = readers[0] if readers else (None, 0)
        attributes = {a.name: onnx.helper.get_attribute_value(a) for r in [reader] if r for a in r.attribute}
        output_axis = 1 if reader is not None and reader.op_type == "Gemm" and not attributes.get("transB") else 0
        axes = [a.i for a in node.attribute if a.name == "axis"]
        result.append(
            Quantizer(
                node,
                constants.get(node.input[1]),
                constants.get(node.input[2]) if len(node.input) > 2 else None,
                constants.get(node.input[0]),
                reader.op_type if reader is not None and place > 0 else None,
                place,
                axes[0] if axes else None,
                output_axis,
            )
        )
    return result


def broken_rules(path: Path) -> set[str]:
    return {words for quantizer in quantizers(onnx.load(path)) for words, _, holds in RULES if not holds(quantizer)}


def expected_logits(net: rv.QuantizedNet, x: np.ndarray) -> np.ndarray:
    """Return the logits of float layers on activations rounded to int8, which the file is meant to compute."""

    class Rounded(FloatOperations):
        def read(self, name: str, x: Any) -> Any:
            scale = net.params[name].get("input_scale")
            if scale is None:
                return x
            scale = scale if name == "stage0" else scale * 255 / 127
            return np.clip(np.rint(np.asarray(x) / scale), -128, 127) * scale

    layers = {name: {**layer, **dequantized(layer)} for name, layer in net.params.items() if name != "pool"}
    return np.asarray(walk(net.variant, Rounded(net.variant, layers), jnp.asarray(x)))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_graph_follows_tensorrts_rules_and_two_runtimes_compute_it(name, tmp_path):
    options: dict[str, Any] = {"float_first": True, "float_last": True} if name == "grouped" else {}
    net = rv.quantize(*deploy_net(name), images(), "equalized", **options)
    rv.export_quantized_onnx(tmp_path / "net.onnx", net, image_size=32, target="tensorrt")
    assert broken_rules(tmp_path / "net.onnx") == set()
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert TensorProto.UINT8 not in {tensor.data_type for tensor in model.graph.initializer}
    x = images(16, seed=1)
    expected = expected_logits(net, x)
    largest = np.abs(expected).max()
    for run in (in_onnxruntime, in_openvino):
        # Runtimes average the pooled features in different ways, so one may be rounded the other way, by one unit.
        actual = run(tmp_path / "net.onnx", nchw(x))
        np.testing.assert_allclose(actual, expected, atol=0.05 * largest)
        assert np.median(np.abs(actual - expected)) < 0.01 * largest


def test_both_targets_run_in_both_runtimes_with_similar_results(tmp_path):
    net = rv.quantize(*deploy_net(), images(), "equalized")
    x, logits = images(16, seed=1), {}
    for target in ("onnxruntime", "tensorrt"):
        rv.export_quantized_onnx(tmp_path / "net.onnx", net, image_size=32, target=target)
        for run in (in_onnxruntime, in_openvino):
            logits[target, run.__name__] = run(tmp_path / "net.onnx", nchw(x))
    reference = np.asarray(net(x))
    largest = np.abs(reference).max()
    for actual in logits.values():
        # Half as many steps in the same range: twice the rounding error in every layer.
        np.testing.assert_allclose(actual, reference, atol=0.15 * largest)


def test_the_checker_finds_the_rules_that_the_other_target_breaks(tmp_path):
    """Shows that the tests above can fail."""
    net = rv.quantize(*deploy_net(), images(), "equalized")
    rv.export_quantized_onnx(tmp_path / "net.onnx", net, image_size=32)
    broken = broken_rules(tmp_path / "net.onnx")
    assert {words.partition(":")[0] for words in broken} >= {
        "zero-points are 0",
        "quantised tensors are int8, not uint8",
        "no int32 bias through DequantizeLinear",
    }


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_height_and_width_are_dynamic_on_request(target, tmp_path):
    net = rv.quantize(*deploy_net(), images(), "equalized")
    rv.export_quantized_onnx(tmp_path / "net.onnx", net, dynamic_size=True, target=target)
    for height, width in ((32, 32), (24, 56)):
        x = np.tile(images(4, seed=1), (1, 2, 2, 1))[:, :height, :width]
        expected = np.asarray(net(x)) if target == "onnxruntime" else expected_logits(net, x)
        for run in (in_onnxruntime, in_openvino):
            actual = run(tmp_path / "net.onnx", nchw(x))
            np.testing.assert_allclose(actual, expected, atol=0.05 * np.abs(expected).max())


def test_an_unknown_target_is_refused(tmp_path):
    net = rv.quantize(*deploy_net(), images(), "naive")
    with pytest.raises(ValueError, match="target must be onnxruntime or tensorrt, not 'tflite'"):
        rv.export_quantized_onnx(tmp_path / "net.onnx", net, target="tflite")  # pyright: ignore[reportArgumentType]
    assert not any(tmp_path.iterdir())
