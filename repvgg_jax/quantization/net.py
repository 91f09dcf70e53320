"""A quantised net, and its forward pass in integers."""

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
from .arithmetic import Arithmetic, InXla, NativeIntegers, is_quantized, pack_layers
from .calibration import input_dtype
from .quantizer import WEIGHT_LEVELS
from .stack import LINEAR, POOL, FloatOperations, with_readers

if TYPE_CHECKING:
    from .report import LayerReport

LARGEST_BIAS = 2**30
"""Maximum magnitude of an int32 bias; the rest of the range is for the sum of the products."""

LOGITS: Output = "logits"
EMBEDDING: Output = "embedding"


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedNet:
    """A deploy-form net with 8-bit weights and activations.

    Attributes:
      variant: the architecture.
      num_classes: number of classes.
      in_channels: channels of an image.
      params: parameters by layer. A quantised layer has `kernel` int8 `[3, 3, I / groups, O]` (`linear`:
        `[C, classes]`), `kernel_scale` float32 `[O]`, `bias` int32 `[O]` in units of `input_scale * kernel_scale`, and
        `input_scale` float32; a float layer has `kernel` and `bias` float32. `pool` has only an `input_scale`. Channel
        gates (`se`, `post_se`) are float.
      preprocessing: how images are prepared.
      class_names: names by class index, or None.
      report: quantisation report on each layer; empty for a net from a file.
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
        """Return the parameters in the form that `apply` accepts."""
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
        """Return logits or embeddings, like a Flax model's `apply`.

        Args:
          variables: the net's variables.
          images: `[N, H, W, C]` float, normalised.
          train: ignored.
          integer: multiply and add in integers (int8 x int8 -> int32) instead of in float32, which holds the same
            integers exactly up to 2^24 and is faster where there is no integer convolution, as in XLA on CPUs. On GPUs,
            for which XLA has no int8 -> int32 convolution, the convolutions are computed in float32 in either case.
          method: "embed" for the pooled features, before they are quantised for the classifier.

        Returns:
          Logits `[N, num_classes]` float32; embeddings: `[N, variant.widths[-1]]`.

        Raises:
          ValueError: `method` is unknown.
        """
        del train
        if method not in (None, "embed"):
            raise ValueError(f'method must be "embed" or None, not {method!r}')
        outputs = forward(self.variant, variables["params"], images, InXla(integer))
        return outputs[EMBEDDING if method else LOGITS]

    def prepared(self, batch_size: int, image_size: tuple[int, int], output: Output) -> PreparedNet:
        """Return the net prepared for `make_predictor`.

        On a CPU with AVX-512 VNNI the net runs on native integer products. Elsewhere its integers are held exactly
        in float32, since XLA has no fast integer convolution on CPUs. For faster 8-bit inference there, export the net
        (`export_quantized_onnx`) for a runtime with integer kernels.
        """
        integer = jax.default_backend() == "cpu" and native.int8_available()
        params: Mapping[str, Any] = pack_layers(self.variant, self.params, self.in_channels) if integer else self.params
        arithmetic = NativeIntegers() if integer else InXla(integer=False)

        def run(params: Mapping[str, Any], images: Array) -> Array:
            return forward(self.variant, params, images, arithmetic)[output]

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
    """Return a layer's real-valued `kernel` and `bias`, whether it is quantised or not."""
    if not is_quantized(layer):
        return {"kernel": layer["kernel"], "bias": layer["bias"]}
    kernel = np.asarray(layer["kernel"], np.float32) * layer["kernel_scale"]
    return {"kernel": kernel, "bias": layer["bias"] * (layer["input_scale"] * layer["kernel_scale"])}


def safe_weight_scale(scale: np.ndarray, bias: np.ndarray, input_scale: Any) -> np.ndarray:
    """Return the weight scales, raised where the bias would not fit in int32; the weights are negligible there."""
    least = np.abs(bias) / (np.float32(input_scale) * LARGEST_BIAS)
    return np.maximum(scale, least).astype(np.float32)


def forward(variant: Variant, params: Mapping[str, Any], images: Array, arithmetic: Arithmetic) -> dict[str, Array]:
    """Return the inputs of a quantised net's layers, its logits and its embeddings.

    The next layer's input is `round(accumulator * (input_scale * kernel_scale / next_scale))` in float32, ties to even,
    saturated to 0..255 (which is the ReLU). ONNX Runtime's QLinearConv computes the same.

    Args:
      variant: the architecture.
      params: `QuantizedNet.params`, with the kernels in the form that `arithmetic` requires.
      images: `[N, H, W, C]` float, normalised.
      arithmetic: implementation of the operations.

    Returns:
      Each layer's input by name, in integers where the layer is quantised, `logits`, and `embedding`, the pooled
      features before they are quantised for the classifier.
    """
    operations = IntegerOperations(variant, params, arithmetic)
    logits = walk(variant, operations, images.astype(jnp.float32))
    return operations.inputs | {LOGITS: logits}


@dataclasses.dataclass
class IntegerOperations(FloatOperations):
    """Operations of a quantised net. Integers are passed between layers with nothing but a ReLU between them.

    `arithmetic` computes what is quantised. `inputs` also records the embedding, under its name.
    """

    arithmetic: Arithmetic

    @functools.cached_property
    def _reader_of(self) -> dict[str, str]:
        """Name of each block -> name of the layer that reads its output."""
        return {block.name: reader for block, reader in with_readers(self.variant.blocks())}

    def read(self, name: str, x: Array) -> Array:
        """Return the layer's input in integers, or in real numbers if the layer is float."""
        layer = self.layers[name]
        if "input_scale" in layer and not jnp.issubdtype(x.dtype, jnp.integer):
            x = self.arithmetic.to_integers(x, layer["input_scale"], input_dtype(name))
        return super().read(name, x)

    def conv(self, block: BlockSpec, x: Array, *, activate: bool) -> Array:
        """Convolve integers, and round to the next layer's integers if it reads integers."""
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
        """Return the real-valued mean of the integers."""
        mean = self.arithmetic.mean(self.read(POOL, x), self.layers[POOL]["input_scale"])
        return super().read(EMBEDDING, mean)

    def linear(self, x: Array) -> Array:
        """Compute the classifier's logits from integers."""
        layer = self.layers[LINEAR]
        return self.arithmetic.logits(self.read(LINEAR, x), layer) if is_quantized(layer) else super().linear(x)
