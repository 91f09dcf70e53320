"""Layer-by-layer quantisation of a float net; each layer reads the outputs of the layers quantised before it."""

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
"""Number of images used if they are needed only for the report."""


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Options for rounding float layers to quantised ones.

    Attributes:
      per_channel: use one weight scale per output channel.
      bias_correction: shift each bias by its channel's mean error on the calibration images, which comes from rounding
        the weights and all preceding inputs (Nagel et al., ICCV 2019, section 4.2, on data).
      adaround: learn the rounding of weights with these options; round to nearest if None.
      in_float: names of layers that stay in float.
    """

    per_channel: bool
    bias_correction: bool = False
    adaround: AdaRoundOptions | None = None
    in_float: tuple[str, ...] = ()


class Activations(NamedTuple):
    """A layer's input for all calibration images, in the float net and in the quantised net."""

    exact: np.ndarray
    quantized: np.ndarray

    def map(self, function: Callable[[Array], Array]) -> "Activations":
        """Return `function` applied to both, batch by batch."""
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
      scales: input scales of the layers and of `pool`.
      images: calibration images `[N, H, W, C]`, normalised; held in memory together with two layers' outputs.
      rounding: how layers are rounded.
      before: the float net before equalisation, for the report.
    """
    if not rounding.bias_correction and rounding.adaround is None:
        images = images[:REPORT_IMAGES]
    operations = RoundingOperations(FloatOperations(variant, layers), scales, rounding, before)
    walk(variant, operations, Activations(images, images))
    return operations.params | {POOL: {"input_scale": scales[POOL]}}, tuple(operations.reports)


@dataclasses.dataclass
class RoundingOperations:
    """Operations that quantise each layer in turn, adding to `params` and `reports`.

    The other attributes are as in `quantize_layers`.
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
        """Apply the gate in float, as in the quantised net."""
        return x.map(lambda batch: self.float_net.gate(block, name, batch))

    def activation(self, block: BlockSpec, x: Activations) -> Activations:
        """Apply ReLU."""
        return x.map(lambda batch: self.float_net.activation(block, batch))

    def pool(self, x: Activations) -> Activations:
        """Average the last block's output, fake-quantised in the quantised net."""
        return Activations(x.exact.mean((1, 2)), self._fake_quantized(POOL, x.quantized).mean((1, 2)))

    def linear(self, x: Activations) -> Activations:
        """Quantise the classifier."""
        return self._layer(LINEAR, None, x, relu=False)

    def _layer(self, name: str, spec: BlockSpec | None, x: Activations, *, relu: bool) -> Activations:
        """Quantise one layer; return its outputs in both nets, before any ReLU (`relu`: one follows directly)."""
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
    """Return one quantised layer, given its input in the quantised net and its target outputs."""
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
    """Return a layer's outputs for all images, before gate and activation."""
    return over_batches(lambda batch: layer_output(spec, layer, batch), x)
