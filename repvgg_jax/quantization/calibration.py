"""Activation ranges: the part of a layer's input range that 8 bits should cover.

Each layer's input is summarised as a histogram of absolute values. A method chooses the threshold that becomes the
largest integer; larger values saturate.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
from jax import Array

from ..net.variants import Variant
from .quantizer import SIGNED, UNSIGNED, levels
from .stack import Layers, in_batches, layer_inputs

BINS = 2048
PERCENTILE = 99.99

Calibration = Literal["minmax", "percentile", "mse", "entropy"]


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Histogram of absolute values in `BINS` equal bins between 0 and `limit`.

    Attributes:
      counts: number of values per bin, `[BINS]`.
      limit: the largest absolute value.
      levels: the largest integer, 255 or 127.
    """

    counts: np.ndarray
    limit: float
    levels: int

    @property
    def centers(self) -> np.ndarray:
        """Return the bin centres, `[BINS]`."""
        return (np.arange(len(self.counts)) + 0.5) * (self.limit / len(self.counts))


def minmax(histogram: Histogram) -> float:
    """Return the largest value, so that nothing saturates."""
    return histogram.limit


def percentile(histogram: Histogram, share: float = PERCENTILE) -> float:
    """Return the value below which `share` per cent of all values are."""
    below = np.cumsum(histogram.counts)
    place = int(np.searchsorted(below, below[-1] * share / 100))
    return histogram.limit * (place + 1) / len(histogram.counts)


def mse(histogram: Histogram) -> float:
    """Return the threshold with the smallest mean squared error from rounding and saturation together."""
    values, candidates = histogram.centers, _candidates(histogram)
    scales = (candidates / histogram.levels)[:, None]
    error = values - scales * np.clip(np.rint(values / scales), 0, histogram.levels)
    return float(candidates[np.argmin((error**2 * histogram.counts).sum(-1))])


def entropy(histogram: Histogram) -> float:
    """Return the threshold whose quantised distribution loses the least information (Kullback-Leibler divergence).

    Migacz, "8-bit inference with TensorRT" (GTC 2017): compares the distribution up to the threshold, with everything
    above added to its last bin, to the same distribution averaged over the bins of each integer.
    """
    best, threshold = np.inf, histogram.limit
    for kept in range(histogram.levels + 1, len(histogram.counts) + 1):
        divergence = _divergence(histogram, kept)
        if divergence < best:
            best, threshold = divergence, histogram.limit * kept / len(histogram.counts)
    return threshold


def _divergence(histogram: Histogram, kept: int) -> float:
    inside = histogram.counts[:kept].astype(np.float64)
    heaped = inside.copy()
    heaped[-1] += histogram.counts[kept:].sum()
    level = np.arange(kept) * (histogram.levels + 1) // kept
    occupied = inside > 0
    totals, members = np.bincount(level, inside), np.bincount(level, occupied)
    averaged = np.where(occupied, (totals / np.maximum(members, 1))[level], 0)
    if averaged.sum() == 0:
        return np.inf
    p, q = heaped / heaped.sum(), averaged / averaged.sum()
    if (p[~occupied] > 0).any():  # saturated values in a bin without any others
        return np.inf
    return float((p[occupied] * np.log(np.maximum(p[occupied], 1e-30) / q[occupied])).sum())


def _candidates(histogram: Histogram) -> np.ndarray:
    return histogram.limit * np.linspace(0.02, 1, 150)


THRESHOLDS: dict[Calibration, Callable[[Histogram], float]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}


def input_dtype(name: str) -> np.dtype:
    """Return a layer's input dtype: int8 for the first layer, which reads the image, and uint8 after a ReLU."""
    return SIGNED if name == "stage0" else UNSIGNED


def channel_ranges(variant: Variant, layers: Layers, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return the largest absolute value of each channel of each layer's input, by layer, `[C]` each."""

    def largest(batch: Array) -> dict[str, np.ndarray]:
        inputs = layer_inputs(variant, layers, batch)
        return {name: np.abs(x).max(tuple(range(x.ndim - 1))) for name, x in jax.tree.map(np.asarray, inputs).items()}

    return jax.tree.map(lambda *maxima: np.max(maxima, 0), *in_batches(largest, images))


def input_scales(variant: Variant, layers: Layers, images: np.ndarray, method: Calibration) -> dict[str, np.float32]:
    """Return the scale of each layer's input, by name, including `pool`.

    Args:
      variant: the architecture.
      layers: the float net.
      images: calibration images `[N, H, W, C]`, normalised.
      method: method that chooses the threshold.
    """
    limits = {name: float(ranges.max()) for name, ranges in channel_ranges(variant, layers, images).items()}
    thresholds = limits
    if method != "minmax":
        histograms = _histograms(variant, layers, images, limits)
        thresholds = {name: THRESHOLDS[method](histogram) for name, histogram in histograms.items()}
    tiny = np.finfo(np.float32).tiny
    return {name: np.float32(max(t / levels(input_dtype(name)), tiny)) for name, t in thresholds.items()}


def _histograms(variant: Variant, layers: Layers, images: np.ndarray, limits: dict[str, float]) -> dict[str, Histogram]:
    counts = {name: np.zeros(BINS, np.int64) for name in limits}

    def count(batch: Array) -> None:
        for name, x in layer_inputs(variant, layers, batch).items():
            scaled = np.abs(np.asarray(x).ravel()) * np.float32(BINS / max(limits[name], 1e-30))
            places = np.minimum(scaled.astype(np.int32), BINS - 1)
            counts[name] += np.bincount(places, minlength=BINS)

    in_batches(count, images)
    return {name: Histogram(counts[name], limit, levels(input_dtype(name))) for name, limit in limits.items()}
