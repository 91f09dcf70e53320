"""Claim: the QDQ file computes in ONNX Runtime's and OpenVINO's integer kernels what JAX computes in integers."""

import jax
import numpy as np
import onnx
import onnxruntime
import pytest

import repvgg_jax as rv
from repvgg_jax.quantization.arithmetic import InXla
from repvgg_jax.quantization.net import forward
from tests.helpers.onnx_runtimes import in_onnxruntime, in_openvino, nchw
from tests.helpers.outlier_nets import VARIANTS, deploy_net, images


def optimized_operators(path, folder) -> list[str]:
    """Return the operators of a file after ONNX Runtime's optimisation."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize("name", VARIANTS)
def test_onnxruntime_gives_the_same_logits(name, tmp_path):
    net = rv.quantize(
        *deploy_net(name), images(), "equalized", float_first=name == "grouped", float_last=name == "grouped"
    )
    rv.export_quantized_onnx(tmp_path / "net.onnx", net, image_size=32)
    x = images(16, seed=1)
    expected, actual = np.asarray(net(x)), in_onnxruntime(tmp_path / "net.onnx", nchw(x))
    # Runtimes average the pooled features in different ways, so one of them may be rounded the other way, by one unit.
    np.testing.assert_allclose(actual, expected, atol=0.02 * np.abs(expected).max())
    assert np.mean(np.abs(actual - expected) < 1e-3 * np.abs(expected).max()) > 0.5
    assert (actual.argmax(-1) == expected.argmax(-1)).mean() > 0.9


def test_onnxruntimes_integer_convolutions_give_the_same_integers(tmp_path):
    model, variables = deploy_net()
    net = rv.quantize(model, variables, images(), "equalized")
    rv.export_quantized_onnx(tmp_path / "net.onnx", net, image_size=32)
    assert optimized_operators(tmp_path / "net.onnx", tmp_path).count("QLinearConv") == len(model.variant.blocks())
    graph = onnx.load(tmp_path / "net.onnx")
    last = "pool/dequantize"  # the pool's input: the last convolution's integers times their scale
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    x = images(16, seed=1)
    actual = np.asarray(session.run([last], {"images": nchw(x)})[0]).transpose(0, 2, 3, 1)
    integers = jax.jit(forward, static_argnums=(0, 3))(net.variant, net.params, x, InXla(integer=True))
    np.testing.assert_array_equal(np.rint(actual / net.params["pool"]["input_scale"]), integers["pool"])


def test_openvino_gives_the_same_classes(tmp_path):
    net = rv.quantize(*deploy_net(), images(), "equalized")
    rv.export_quantized_onnx(tmp_path / "net.onnx", net, image_size=32, input_layout="NHWC")
    x = images(32, seed=1)
    expected, actual = np.asarray(net(x)), in_openvino(tmp_path / "net.onnx", x)
    np.testing.assert_allclose(actual, expected, atol=0.05 * np.abs(expected).max())


def test_a_single_scale_for_a_layer_is_written_as_a_scalar(tmp_path):
    net = rv.quantize(*deploy_net(), images(), "naive")
    rv.export_quantized_onnx(tmp_path / "net.onnx", net, image_size=32)
    shapes = {constant.name: tuple(constant.dims) for constant in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert shapes["stage2_0/rbr_reparam/kernel_scale"] == ()
    assert optimized_operators(tmp_path / "net.onnx", tmp_path).count("QLinearConv") == len(net.variant.blocks())
