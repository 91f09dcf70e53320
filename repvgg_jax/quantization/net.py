"""Quantised nets and their forward pass in integers."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..broadcasting import channelwise
from ..conv import native
from ..inference.planned_net import Output
from ..inference.predictor import PreparedNet
from ..net.variants import BlockSpec, Variant
from ..net.walk import walk
from ..preprocess import Preprocessing
from .arithmetic import Arithmetic, InXla, NativeIntegers, accumulate, is_quantized, pack_layers
from .calibration import input_dtype
from .quantizer import WEIGHT_LEVELS, to_integers
from .stack import LINEAR, POOL, FloatOperations, with_readers

if TYPE_CHECKING:
    from .report import LayerReport

LARGEST_BIAS = 2**30
"""Largest int32 bias; the rest of the range is for the sum of the products."""


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedNet:
    """A deploy-form net with 8-bit weights and activations.

    Attributes:
      variant: the architecture.
      num_classes: number of classes.
      in_channels: number of input channels.
      params: parameters by layer. A quantised layer has `kernel` int8 `[3, 3, I / groups, O]` (`linear`:
        `[C, classes]`), `kernel_scale` float32 `[O]`, `bias` int32 `[O]` in units of `input_scale * kernel_scale`, and
        `input_scale` float32. A float layer has `kernel` and `bias` in float32. `pool` has only an `input_scale`.
        Channel gates (`se`, `post_se`) are in float.
      preprocessing: preprocessing of the images.
      class_names: names by class index, or None.
      report: quantisation error of each layer; empty for a net loaded from a file.
    """

    variant: Variant
    num_classes: int
    in_channels: int
    params: Mapping[str, Any]
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    report: tuple["LayerReport", ...] = ()

    @property
    def variables(self) -> dict[str, Any]:
        """Return the variables for `apply`."""
        return {"params": self.params}

    def apply(
        self,
        variables: Mapping[str, Any],
        images: Array,
        train: bool = False,
        *,
        integer: bool = False,
        method: Literal["embed"] | None = None,
    ) -> Array:
        """Return logits or embeddings, like the `apply` of a Flax model.

        Args:
          variables: variables of this net.
          images: `[N, H, W, C]` float, normalised.
          train: ignored.
          integer: compute in integers (int8 x int8 -> int32) instead of float32. float32 represents the same integers
            exactly up to 2^24, and is faster where there is no integer convolution, as in XLA on CPUs. On GPUs, where
            XLA has no convolution to int32, the convolutions use float32 in either case.
          method: "embed" for the pooled features that feed the classifier, before they are quantised for it.

        Returns:
          Logits `[N, num_classes]` or embeddings `[N, variant.widths[-1]]`, float32.

        Raises:
          ValueError: the method is unknown.
        """
        del train
        if method not in (None, "embed"):
            raise ValueError(f'method must be "embed" or None, not {method!r}')
        outputs = forward(self.variant, variables["params"], images, integer=integer)
        return embedding(variables["params"], outputs) if method else outputs["logits"]

    def prepared(self, batch_size: int, image_size: tuple[int, int], output: Output) -> PreparedNet:
        """Return the net prepared for `make_predictor`.

        On a CPU with AVX-512 VNNI, the body uses native integer convolutions. Elsewhere it computes the same integers
        in float32, exactly, since XLA has no fast integer convolution on CPUs. For speed from 8 bits there, export the
        net (`export_quantized_onnx`) to a runtime with integer kernels.
        """
        integer = jax.default_backend() == "cpu" and native.int8_available()
        params, arithmetic = self.params, None
        if integer:
            params, arithmetic = pack_layers(self.variant, params, self.in_channels), NativeIntegers()

        def run(params: Mapping[str, Any], images: Array) -> Array:
            outputs = forward(self.variant, params, images, integer=False, arithmetic=arithmetic)
            return outputs["logits"] if output == "logits" else embedding(params, outputs)

        shape = (*image_size, self.in_channels)
        return PreparedNet(jax.tree.map(jnp.asarray, dict(params)), run, batch_size, shape, output, integer=integer)

    def __call__(self, images: Array | np.ndarray) -> Array:
        """Return logits `[N, num_classes]` of normalised images `[N, H, W, C]`."""
        return self._compiled(self.variables, jnp.asarray(images))

    @functools.cached_property
    def _compiled(self) -> Any:
        return jax.jit(self.apply)


def quantize_layer(layer: Mapping[str, Any], kernel: np.ndarray, scale: np.ndarray, input_scale: Any) -> dict[str, Any]:
    """Return a quantised layer from its float bias and integer weights.

    Args:
      layer: the float layer, with its final bias; its gate, if any, is kept.
      kernel: integer weights, of any dtype.
      scale: weight scale of each output channel, `[O]`, from `safe_weight_scale`.
      input_scale: scale of the layer's input.
    """
    unit = np.float32(input_scale) * scale.astype(np.float32)
    return {name: tree for name, tree in layer.items() if name not in ("kernel", "bias")} | {
        "kernel": np.clip(kernel, -WEIGHT_LEVELS, WEIGHT_LEVELS).astype(np.int8),
        "kernel_scale": scale.astype(np.float32),
        "bias": np.rint(layer["bias"].astype(np.float64) / unit).astype(np.int32),
        "input_scale": np.float32(input_scale),
    }


def dequantized(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a layer's `kernel` and `bias` as real numbers, whether it is quantised or not."""
    if not is_quantized(layer):
        return {"kernel": layer["kernel"], "bias": layer["bias"]}
    kernel = np.asarray(layer["kernel"], np.float32) * layer["kernel_scale"]
    return {"kernel": kernel, "bias": layer["bias"] * (layer["input_scale"] * layer["kernel_scale"])}


def safe_weight_scale(scale: np.ndarray, bias: np.ndarray, input_scale: Any) -> np.ndarray:
    """Return the weight scales, raised where the bias would overflow int32; the weights there are almost zero."""
    least = np.abs(bias) / (np.float32(input_scale) * LARGEST_BIAS)
    return np.maximum(scale, least).astype(np.float32)


def forward(
    variant: Variant, params: Mapping[str, Any], images: Array, *, integer: bool, arithmetic: Arithmetic | None = None
) -> dict[str, Array]:
    """Return the inputs of all layers of a quantised net, and its logits.

    An accumulator becomes the next layer's input by `round(accumulator * (input_scale * kernel_scale / next_scale))`
    in float32, ties to even, saturated to 0..255 (which applies the ReLU). ONNX Runtime's QLinearConv does the same.

    Args:
      variant: the architecture.
      params: `QuantizedNet.params`, with the body's kernels packed if the arithmetic needs that.
      images: `[N, H, W, C]` float, normalised.
      integer: compute in integers instead of floats with the same values.
      arithmetic: computation of the body's quantised layers; XLA if None.

    Returns:
      The input of each layer by name, in integers if the layer is quantised; and `logits`.
    """
    operations = IntegerOperations(variant, params, arithmetic or InXla(integer), integer)
    logits = walk(variant, operations, images.astype(jnp.float32))
    return operations.inputs | {"logits": logits}


@dataclasses.dataclass
class IntegerOperations(FloatOperations):
    """Operations for `walk` through a quantised net. Layers pass on integers if there is only a ReLU between them.

    `arithmetic` computes the body's quantised layers; `integer` applies to the classifier (`accumulate`).
    """

    arithmetic: Arithmetic
    integer: bool

    @functools.cached_property
    def _reader_of(self) -> dict[str, str]:
        """By block: name of the layer that reads its output."""
        return {block.name: reader for block, reader in with_readers(self.variant.blocks())}

    def read(self, name: str, x: Array) -> Array:
        """Return the layer's input: integers, or real numbers if the layer is in float."""
        layer = self.layers[name]
        if "input_scale" in layer and not jnp.issubdtype(x.dtype, jnp.integer):
            x = to_integers(x, layer["input_scale"], input_dtype(name))
        return super().read(name, x)

    def conv(self, block: BlockSpec, x: Array, *, activate: bool) -> Array:
        """Compute the convolution in integers, and round the result to the next layer's integers if it reads those."""
        layer = self.layers[block.name]
        if not is_quantized(layer):
            return super().conv(block, x, activate=activate)
        x = self.read(block.name, x)
        unit = layer["input_scale"] * layer["kernel_scale"]
        next_scale = self.layers[self._reader_of[block.name]].get("input_scale")
        if activate and self.variant.gate_name is None and next_scale is not None:
            return self.arithmetic.rounded(block, x, layer, unit / next_scale)
        y = self.arithmetic.totals(block, x, layer).astype(jnp.float32) * channelwise(unit)
        return self.activation(block, y) if activate else y

    def pool(self, x: Array) -> Array:
        """Return the mean over pixels as real numbers."""
        return _mean(self.read(POOL, x), self.layers[POOL]["input_scale"])

    def linear(self, x: Array) -> Array:
        """Compute the classifier in integers, and return real logits."""
        layer = self.layers[LINEAR]
        if not is_quantized(layer):
            return super().linear(x)
        total = accumulate(None, self.read(LINEAR, x), layer, self.integer)
        unit = layer["input_scale"] * layer["kernel_scale"]
        return total.astype(jnp.float32) * channelwise(unit, total.ndim)


def embedding(params: Mapping[str, Any], outputs: Mapping[str, Array]) -> Array:
    """Return the pooled features `[N, C]` as real numbers from the outputs of `forward`."""
    return _mean(outputs[POOL], params[POOL]["input_scale"])


def _mean(x: Array, scale: Array) -> Array:
    """Return the spatial means `[N, C]` of integers as real numbers; the sums are exact."""
    return x.astype(jnp.float32).sum((1, 2)) * (scale / (x.shape[1] * x.shape[2]))
