"""A deploy-form net as an ONNX graph, written node by node: the operators that the net consists of and no others.

Convolution and ReLU in the body (and the squeeze-and-excite gates, where the variant has them), then global average
pool, flatten and one matrix product. ONNX is NCHW throughout; images that come as NHWC are transposed once, in front.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import ExportError
from ..net.activations import Activation
from ..net.variants import BlockSpec
from ..version import __version__
from .deploy_net import INPUT, OUTPUT, DeployNet

OPSET = 17
"""Of 2022: old enough for every runtime in use, and past 13, the first with per-channel quantisation."""

IR_VERSION = 8
"""The file format's version that came with this opset; runtimes refuse later ones than they know."""

BATCH, HEIGHT, WIDTH = "N", "H", "W"
"""Names of the dimensions that a file leaves free."""


class Graph:
    """Nodes and constants in the order in which they were added; tensors are called after the nodes that make them."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node of one output; returns the output's name, which is the node's."""
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, array: np.ndarray) -> str:
        """Add a tensor that is part of the file; returns its name."""
        self.constants.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def model(self, net: DeployNet) -> onnx.ModelProto:
        """The whole as a checked model, whose output is that of the last node.

        Raises:
          onnx.checker.ValidationError: it is no valid ONNX.
        """
        self.nodes[-1].output[0] = OUTPUT
        shape: list[int | str] = [*net.image_shape]
        if net.dynamic_size:
            start = net.input_layout.index("H") - 1
            shape[start : start + 2] = [HEIGHT, WIDTH]
        images = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [BATCH, *shape])
        logits = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [BATCH, net.model.num_classes])
        graph = helper.make_graph(self.nodes, net.model.variant.name, [images], [logits], self.constants)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="repvgg-jax",
            producer_version=__version__,
        )
        helper.set_model_props(model, net.metadata())
        onnx.checker.check_model(model, full_check=True)
        return model


class Layers(Protocol):
    """How layers with weights are written. `FloatLayers` is the plain way, quantised graphs have their own."""

    def conv(self, graph: Graph, x: str, name: str, params: Mapping[str, np.ndarray], **attributes: Any) -> str:
        """A convolution of `x` (`[N, C, H, W]`) by `params`: kernel `[h, w, in / groups, out]`, bias `[out]`."""
        ...

    def linear(self, graph: Graph, x: str, name: str, params: Mapping[str, np.ndarray]) -> str:
        """`x @ kernel + bias` for `x` `[N, C]`, kernel `[C, out]`, bias `[out]`."""
        ...

    def pool(self, graph: Graph, x: str) -> str:
        """The mean over all pixels, `[N, C, H, W] -> [N, C, 1, 1]`."""
        ...


class FloatLayers:
    """Convolutions and matrix products in float32."""

    def conv(self, graph: Graph, x: str, name: str, params: Mapping[str, np.ndarray], **attributes: Any) -> str:
        """A `Conv` node."""
        kernel = graph.constant(f"{name}/kernel", params["kernel"].transpose(3, 2, 0, 1))
        return graph.node("Conv", [x, kernel, graph.constant(f"{name}/bias", params["bias"])], name, **attributes)

    def linear(self, graph: Graph, x: str, name: str, params: Mapping[str, np.ndarray]) -> str:
        """A `Gemm` node; the kernel lies as PyTorch's exporter lays it, the way runtimes have met most often."""
        kernel = graph.constant(f"{name}/kernel", params["kernel"].T)
        return graph.node("Gemm", [x, kernel, graph.constant(f"{name}/bias", params["bias"])], name, transB=1)

    def pool(self, graph: Graph, x: str) -> str:
        """A `GlobalAveragePool` node."""
        return graph.node("GlobalAveragePool", [x], "pool")


def build_onnx(net: DeployNet, layers: Layers | None = None) -> onnx.ModelProto:
    """The net as a checked ONNX model.

    Args:
      net: what to write.
      layers: how layers with weights are written; float32 if None.

    Returns:
      Input `images` float32 `[N, C, H, W]` or `[N, H, W, C]` with any N (and any H and W, if asked for), output
      `logits` float32 `[N, classes]`.
    """
    layers = layers or FloatLayers()
    graph = Graph()
    x = INPUT
    if net.input_layout == "NHWC":
        x = graph.node("Transpose", [x], "to_nchw", perm=[0, 3, 1, 2])
    for block in net.blocks:
        x = _add_block(graph, layers, net, block, x)
    x = layers.pool(graph, x)
    x = graph.node("Flatten", [x], "flatten")
    layers.linear(graph, x, "linear", net.params["linear"])
    return graph.model(net)


def conv_attributes(block: BlockSpec, kernel: np.ndarray) -> dict[str, Any]:
    """A block's convolution as ONNX describes one. Padding is PyTorch's: half a (dilated) kernel on every side."""
    size, dilation = kernel.shape[0], block.dilation
    attributes: dict[str, Any] = dict(
        kernel_shape=[size, size], strides=[block.stride] * 2, pads=[dilation * (size // 2)] * 4, group=block.groups
    )
    return attributes if dilation == 1 else attributes | dict(dilations=[dilation] * 2)


def _add_block(graph: Graph, layers: Layers, net: DeployNet, block: BlockSpec, x: str) -> str:
    """Convolution, (SE,) activation (, SE), as `DeployBlock` computes them."""
    params, place = net.params[block.name], net.model.variant.squeeze_excite
    conv = params["rbr_reparam"]
    x = layers.conv(graph, x, f"{block.name}/rbr_reparam", conv, **conv_attributes(block, conv["kernel"]))
    if place == "before_relu":
        x = _add_gate(graph, layers, x, f"{block.name}/se", params["se"])
    x = _add_activation(graph, net.model.variant.activation, x, f"{block.name}/relu")
    if place == "after_relu":
        x = _add_gate(graph, layers, x, f"{block.name}/post_se", params["post_se"])
    return x


def _add_activation(graph: Graph, activation: Activation, x: str, name: str) -> str:
    """What follows the convolution: one node for ReLU, few for the others.

    Raises:
      ExportError: it is a Python function, which ONNX cannot hold.
    """

    def number(label: str, value: float) -> str:
        return graph.constant(f"{name}/{label}", np.array(value, np.float32))

    if activation == "relu":
        return graph.node("Relu", [x], name)
    if activation == "relu6":
        return graph.node("Clip", [x, number("least", 0), number("largest", 6)], name)
    if activation == "leaky_relu":
        return graph.node("LeakyRelu", [x], name, alpha=0.01)
    if activation == "silu":
        return graph.node("Mul", [x, graph.node("Sigmoid", [x], f"{name}/sigmoid")], name)
    if activation == "gelu":
        erf = graph.node("Erf", [graph.node("Mul", [x, number("scale", 0.5**0.5)], f"{name}/scaled")], f"{name}/erf")
        half = graph.node("Mul", [x, number("half", 0.5)], f"{name}/halved")
        return graph.node("Mul", [half, graph.node("Add", [erf, number("one", 1)], f"{name}/share")], name)
    raise ExportError(f"ONNX cannot hold the activation {activation!r}, a function; give it by name")


def _add_gate(graph: Graph, layers: Layers, x: str, name: str, params: Mapping[str, Any]) -> str:
    """Squeeze-and-excite: `x * sigmoid(up(relu(down(mean(x)))))`."""
    gate = graph.node("GlobalAveragePool", [x], f"{name}/mean")
    gate = layers.conv(graph, gate, f"{name}/down", params["down"], kernel_shape=[1, 1])
    gate = graph.node("Relu", [gate], f"{name}/relu")
    gate = layers.conv(graph, gate, f"{name}/up", params["up"], kernel_shape=[1, 1])
    gate = graph.node("Sigmoid", [gate], f"{name}/sigmoid")
    return graph.node("Mul", [x, gate], f"{name}/scale")
