"""Report on the quantisation error of each layer, which shows the layers that lose accuracy."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..text_table import text_table
from .equalize import output_ranges


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Quantisation report on one layer.

    Attributes:
      name: name of the layer.
      largest_weight: largest absolute weight of the original float net.
      spread: largest range of an output channel over the median range, in the original float net; a per-layer scale
        has to span it.
      equalized_spread: the spread after equalisation; equal to `spread` without equalisation.
      largest_input: value at which the layer's input saturates; None for a float layer.
      weight_sqnr: signal-to-quantisation-noise ratio (`sqnr`) of the weights, in dB; infinite for a float layer, as the
        next two may be.
      output_sqnr: ratio of the output before the ReLU with only this layer quantised, in dB.
      network_sqnr: the same with all preceding layers quantised too, in dB.
    """

    name: str
    largest_weight: float
    spread: float
    equalized_spread: float
    largest_input: float | None
    weight_sqnr: float
    output_sqnr: float
    network_sqnr: float


def spread(kernel: np.ndarray) -> float:
    """Return the largest range of an output channel divided by the median range; 1 for a kernel of zeros."""
    ranges = output_ranges(kernel)
    middle = float(np.median(ranges))
    return float(ranges.max()) / middle if middle else 1.0


def sqnr(expected: Any, quantized: Any) -> float:
    """Return the signal-to-quantisation-noise ratio, `10 log10(signal power / noise power)`, in dB.

    The ratio of noise to signal power is computed per channel, limited to 1, and averaged over channels. Powers summed
    over all channels would be dominated by the largest channel, for which a shared scale is good, and would hide the
    damage to the others.

    Args:
      expected: `[…, C]`; channels of zeros are ignored.
      quantized: the same values after quantisation.
    """
    expected, quantized = (np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1]) for x in (expected, quantized))
    signal, noise = np.square(expected).sum(0), np.square(expected - quantized).sum(0)
    alive = signal > 0
    share = np.minimum(noise[alive] / signal[alive], 1).mean() if alive.any() else 0.0
    return float(-10 * np.log10(share)) if share else np.inf


def report_table(reports: Sequence[LayerReport]) -> str:
    """Return the reports as a text table, one line per layer."""
    header = ("layer", "|w| max", "spread", "equalised", "|x| max", "weights dB", "alone dB", "in net dB")
    rows = [header] + [
        (
            report.name,
            f"{report.largest_weight:.3g}",
            f"{report.spread:.3g}",
            f"{report.equalized_spread:.3g}",
            "float" if report.largest_input is None else f"{report.largest_input:.3g}",
            f"{report.weight_sqnr:.1f}",
            f"{report.output_sqnr:.1f}",
            f"{report.network_sqnr:.1f}",
        )
        for report in reports
    ]
    return "\n".join(text_table(rows, right=True))
