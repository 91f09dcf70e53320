"""Tables for the page."""

import dataclasses
from collections.abc import Mapping, Sequence

from .facts import StageCost
from .markup import Content, Markup, counted, tag


@dataclasses.dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
      head: heading.
      kind: CSS class of the cells: "number", "chart", or "" for text.
      hint: tooltip that explains the heading.
    """

    head: Content
    kind: str = "number"
    hint: str | None = None


Row = Sequence[Content]
"""Cells of a row; the first one is its heading."""


def table(caption: str, columns: Sequence[Column], bodies: Sequence[tuple[Content, Sequence[Row]]]) -> Markup:
    """Return a table that scrolls sideways if it is too wide.

    Args:
      caption: caption of the table.
      columns: columns; the first one contains the rows' headings.
      bodies: groups of rows with their headings; None for a group without a heading.
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
    """Group the rows of layers, given by name, for `table`: stage by stage, then the rest."""
    bodies: list[tuple[Content, Sequence[Row]]] = []
    rest = dict(rows)
    for stage in stages:
        blocks = [rest.pop(name) for name in stage.blocks if name in rest]
        if blocks:
            heading = f"{stage.name}: {counted(len(stage.blocks), 'block')}, {stage.channels} channels, "
            bodies.append((f"{heading}output {stage.out_size}\u00d7{stage.out_size} pixels", blocks))
    return bodies + [("head", list(rest.values()))] if rest else bodies


def _row(columns: Sequence[Column], row: Row) -> Markup:
    cells = [tag("th", row[0], scope="row")]
    for column, cell in zip(columns[1:], row[1:], strict=True):
        cells.append(tag("td", cell, class_=column.kind or None))
    return tag("tr", cells)
