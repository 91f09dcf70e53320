"""Quantisation error of each layer, to find the layers that lose the most."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..text_table import text_table
from .equalize import output_ranges


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Quantisation error of one layer. SQNR is the signal to quantisation noise ratio in dB (`sqnr`).

    Attributes:
      name: name of the layer.
      largest_weight: largest absolute weight in the float net, before equalisation.
      spread: largest range of an output channel divided by the median range, before equalisation: the ratio that a
        single weight scale has to cover.
      equalized_spread: spread after equalisation; equal to `spread` without equalisation.
      largest_input: value at which the layer's input saturates; None for a float layer.
      weight_sqnr: SQNR of the weights; infinite for a float layer, where the next two may be infinite too.
      output_sqnr: SQNR of the output before the ReLU if only this layer is quantised.
      network_sqnr: SQNR of the same output if all layers before it are quantised too.
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
    """Return the signal to quantisation noise ratio, `10 log10(signal power / noise power)`, in dB.

    The ratio of noise to signal power is computed per channel, limited to 1, and averaged, so that all channels count
    equally. Powers summed over all channels would be dominated by the largest channel. A common scale suits that one,
    so the sum would hide the damage to the others.

    Args:
      expected: exact values `[…, C]`; channels of zeros are ignored.
      quantized: values after quantisation, in the same shape.
    """
    expected, quantized = (np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1]) for x in (expected, quantized))
    signal, noise = np.square(expected).sum(0), np.square(expected - quantized).sum(0)
    alive = signal > 0
    share = np.minimum(noise[alive] / signal[alive], 1).mean() if alive.any() else 0.0
    return float(-10 * np.log10(share)) if share else np.inf


def report_table(reports: Sequence[LayerReport]) -> str:
    """Return the reports as a text table with one line per layer."""
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
