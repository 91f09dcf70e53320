"""Equalisation: scales a layer's channels down and those of the next layer up, so that both quantise well.

Between two layers there are only ReLU, pooling and channel gates, and `relu(x / s) = relu(x) / s`. So dividing a
layer's output channel and multiplying the next layer's input channel by the same s > 0 does not change the net's
function.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..net.variants import Variant
from .stack import LINEAR, POOL

SWEEPS = 40
MAX_FACTOR = 1e4

NamedLayers = dict[str, dict[str, Any]]


def equalize_weights(variant: Variant, layers: NamedLayers) -> NamedLayers:
    """Equalise across layers for per-tensor weight scales (Nagel et al., ICCV 2019, section 4.1).

    At the fixed point, each channel has the same range in the layer that writes it and in the layer that reads it.

    Args:
      variant: the architecture.
      layers: the float net.

    Returns:
      New layers that compute the same function.
    """
    layers = _copy(layers)
    for _ in range(SWEEPS):
        change = 0.0
        for writer, reader, groups in pairs(variant):
            written = output_ranges(layers[writer]["kernel"])
            read = input_ranges(layers[reader]["kernel"], groups)
            factors = _factors(written, read)
            _rescale(layers, writer, reader, groups, factors, variant.gate_name)
            change = max(change, float(np.abs(np.log(factors)).max()))
        if change < 1e-3:
            break
    return layers


def equalize_activations(variant: Variant, layers: NamedLayers, ranges: Mapping[str, np.ndarray]) -> NamedLayers:
    """Equalise for per-channel weight scales, which adapt to any ranges of a layer's output channels.

    This leaves the activation, which has one scale for all channels, to be balanced against the input channels of the
    layer that reads it, which share the scale of each output channel. SmoothQuant (Xiao et al., ICML 2023) does the
    same for transformers; this is its strength 1/2.

    Args:
      variant: the architecture.
      layers: the float net.
      ranges: largest absolute value of each channel of each layer's input (`channel_ranges`).

    Returns:
      New layers that compute the same function.
    """
    layers = _copy(layers)
    for writer, reader, groups in pairs(variant):
        kernel = layers[reader]["kernel"]
        relative = kernel / np.maximum(output_ranges(kernel), 1e-30)
        factors = _factors(ranges[POOL if reader == LINEAR else reader], input_ranges(relative, groups))
        _rescale(layers, writer, reader, groups, factors, variant.gate_name)
    return layers


def pairs(variant: Variant) -> list[tuple[str, str, int]]:
    """Return `(writing layer, reading layer, groups of the reading layer)` for each pair of adjacent layers."""
    specs = variant.blocks()
    readers = [(spec.name, spec.groups) for spec in specs[1:]] + [(LINEAR, 1)]
    return [(writer.name, *reader) for writer, reader in zip(specs, readers, strict=True)]


def output_ranges(kernel: np.ndarray) -> np.ndarray:
    """Return the largest absolute weight of each output channel, `[…, I, O] -> [O]`."""
    return np.abs(kernel).max(tuple(range(kernel.ndim - 1)))


def input_ranges(kernel: np.ndarray, groups: int = 1) -> np.ndarray:
    """Return the largest absolute weight of each input channel, `[…, I / groups, O] -> [I]`."""
    *_, per_group, outputs = kernel.shape
    return np.abs(kernel).reshape(-1, per_group, groups, outputs // groups).max((0, 3)).T.reshape(-1)


def _factors(written: np.ndarray, read: np.ndarray) -> np.ndarray:
    """Return the factors by which to divide the written and multiply the read channels so that their ranges match.

    Both get the geometric mean of their ranges. Dead channels, with range zero on either side, get the median factor.
    """
    alive = (written > 0) & (read > 0)
    ratio = np.where(alive, written, 1) / np.where(alive, read, 1)
    middle = np.exp(np.median(np.log(ratio[alive]))) if alive.any() else 1.0
    ratio = np.where(alive, ratio, middle)
    return np.clip(np.sqrt(ratio), 1 / MAX_FACTOR, MAX_FACTOR).astype(np.float32)


def _rescale(layers: NamedLayers, writer: str, reader: str, groups: int, factors: np.ndarray, gate: str | None) -> None:
    """Divide the writer's output channels by `factors`, and multiply the weights that read them."""
    layers[writer]["kernel"] = layers[writer]["kernel"] / factors
    layers[writer]["bias"] = layers[writer]["bias"] / factors
    if gate is not None:  # its output scales the channels, and must stay the same
        down = layers[writer][gate]["down"]
        layers[writer][gate] = layers[writer][gate] | {"down": down | {"kernel": down["kernel"] * factors[:, None]}}
    kernel = layers[reader]["kernel"]
    *window, per_group, outputs = kernel.shape
    by_group = factors.reshape(groups, per_group).T[:, :, None]  # [I / groups, groups, 1]
    split = kernel.reshape(*window, per_group, groups, outputs // groups)
    layers[reader]["kernel"] = (split * by_group).reshape(kernel.shape)


def _copy(layers: NamedLayers) -> NamedLayers:
    return {name: dict(layer) for name, layer in layers.items()}
