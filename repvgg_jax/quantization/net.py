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
from ..net.variants import Variant
from ..preprocess import Preprocessing
from .arithmetic import Arithmetic, InXla, NativeIntegers, accumulate, is_quantized, pack_layers
from .calibration import input_dtype
from .quantizer import UNSIGNED, WEIGHT_LEVELS, quantize
from .stack import LINEAR, POOL, activate, geometry, linear_map, with_readers

if TYPE_CHECKING:
    from .report import LayerReport

LARGEST_BIAS = 2**30
"""Of an int32 bias; what is left of the range is for the sum of the products."""


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedNet:
    """A deploy-form net with 8-bit weights and activations.

    Attributes:
      variant: the architecture.
      num_classes: width of the classifier.
      in_channels: of an image.
      params: by layer. A quantised one has `kernel` int8 `[3, 3, I / groups, O]` (`linear`: `[C, classes]`),
        `kernel_scale` float32 `[O]`, `bias` int32 `[O]` in units of `input_scale * kernel_scale`, and `input_scale`
        float32; one left in float has `kernel` and `bias` float32. `pool` has only an `input_scale`. Channel gates
        (`se`, `post_se`) are float.
      preprocessing: how images are prepared.
      class_names: names by class index, if known.
      report: what quantisation did to each layer; empty for a net from a file.
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
        """As `apply` takes them."""
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
          variables: this net's.
          images: `[N, H, W, C]` float, normalised.
          train: changes nothing.
          integer: multiply and add in integers (int8 x int8 -> int32) instead of in float32, which holds the same
            integers exactly up to 2^24 and is faster wherever there is no integer convolution, as in XLA on CPUs.
          method: "embed" for the pooled features that the classifier reads, before they are quantised for it.

        Returns:
          `[N, num_classes]` float32; embeddings: `[N, variant.widths[-1]]`.

        Raises:
          ValueError: an unknown method.
        """
        del train
        if method not in (None, "embed"):
            raise ValueError(f'method must be "embed" or None, not {method!r}')
        outputs = forward(self.variant, variables["params"], images, integer=integer)
        return embedding(variables["params"], outputs) if method else outputs["logits"]

    def prepared(self, batch_size: int, image_size: tuple[int, int], output: Output) -> PreparedNet:
        """Return the net made ready for `make_predictor`.

        On a CPU with AVX-512 VNNI the body runs on native integer convolutions. Elsewhere its integers are held in
        float32, exactly, since XLA has no fast integer convolution on CPUs: where 8 bits should buy speed there,
        export the net (`export_quantized_onnx`) for a runtime with integer kernels.
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
        """Logits `[N, num_classes]` of normalised images `[N, H, W, C]`."""
        return self._compiled(self.variables, jnp.asarray(images))

    @functools.cached_property
    def _compiled(self) -> Any:
        return jax.jit(self.apply)


def quantize_layer(layer: Mapping[str, Any], kernel: np.ndarray, scale: np.ndarray, input_scale: Any) -> dict[str, Any]:
    """A quantised layer from its float bias and its integers.

    Args:
      layer: the float layer, its bias as it is to be; a gate it has is kept.
      kernel: the weights' integers, of any dtype.
      scale: of each output channel, `[O]`, as from `safe_weight_scale`.
      input_scale: of the layer's input.
    """
    unit = np.float32(input_scale) * scale.astype(np.float32)
    return {name: tree for name, tree in layer.items() if name not in ("kernel", "bias")} | {
        "kernel": np.clip(kernel, -WEIGHT_LEVELS, WEIGHT_LEVELS).astype(np.int8),
        "kernel_scale": scale.astype(np.float32),
        "bias": np.rint(layer["bias"].astype(np.float64) / unit).astype(np.int32),
        "input_scale": np.float32(input_scale),
    }


def dequantized(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's real `kernel` and `bias`, whether it is quantised or not."""
    if not is_quantized(layer):
        return {"kernel": layer["kernel"], "bias": layer["bias"]}
    kernel = np.asarray(layer["kernel"], np.float32) * layer["kernel_scale"]
    return {"kernel": kernel, "bias": layer["bias"] * (layer["input_scale"] * layer["kernel_scale"])}


def safe_weight_scale(scale: np.ndarray, bias: np.ndarray, input_scale: Any) -> np.ndarray:
    """Weight scales, raised where a channel's bias would be no int32: all its weights are next to nothing then."""
    least = np.abs(bias) / (np.float32(input_scale) * LARGEST_BIAS)
    return np.maximum(scale, least).astype(np.float32)


def forward(
    variant: Variant, params: Mapping[str, Any], images: Array, *, integer: bool, arithmetic: Arithmetic | None = None
) -> dict[str, Array]:
    """The quantised net's layers, one after another.

    An accumulator becomes the next layer's input by `round(accumulator * (input_scale * kernel_scale / next_scale))`
    in float32, ties to even, saturated to 0..255 (which is the ReLU): what ONNX Runtime's QLinearConv computes too.

    Args:
      variant: the architecture.
      params: `QuantizedNet.params`, the kernels of the body as the arithmetic wants them.
      images: `[N, H, W, C]` float, normalised.
      integer: in integers, or in floats that hold them.
      arithmetic: computes the body's quantised layers; XLA if None.

    Returns:
      What each layer reads, by name, integers where it is quantised; and `logits`.
    """
    arithmetic = arithmetic or InXla(integer)
    seen = {}
    x, scale = images.astype(jnp.float32), None  # scale: of the integers x; None where x is real
    for spec, following in with_readers(variant.blocks()):
        layer, next_scale = params[spec.name], params.get(following, {}).get("input_scale")
        if not is_quantized(layer):
            seen[spec.name] = x = _real(x, scale)
            y = linear_map(geometry(spec), x, layer["kernel"]) + channelwise(layer["bias"])
        else:
            if scale is None:
                x = quantize(x, layer["input_scale"], input_dtype(spec.name))
            seen[spec.name] = x
            unit = layer["input_scale"] * layer["kernel_scale"]
            if variant.squeeze_excite is None and next_scale is not None:
                x, scale = arithmetic.rounded(spec, x, layer, unit / next_scale), next_scale
                continue
            y = arithmetic.totals(spec, x, layer).astype(jnp.float32) * channelwise(unit)
        x, scale = activate(variant, spec, layer, y), None

    pool, linear = params.get(POOL), params[LINEAR]
    if scale is None and pool is not None:
        x, scale = quantize(x, pool["input_scale"], UNSIGNED), pool["input_scale"]
    seen[POOL] = x
    pooled = _mean(x, scale)
    if not is_quantized(linear):
        seen[LINEAR] = pooled
        return seen | {"logits": pooled @ linear["kernel"] + channelwise(linear["bias"], pooled.ndim)}
    seen[LINEAR] = x = quantize(pooled, linear["input_scale"], UNSIGNED)
    total = accumulate(None, x, linear, integer)
    unit = linear["input_scale"] * linear["kernel_scale"]
    return seen | {"logits": total.astype(jnp.float32) * channelwise(unit, total.ndim)}


def embedding(params: Mapping[str, Any], outputs: Mapping[str, Array]) -> Array:
    """Return the pooled features `[N, C]`, real numbers, from what `forward` returns."""
    x = outputs[POOL]
    return _mean(x, params[POOL]["input_scale"] if jnp.issubdtype(x.dtype, jnp.integer) else None)


def _real(x: Array, scale: Array | None) -> Array:
    return x if scale is None else x.astype(jnp.float32) * scale


def _mean(x: Array, scale: Array | None) -> Array:
    """Real spatial means `[N, C]`; the sum of integers is exact."""
    if scale is None:
        return x.mean((1, 2))
    return x.astype(jnp.float32).sum((1, 2)) * (scale / (x.shape[1] * x.shape[2]))
