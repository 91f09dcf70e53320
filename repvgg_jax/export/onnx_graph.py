"""A deploy-form net as an ONNX graph, written node by node with only the operators that the net consists of.

These are convolution and ReLU in the body (and squeeze-and-excite gates, if the variant has them), then global average
pooling, flattening and one matrix product. ONNX is NCHW throughout; NHWC images are transposed once at the input.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import ExportError
from ..net.activations import Activation
from ..net.variants import BlockSpec
from ..net.walk import walk
from ..version import __version__
from .deploy_net import INPUT, OUTPUT, DeployNet

OPSET = 17
"""From 2022: old enough for every runtime in use, and later than 13, the first with per-channel quantisation."""

IR_VERSION = 8
"""Version of the file format that belongs to this opset; runtimes refuse versions newer than they support."""

BATCH, HEIGHT, WIDTH = "N", "H", "W"
"""Names of the dynamic dimensions."""


class Graph:
    """Nodes and constants in the order in which they were added. Each tensor has the name of the node that makes it."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node with one output, and return the output's name, which is also the node's."""
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, array: np.ndarray | np.generic) -> str:
        """Add a tensor that is stored in the file, and return its name."""
        self.constants.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def model(self, net: DeployNet) -> onnx.ModelProto:
        """Return the graph as a checked model, whose output is that of the last node.

        Raises:
          onnx.checker.ValidationError: the model is not valid ONNX.
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


class OnnxOperations:
    """Operations for `walk` that add a net to a graph, in float32; values are the names of nodes.

    Args:
      net: net to write.

    Attributes:
      graph: graph written so far.
    """

    def __init__(self, net: DeployNet):
        self.net = net
        self.graph = Graph()

    def conv(self, block: BlockSpec, x: str, *, activate: bool) -> str:
        """Add a `Conv` with PyTorch's padding: half a (dilated) kernel on each side."""
        params = self.net.params[block.name]["rbr_reparam"]
        size, dilation = params["kernel"].shape[0], block.dilation
        attributes: dict[str, Any] = dict(
            kernel_shape=[size, size], strides=[block.stride] * 2, pads=[dilation * (size // 2)] * 4, group=block.groups
        )
        if dilation > 1:
            attributes |= dict(dilations=[dilation] * 2)
        x = self.write_conv(x, f"{block.name}/rbr_reparam", params, **attributes)
        return self.activation(block, x) if activate else x

    def write_conv(self, x: str, name: str, params: Mapping[str, np.ndarray], **attributes: Any) -> str:
        """Add a convolution of `x` (`[N, C, H, W]`) with `params`: kernel `[h, w, in / groups, out]`, bias `[out]`."""
        kernel = self.graph.constant(f"{name}/kernel", params["kernel"].transpose(3, 2, 0, 1))
        bias = self.graph.constant(f"{name}/bias", params["bias"])
        return self.graph.node("Conv", [x, kernel, bias], name, **attributes)

    def gate(self, block: BlockSpec, name: str, x: str) -> str:
        """Add `x * sigmoid(up(relu(down(mean(x)))))`."""
        params, name = self.net.params[block.name][name], f"{block.name}/{name}"
        gate = self.graph.node("GlobalAveragePool", [x], f"{name}/mean")
        gate = self.write_conv(gate, f"{name}/down", params["down"], kernel_shape=[1, 1])
        gate = self.graph.node("Relu", [gate], f"{name}/relu")
        gate = self.write_conv(gate, f"{name}/up", params["up"], kernel_shape=[1, 1])
        gate = self.graph.node("Sigmoid", [gate], f"{name}/sigmoid")
        return self.graph.node("Mul", [x, gate], f"{name}/scale")

    def activation(self, block: BlockSpec, x: str) -> str:
        """Add the variant's activation function: one node for ReLU, a few for the others."""
        return add_activation(self.graph, self.net.model.variant.activation, x, f"{block.name}/relu")

    def pool(self, x: str) -> str:
        """Add the mean over all pixels, `[N, C, H, W] -> [N, C]`."""
        return self.graph.node("Flatten", [self.graph.node("GlobalAveragePool", [x], "pool")], "flatten")

    def linear(self, x: str) -> str:
        """Add a `Gemm` node. The kernel has the layout of PyTorch's exporter, the one that runtimes see most often."""
        params = self.net.params["linear"]
        kernel = self.graph.constant("linear/kernel", params["kernel"].T)
        bias = self.graph.constant("linear/bias", params["bias"])
        return self.graph.node("Gemm", [x, kernel, bias], "linear", transB=1)


def build_onnx(net: DeployNet, operations: type[OnnxOperations] = OnnxOperations) -> onnx.ModelProto:
    """Return the net as a checked ONNX model.

    Args:
      net: net to write.
      operations: class that writes the layers.

    Returns:
      Model with the input `images`, float32 `[N, C, H, W]` or `[N, H, W, C]`, with any N (and any H and W if the net
      has `dynamic_size`), and the output `logits`, float32 `[N, classes]`.
    """
    writer = operations(net)
    x = INPUT
    if net.input_layout == "NHWC":
        x = writer.graph.node("Transpose", [x], "to_nchw", perm=[0, 3, 1, 2])
    walk(net.model.variant, writer, x)
    return writer.graph.model(net)


def add_activation(graph: Graph, activation: Activation, x: str, name: str) -> str:
    """Add an activation function, and return the name of its last node.

    Raises:
      ExportError: the activation is a Python function, which ONNX cannot represent.
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
