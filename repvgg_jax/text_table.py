"""Tables as text."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """Return the rows as lines with aligned columns; `right` right-aligns all columns but the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(cell.rjust(w) if right and n else cell.ljust(w) for n, (cell, w) in enumerate(cells)).rstrip()

    return [line(row) for row in rows]
