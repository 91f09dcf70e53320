"""Charts for table cells: inline SVG with positions in per cent of the width, so that scaling does not distort them."""

import dataclasses
import math
from collections.abc import Iterable

from .facts import HALF_STEP, OUTLIER, Spread
from .markup import Markup, significant, tag

LABELS = 4
"""Largest number of labelled ticks on an axis: cells are narrow on a phone."""

MAX_DECADES = 8
"""Largest length of a logarithmic axis. Smaller numbers are drawn at its left end."""


@dataclasses.dataclass(frozen=True)
class LogAxis:
    """A logarithmic axis from `10**first` to `10**last`, shared by all rows of a table."""

    first: int
    last: int

    @classmethod
    def over(cls, numbers: Iterable[float]) -> "LogAxis":
        """Return an axis of whole decades that covers all positive and finite numbers among `numbers`."""
        sizes = [math.log10(number) for number in numbers if number > 0 and math.isfinite(number)]
        last = math.ceil(max(sizes, default=1))
        return cls(max(math.floor(min(sizes, default=0)), last - MAX_DECADES), last) if sizes else cls(0, 1)

    @property
    def decades(self) -> int:
        """Length of the axis in decades."""
        return max(self.last - self.first, 1)

    def place(self, number: float) -> float:
        """Return the position of a number in per cent of the width; numbers outside the axis are placed at its ends."""
        if math.isnan(number) or number <= 0:
            return 0.0
        if math.isinf(number):
            return 100.0
        return min(max(100 * (math.log10(number) - self.first) / self.decades, 0.0), 100.0)

    def ticks(self) -> Markup:
        """Return the axis labels as an SVG for the column heading."""
        step = math.ceil((self.decades + 1) / LABELS)
        labels = []
        for exponent in range(self.first, self.first + self.decades + 1, step):
            share = self.place(10.0**exponent)
            anchor = "start" if share < 1 else "end" if share > 99 else "middle"
            label = significant(10.0**exponent, 1) if -3 <= exponent <= 3 else f"1e{exponent}".replace("-", "\u2212")
            labels.append(tag("text", label, x=_percent(share), y=11, text_anchor=anchor))
        return tag("svg", labels, class_="axis", height=14, aria_hidden="true")

    def grid(self) -> list[Markup]:
        """Return a grid line for each decade."""
        places = (self.place(10.0**exponent) for exponent in range(self.first, self.first + self.decades + 1))
        return [tag("line", x1=_percent(x), x2=_percent(x), y1=0, y2="100%", class_="grid") for x in places]


def range_chart(spread: Spread, axis: LogAxis, mark: float | None = None, *, vanishing: bool = True) -> Markup:
    """Return a chart of the channels' ranges: whisker, quartiles, median, and outliers as dots.

    Args:
      spread: statistics of a layer's channels.
      axis: axis of the column.
      mark: number to mark with a dashed line.
      vanishing: shade the ranges that become 0 with a single scale for the layer.
    """
    shapes = axis.grid()
    usual = min(spread.largest, OUTLIER * spread.median)
    if spread.largest:
        if vanishing:
            x = axis.place(spread.largest * HALF_STEP)
            shapes.append(tag("rect", x=0, width=_percent(x), y="15%", height="70%", class_="lost"))
        left, right = axis.place(spread.least), axis.place(usual)
        shapes.append(tag("line", x1=_percent(left), x2=_percent(right), y1="50%", y2="50%", class_="whisker"))
        left, right = axis.place(spread.lower), axis.place(spread.upper)
        width = _percent(max(right - left, 0.5))
        shapes.append(tag("rect", x=_percent(left), width=width, y="28%", height="44%", class_="box"))
        x = _percent(axis.place(spread.median))
        shapes.append(tag("line", x1=x, x2=x, y1="15%", y2="85%", class_="median"))
        dots = spread.largest_outliers or (spread.largest,)
        kind = "outlier" if spread.outliers else "largest"
        shapes += [tag("circle", cx=_percent(axis.place(dot)), cy="50%", r=3, class_=kind) for dot in dots]
    if mark is not None:
        x = _percent(axis.place(mark))
        shapes.append(tag("line", x1=x, x2=x, y1=0, y2="100%", class_="mark"))
    label = f"ranges {significant(spread.least)} to {significant(spread.largest)}, median {significant(spread.median)}"
    return tag("svg", shapes, class_="chart", height=20, role="img", aria_label=label)


def bar_chart(share: float, said: str) -> Markup:
    """Return a bar over a fraction of the width; `said` is its label for screen readers."""
    bar = tag("rect", x=0, y="20%", width=_percent(100 * share), height="60%", class_="bar", rx=2)
    return tag("svg", bar, class_="chart", height=16, role="img", aria_label=said)


def _percent(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".") + "%"
