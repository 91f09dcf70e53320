"""What quantisation does to each layer, so that one sees which of them hurts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..text_table import text_table
from .equalize import output_ranges


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
      name: the layer's.
      largest_weight: of the float net as it was given, absolute.
      spread: of the same, the largest range of an output channel over the median one: what one scale has to span.
      equalized_spread: the same after equalisation; equal to `spread` without.
      largest_input: where the layer's input saturates; None in float.
      weight_sqnr: signal to quantisation noise of the weights, dB (`sqnr`); infinite in float, as the next two may be.
      output_sqnr: of the output before the ReLU with this layer alone quantised, dB.
      network_sqnr: of the same with all layers before it quantised too, dB.
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
    """Return the largest range of an output channel over the median one; 1 for a kernel of zeros."""
    ranges = output_ranges(kernel)
    middle = float(np.median(ranges))
    return float(ranges.max()) / middle if middle else 1.0


def sqnr(expected: Any, quantized: Any) -> float:
    """Return signal to quantisation noise, `10 log10(signal power / noise power)`, dB, over channels alike.

    The noise's share of the power is taken channel by channel, at most 1, and averaged: powers added over all channels
    would be the largest channel's, which one scale for all of them serves well, and hide that it has ruined the others.

    Args:
      expected: `[…, C]`; channels of zeros are left out.
      quantized: the same after quantisation.
    """
    expected, quantized = (np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1]) for x in (expected, quantized))
    signal, noise = np.square(expected).sum(0), np.square(expected - quantized).sum(0)
    alive = signal > 0
    share = np.minimum(noise[alive] / signal[alive], 1).mean() if alive.any() else 0.0
    return float(-10 * np.log10(share)) if share else np.inf


def report_table(reports: Sequence[LayerReport]) -> str:
    """Return the reports as text, one line per layer."""
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
