"""From a float net and its scales to integers, one layer after another, each seeing what those before have become."""

import dataclasses
from typing import Any

import numpy as np

from ..net.variants import BlockSpec, Variant
from .adaround import AdaRoundOptions, learn_rounding
from .calibration import input_dtype
from .net import dequantized, quantize_layer, safe_weight_scale
from .quantizer import fake_quantize_activations, weight_scale
from .report import LayerReport, spread, sqnr
from .stack import POOL, Layers, activate, affine, named_specs, over_batches

REPORT_IMAGES = 64
"""How many are looked at where they serve nothing but the report."""


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How a float layer becomes a quantised one.

    Attributes:
      per_channel: a weight scale for each output channel.
      bias_correction: shift each bias by the mean error of its channel on the calibration images, which the rounding
        of the weights and of all inputs before has left (Nagel et al., ICCV 2019, section 4.2, on data).
      adaround: learn the rounding of weights; to the nearest if None.
      in_float: layers that stay in float.
    """

    per_channel: bool
    bias_correction: bool = False
    adaround: AdaRoundOptions | None = None
    in_float: tuple[str, ...] = ()


def quantize_layers(
    variant: Variant,
    layers: Layers,
    scales: dict[str, np.float32],
    images: np.ndarray,
    rounding: Rounding,
    given: Layers,
) -> tuple[dict[str, Any], tuple[LayerReport, ...]]:
    """`QuantizedNet.params`, and a report on each layer.

    Args:
      variant: the architecture.
      layers: the float net, equalised or not.
      scales: of each layer's input, and of `pool`'s.
      images: calibration images `[N, H, W, C]`, normalised; held in memory with two layers' outputs.
      rounding: how.
      given: the float net before equalisation, for the report.
    """
    params: dict[str, Any] = {}
    reports = []
    if not rounding.bias_correction and rounding.adaround is None:
        images = images[:REPORT_IMAGES]
    real = together = images  # what the layer reads in the float net, and in the quantised one
    for name, spec in named_specs(variant):
        if spec is None:
            together = _fake_quantized(together, scales, POOL).mean((1, 2))
            real = real.mean((1, 2))
        layer = layers[name]
        targets, alone, limit = _outputs(spec, layer, real), real, None
        if name in rounding.in_float:
            params[name] = dict(layer)
        else:
            alone, together = (_fake_quantized(x, scales, name) for x in (real, together))
            limit = float(scales[name]) * np.iinfo(input_dtype(name)).max
            relu = spec is not None and variant.squeeze_excite != "before_relu"
            params[name] = _round(spec, layer, scales[name], together, targets, rounding, relu)
        rounded = dequantized(params[name])
        outputs = _outputs(spec, rounded, together)
        reports.append(
            LayerReport(
                name,
                float(np.abs(given[name]["kernel"]).max()),
                spread(given[name]["kernel"]),
                spread(layer["kernel"]),
                limit,
                sqnr(layer["kernel"], rounded["kernel"]),
                sqnr(targets, _outputs(spec, rounded, alone)),
                sqnr(targets, outputs),
            )
        )
        if spec is not None:
            real, together = (_activated(variant, spec, layer, x) for x in (targets, outputs))
    return params | {POOL: {"input_scale": scales[POOL]}}, tuple(reports)


def _round(
    spec: BlockSpec | None,
    layer: Any,
    input_scale: np.float32,
    inputs: np.ndarray,
    targets: np.ndarray,
    rounding: Rounding,
    relu: bool,
) -> dict[str, Any]:
    """One quantised layer, from what it will read and what it should give."""
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
    """A layer's outputs before the ReLU, for all images."""
    return over_batches(lambda batch: affine(spec, layer, batch), x)


def _activated(variant: Variant, spec: BlockSpec, layer: Any, x: np.ndarray) -> np.ndarray:
    return over_batches(lambda batch: activate(variant, spec, layer, batch), x)


def _fake_quantized(x: np.ndarray, scales: dict[str, np.float32], name: str) -> np.ndarray:
    return over_batches(lambda batch: fake_quantize_activations(batch, scales[name], input_dtype(name)), x)
