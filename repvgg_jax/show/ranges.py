"""Ranges of weights and activations, layer by layer, in the deploy form."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from ..net.activations import activation_function
from ..net.variants import BlockSpec, Variant
from ..net.walk import walk
from ..quantization import QuantizedNet
from ..quantization.arithmetic import InXla
from ..quantization.calibration import PERCENTILE
from ..quantization.equalize import output_ranges
from ..quantization.net import IntegerOperations, dequantized
from ..quantization.quantizer import levels
from ..quantization.stack import LINEAR, FloatOperations, Layers
from .facts import LayerInput, LayerWeights, Spread

DROPPED_BITS = 17
"""Number of mantissa bits (of 23) to drop from a float32. The other bits are the bin index, with 64 bins per octave."""

BINS = 1 << (31 - DROPPED_BITS)


def weight_ranges(variant: Variant, layers: Layers) -> tuple[LayerWeights, ...]:
    """Return the weight ranges of all layers, as real numbers.

    Args:
      variant: the architecture.
      layers: `quantization.stack.Layers`, or the parameters of a `QuantizedNet`; without `linear` if the file has no
        classifier.
    """
    facts = []
    for name in (*(block.name for block in variant.blocks()), LINEAR):
        if name in layers:
            kernel = np.asarray(dequantized(layers[name])["kernel"])
            extremes = float(kernel.min()), float(kernel.max())
            facts.append(LayerWeights(name, kernel.shape, *extremes, Spread.of(output_ranges(kernel))))
    return tuple(facts)


@dataclasses.dataclass
class _Seen:
    """Statistics of one layer's input so far. An INT8 net saturates the input at `limit`."""

    channels: np.ndarray
    limit: float | None
    lowest: float = np.inf
    highest: float = -np.inf
    values: int = 0
    zeros: int = 0
    saturated: int = 0
    bins: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, x: np.ndarray) -> None:
        """Add float32 values `[…, C]`."""
        sizes = np.abs(x)
        self.channels = np.maximum(self.channels, sizes.max(tuple(range(x.ndim - 1))))
        self.lowest, self.highest = min(self.lowest, float(x.min())), max(self.highest, float(x.max()))
        self.values += x.size
        self.zeros += int(x.size - np.count_nonzero(x))
        self.bins += np.bincount(sizes.view(np.uint32).ravel() >> DROPPED_BITS, minlength=BINS)
        if self.limit is not None:
            self.saturated += int((sizes >= self.limit).sum())

    def facts(self, name: str) -> LayerInput:
        """Return the facts about this input."""
        place = int(np.searchsorted(np.cumsum(self.bins), self.values * (PERCENTILE / 100)))
        edge = np.array(min(place + 1, BINS - 1) << DROPPED_BITS, np.uint32).view(np.float32)
        return LayerInput(
            name=name,
            lowest=self.lowest,
            highest=self.highest,
            usual=min(float(edge), float(self.channels.max())) if place else 0.0,
            zeros=self.zeros / self.values,
            spread=Spread.of(self.channels),
            limit=self.limit,
            saturated=self.saturated / self.values,
        )


class Recorder:
    """Recorder of the ranges of every layer's input."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def add(self, name: str, x: Array, input_scale: Any = None) -> None:
        """Record a layer's input: real numbers, or integers with their scale."""
        values, limit = np.asarray(x, np.float32), None
        if input_scale is not None and np.issubdtype(x.dtype, np.integer):
            values = values * np.float32(input_scale)
            limit = float(levels(x.dtype) * np.float32(input_scale))
        if name not in self._seen:
            self._seen[name] = _Seen(np.zeros(values.shape[-1], np.float32), limit)
        self._seen[name].add(values)

    def facts(self, without: Sequence[str] = ()) -> tuple[LayerInput, ...]:
        """Return the facts about all inputs, from image to classifier, except for the layers named in `without`."""
        return tuple(seen.facts(name) for name, seen in self._seen.items() if name not in without)


@dataclasses.dataclass
class _FloatRecording(FloatOperations):
    recorder: Recorder

    def read(self, name: str, x: Array) -> Array:
        self.inputs.clear()  # keeping all inputs of a deep net would exhaust memory
        self.recorder.add(name, x)
        return super().read(name, x)

    def activation(self, block: BlockSpec, x: Array) -> Array:
        """Apply the variant's activation function, which need not be a ReLU."""
        del block
        return activation_function(self.variant.activation)(x)


@dataclasses.dataclass
class _IntegerRecording(IntegerOperations):
    recorder: Recorder

    def read(self, name: str, x: Array) -> Array:
        self.inputs.clear()
        x = super().read(name, x)
        self.recorder.add(name, x, self.layers[name].get("input_scale"))
        return x


def record(variant: Variant, layers: Layers, images: np.ndarray, recorder: Recorder) -> tuple[np.ndarray, np.ndarray]:
    """Compute a float net layer by layer, with direct convolutions, one image at a time.

    Args:
      variant: the architecture.
      layers: layers of the deploy form.
      images: `[N, H, W, C]`, normalised.
      recorder: records the input of every layer.

    Returns:
      Logits `[N, classes]` and pooled features `[N, C]`.
    """
    logits, embeddings = [], []
    for image in images:
        operations = _FloatRecording(variant, layers, recorder)
        logits.append(np.asarray(walk(variant, operations, jnp.asarray(image[None]))))
        embeddings.append(np.asarray(operations.inputs[LINEAR]))
    return np.concatenate(logits), np.concatenate(embeddings)


def record_quantized(net: QuantizedNet, images: np.ndarray, recorder: Recorder) -> np.ndarray:
    """Compute an INT8 net layer by layer in XLA; return its logits `[N, classes]`. Arguments are as for `record`."""
    params: Mapping[str, Any] = jax.tree.map(jnp.asarray, dict(net.params))

    def logits(image: np.ndarray) -> np.ndarray:
        operations = _IntegerRecording(net.variant, params, InXla(integer=False), recorder)
        return np.asarray(walk(net.variant, operations, jnp.asarray(image[None])))

    return np.concatenate([logits(image) for image in images])
