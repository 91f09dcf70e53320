"""From a float net and its scales to integers, one layer after another, each seeing what the ones before have become."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..variants import BlockSpec, Variant
from .adaround import AdaRoundOptions, learn_rounding
from .calibration import input_dtype
from .net import quantize_layer, safe_weight_scale
from .quantizer import fake_quantize_activations, weight_scale
from .stack import LINEAR, POOL, activate, in_batches, linear_map


def quantize_layers(
    variant: Variant,
    layers: dict[str, dict[str, Any]],
    scales: dict[str, np.float32],
    images: np.ndarray,
    *,
    per_channel: bool,
    in_float: tuple[str, ...] = (),
    bias_correction: bool = False,
    adaround: AdaRoundOptions | None = None,
) -> dict[str, Any]:
    """`QuantizedNet.params`.

    Args:
      variant: the architecture.
      layers: the float net, equalised or not.
      scales: of each layer's input, and of `pool`'s.
      images: calibration images `[N, H, W, C]`, normalised; all are held in memory with one layer's output.
      per_channel: a weight scale for each output channel.
      in_float: layers that stay in float.
      bias_correction: shift each bias by the mean error of its channel on the calibration images, which the rounding
        of the weights and of all inputs before has left (Nagel et al., ICCV 2019, section 4.2, on data).
      adaround: learn the rounding of weights; to the nearest if None.
    """
    params: dict[str, Any] = {}
    needs_data = bias_correction or adaround is not None
    real = quantized = images  # what the layer reads in the float net, and in the quantised one
    for name, spec in [(spec.name, spec) for spec in variant.blocks()] + [(LINEAR, None)]:
        if spec is None and needs_data:
            pooled = fake_quantize_activations(jnp.asarray(quantized), scales[POOL], input_dtype(POOL))
            real, quantized = real.mean((1, 2)), np.asarray(pooled.mean((1, 2)))
        layer = layers[name]
        targets = _outputs(spec, layer, real) if needs_data else None
        if name in in_float:
            params[name] = layer
        else:
            scale = safe_weight_scale(weight_scale(layer["kernel"], per_channel), layer["bias"], scales[name])
            if targets is not None:
                quantized = np.asarray(fake_quantize_activations(quantized, scales[name], input_dtype(name)))
            if adaround is not None and targets is not None:
                relu = spec is not None and variant.squeeze_excite != "before_relu"
                integers = learn_rounding(spec, layer, scale, quantized, targets, relu=relu, options=adaround)
            else:
                integers = np.rint(layer["kernel"] / scale)
            if bias_correction and targets is not None:
                rounded = layer | {"kernel": (integers * scale).astype(np.float32)}
                error = (targets - _outputs(spec, rounded, quantized)).mean(tuple(range(targets.ndim - 1)))
                layer = layer | {"bias": layer["bias"] + error}
            params[name] = quantize_layer(layer, integers, scale, scales[name])
        if targets is not None and spec is not None:
            real = _activated(variant, spec, layer, targets)
            computed = _outputs(spec, dequantized(params[name]), quantized)
            quantized = _activated(variant, spec, layer, computed)
    return params | {POOL: {"input_scale": scales[POOL]}}


def dequantized(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer's float `kernel` and `bias`, whether it is quantised or not."""
    if "kernel_scale" not in layer:
        return layer
    kernel = layer["kernel"].astype(np.float32) * layer["kernel_scale"]
    return {"kernel": kernel, "bias": layer["bias"] * (layer["input_scale"] * layer["kernel_scale"])}


def _outputs(spec: BlockSpec | None, layer: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """A layer's outputs before the ReLU, for all images."""
    shape = None if spec is None else (spec.stride, spec.groups)
    return np.concatenate(in_batches(lambda batch: np.asarray(_affine(shape, batch, layer["kernel"], layer["bias"])), x))


@functools.partial(jax.jit, static_argnums=0)
def _affine(shape: tuple[int, int] | None, x: Array, kernel: Array, bias: Array) -> Array:
    """Layers of one shape share one compilation."""
    return linear_map(None if shape is None else BlockSpec("", "", 0, 0, *shape), x, kernel) + bias


def _activated(variant: Variant, spec: BlockSpec, layer: dict[str, Any], x: np.ndarray) -> np.ndarray:
    return np.concatenate(in_batches(lambda batch: np.asarray(activate(variant, spec, layer, batch)), x))
