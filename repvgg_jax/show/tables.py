"""Tables of the page."""

import dataclasses
from collections.abc import Mapping, Sequence

from .facts import StageCost
from .markup import Content, Markup, counted, tag


@dataclasses.dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
      head: its heading.
      kind: a class of the cells: "number", "chart", or "" for text.
      hint: what the heading means, where a word does not say it.
    """

    head: Content
    kind: str = "number"
    hint: str | None = None


Row = Sequence[Content]
"""The cells of a row, of which the first is its heading."""


def table(caption: str, columns: Sequence[Column], bodies: Sequence[tuple[Content, Sequence[Row]]]) -> Markup:
    """Return a table that can be scrolled sideways where it is too wide.

    Args:
      caption: what it shows.
      columns: the first one has the rows' headings.
      bodies: groups of rows with their headings, None for a group without.
    """
    heads = [tag("th", column.head, scope="col", class_=column.kind or None, title=column.hint) for column in columns]
    parts = [tag("thead", tag("tr", heads))]
    for heading, rows in bodies:
        lines = [_row(columns, row) for row in rows]
        if heading is not None:
            lines.insert(
                0, tag("tr", tag("th", tag("span", heading), scope="rowgroup", colspan=len(columns)), class_="group")
            )
        parts.append(tag("tbody", lines))
    whole = tag("table", tag("caption", caption), parts)
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def by_stage(stages: Sequence[StageCost], rows: Mapping[str, Row]) -> list[tuple[Content, Sequence[Row]]]:
    """Return the rows of layers, by name, as `table` wants them: stage by stage, then the rest."""
    bodies: list[tuple[Content, Sequence[Row]]] = []
    rest = dict(rows)
    for stage in stages:
        own = [rest.pop(name) for name in stage.blocks if name in rest]
        if own:
            heading = f"{stage.name}: {counted(len(stage.blocks), 'block')}, {stage.channels} channels, "
            bodies.append((f"{heading}{stage.out_size}\u00d7{stage.out_size} pixels out", own))
    return bodies + [("head", list(rest.values()))] if rest else bodies


def _row(columns: Sequence[Column], row: Row) -> Markup:
    cells = [tag("th", row[0], scope="row")]
    for column, cell in zip(columns[1:], row[1:], strict=True):
        cells.append(tag("td", cell, class_=column.kind or None))
    return tag("tr", cells)
