"""Conversion of a float net to integers layer by layer, each on the outputs of the quantised layers before it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from ..net.variants import BlockSpec, Variant
from ..net.walk import walk
from .adaround import AdaRoundOptions, learn_rounding
from .calibration import input_dtype
from .net import dequantized, quantize_layer, safe_weight_scale
from .quantizer import fake_quantize_activations, levels, weight_scale
from .report import LayerReport, spread, sqnr
from .stack import LINEAR, POOL, FloatOperations, Layers, layer_output, over_batches

REPORT_IMAGES = 64
"""Number of images to use if they are needed only for the report."""


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Settings for rounding float layers to integers.

    Attributes:
      per_channel: use one weight scale per output channel.
      bias_correction: correct each bias by the mean error of its channel on the calibration images, caused by rounding
        the weights and all earlier layers (Nagel et al., ICCV 2019, section 4.2, on data).
      adaround: learn the rounding of weights with these settings; None rounds to nearest.
      in_float: names of layers that stay in float.
    """

    per_channel: bool
    bias_correction: bool = False
    adaround: AdaRoundOptions | None = None
    in_float: tuple[str, ...] = ()


class Activations(NamedTuple):
    """A layer's inputs for all calibration images, in the float net and in the quantised net."""

    exact: np.ndarray
    quantized: np.ndarray

    def map(self, function: Callable[[Array], Array]) -> "Activations":
        """Apply `function` to both, batch by batch."""
        return Activations(*(over_batches(function, x) for x in self))


def quantize_layers(
    variant: Variant,
    layers: Layers,
    scales: dict[str, np.float32],
    images: np.ndarray,
    rounding: Rounding,
    before: Layers,
) -> tuple[dict[str, Any], tuple[LayerReport, ...]]:
    """Return `QuantizedNet.params`, and a report on each layer.

    Args:
      variant: the architecture.
      layers: the float net, equalised or not.
      scales: input scale of each layer and of `pool`.
      images: calibration images `[N, H, W, C]`, normalised; held in memory together with two layers' outputs.
      rounding: settings for the rounding.
      before: the float net before equalisation, for the report.
    """
    if not rounding.bias_correction and rounding.adaround is None:
        images = images[:REPORT_IMAGES]
    operations = RoundingOperations(FloatOperations(variant, layers), scales, rounding, before)
    walk(variant, operations, Activations(images, images))
    return operations.params | {POOL: {"input_scale": scales[POOL]}}, tuple(operations.reports)


@dataclasses.dataclass
class RoundingOperations:
    """Operations for `walk` that quantise each layer into `params` and add a report on it to `reports`.

    The other attributes are those of `quantize_layers`.
    """

    float_net: FloatOperations
    scales: dict[str, np.float32]
    rounding: Rounding
    before: Layers
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    reports: list[LayerReport] = dataclasses.field(default_factory=list)

    def conv(self, block: BlockSpec, x: Activations, *, activate: bool) -> Activations:
        """Quantise the block's kernel."""
        outputs = self._layer(block.name, block, x, relu=activate)
        return self.activation(block, outputs) if activate else outputs

    def gate(self, block: BlockSpec, name: str, x: Activations) -> Activations:
        """Compute in float, as the quantised net does."""
        return x.map(lambda batch: self.float_net.gate(block, name, batch))

    def activation(self, block: BlockSpec, x: Activations) -> Activations:
        """Apply ReLU."""
        return x.map(lambda batch: self.float_net.activation(block, batch))

    def pool(self, x: Activations) -> Activations:
        """Average the last block's output over pixels, in the quantised net after quantising it to 8 bits."""
        return Activations(x.exact.mean((1, 2)), self._fake_quantized(POOL, x.quantized).mean((1, 2)))

    def linear(self, x: Activations) -> Activations:
        """Quantise the classifier."""
        return self._layer(LINEAR, None, x, relu=False)

    def _layer(self, name: str, spec: BlockSpec | None, x: Activations, *, relu: bool) -> Activations:
        """Quantise one layer; return its outputs before any ReLU in both nets. `relu`: whether one follows directly."""
        layer, before = self.float_net.layers[name], self.before[name]
        exact = _outputs(spec, layer, x.exact)
        alone, inputs, limit = x.exact, x.quantized, None
        if name in self.rounding.in_float:
            self.params[name] = dict(layer)
        else:
            alone, inputs = (self._fake_quantized(name, y) for y in x)
            limit = float(self.scales[name]) * levels(input_dtype(name))
            self.params[name] = _round(spec, layer, self.scales[name], inputs, exact, self.rounding, relu)
        rounded = dequantized(self.params[name])
        outputs = Activations(exact, _outputs(spec, rounded, inputs))
        self.reports.append(
            LayerReport(
                name,
                float(np.abs(before["kernel"]).max()),
                spread(before["kernel"]),
                spread(layer["kernel"]),
                limit,
                sqnr(layer["kernel"], rounded["kernel"]),
                sqnr(exact, _outputs(spec, rounded, alone)),
                sqnr(*outputs),
            )
        )
        return outputs

    def _fake_quantized(self, name: str, x: np.ndarray) -> np.ndarray:
        scale, dtype = self.scales[name], input_dtype(name)
        return over_batches(lambda batch: fake_quantize_activations(batch, scale, dtype), x)


def _round(
    spec: BlockSpec | None,
    layer: Any,
    input_scale: np.float32,
    inputs: np.ndarray,
    targets: np.ndarray,
    rounding: Rounding,
    relu: bool,
) -> dict[str, Any]:
    """Return one quantised layer, fitted to its inputs in the quantised net and its target outputs."""
    scale = safe_weight_scale(weight_scale(layer["kernel"], rounding.per_channel), layer["bias"], input_scale)
    if rounding.adaround is None:
        integers = np.rint(layer["kernel"] / scale)
    else:
        integers = learn_rounding(spec, layer, scale, inputs, targets, relu=relu, options=rounding.adaround)
    bias = layer["bias"]
    if rounding.bias_correction:
        outputs = _outputs(spec, {"kernel": (integers * scale).astype(np.float32), "bias": bias}, inputs)
        bias = bias + (targets - outputs).mean(tuple(range(targets.ndim - 1)))
    return quantize_layer({**layer, "bias": bias}, integers, scale, input_scale)


def _outputs(spec: BlockSpec | None, layer: Any, x: np.ndarray) -> np.ndarray:
    """Return a layer's outputs before gate and activation, for all images."""
    return over_batches(lambda batch: layer_output(spec, layer, batch), x)
