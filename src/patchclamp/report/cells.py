"""Table cells as HTML, each drawn by the role of its column.

`page.js` draws the same cells for rows beyond the first page (`cell` there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from patchclamp.core.document import Cell, Column, Table
from patchclamp.report.charts import cell_bar
from patchclamp.report.scale import Scale
from patchclamp.report.text import number, share, shown, visible

MAX_INDENT = 12
_SHARE = Scale(low=0.0, high=1.0)
_NUMERIC = ("number", "bar", "share")


@dataclass(frozen=True, kw_only=True)
class TableView:
    """A table as the page draws it: columns on show, the first rows, and the rest as text.

    Attributes:
        heads: for each column on show its place in the rows, itself, and for the
            role "bar" the ends of its axis.
        rows: the first rows as HTML.
        rest: the other rows as lines of tab-separated text, for a page without scripts.
        num_rows: how many rows the table has in all.
    """

    heads: tuple[tuple[int, Column, Scale | None], ...]
    rows: tuple[Markup, ...]
    rest: str
    num_rows: int


def table_view(table: Table, cap: int) -> TableView:
    """The table with its first `cap` rows drawn."""
    heads = tuple(
        (i, column, _axis(table, i) if column.role == "bar" else None)
        for i, column in enumerate(table.columns)
        if column.role != "depth"
    )
    rows = tuple(_row(table, heads, row) for row in table.rows[:cap])
    rest = "\n".join(
        "\t".join(_as_text(column, row[i]) for i, column, _ in heads) for row in table.rows[cap:]
    )
    return TableView(heads=heads, rows=rows, rest=rest, num_rows=len(table.rows))


def is_numeric(column: Column) -> bool:
    """Whether cells of this column stand at the right."""
    return column.role in _NUMERIC


def _axis(table: Table, index: int) -> Scale:
    """Zero to the largest value, or as far to both sides where a value is negative."""
    values = [row[index] for row in table.rows]
    numbers = [float(x) for x in values if isinstance(x, int | float)]
    most = max((abs(x) for x in numbers), default=0.0) or 1.0
    return Scale(low=-most if any(x < 0 for x in numbers) else 0.0, high=most)


def _row(
    table: Table, heads: Sequence[tuple[int, Column, Scale | None]], row: Sequence[Cell]
) -> Markup:
    cells = []
    for i, column, axis in heads:
        depth = row[i - 1] if i and table.columns[i - 1].role == "depth" else 0
        cells.append(_cell(column, row[i], axis, depth if isinstance(depth, int) else 0))
    return Markup("<tr>{}</tr>").format(Markup().join(cells))


def _cell(column: Column, value: Cell, axis: Scale | None, depth: int) -> Markup:
    kind = f"c-{column.role}"
    if depth:
        kind += f" in-{min(depth, MAX_INDENT)}"
    if value is None:
        body = Markup('<span class="none">\u2013</span>')
    elif isinstance(value, bool):
        body = _flag(value)
    elif isinstance(value, str):
        body = shown(value)
    elif column.role == "share":
        body = cell_bar(0.0, min(max(float(value), 0.0), 1.0), _SHARE) + share(float(value))
    elif column.role == "bar" and axis is not None:
        body = cell_bar(min(0.0, value), max(0.0, value), axis) + number(value)
    else:
        body = Markup(number(value))
    return Markup('<td class="{}">{}</td>').format(kind, body)


def _flag(value: bool) -> Markup:
    if value:
        return Markup('<span class="yes"><i aria-hidden="true">\u25cf</i> yes</span>')
    return Markup('<span class="no"><i aria-hidden="true">\u25cb</i> no</span>')


def _as_text(column: Column, value: Cell) -> str:
    if value is None:
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return visible(value)
    return share(float(value)) if column.role == "share" else number(value)
