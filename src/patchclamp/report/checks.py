"""What the types of a document cannot say: lengths that match, roles that exist, true PNGs.

Checked before a document is written or drawn and after it is read, so that a
page never shows a bar beside the wrong label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

from patchclamp.core.document import (
    SCHEMA_VERSION,
    Architecture,
    Bars,
    Block,
    Cell,
    Column,
    Curve,
    Diagram,
    Document,
    Examples,
    Facts,
    Histogram,
    Table,
)
from patchclamp.core.errors import DataError, nearest
from patchclamp.report.png import png_size

BLOCKS: dict[
    str, type[Table | Bars | Histogram | Curve | Examples | Facts | Diagram | Architecture]
] = {
    "table": Table,
    "bars": Bars,
    "histogram": Histogram,
    "curve": Curve,
    "examples": Examples,
    "facts": Facts,
    "diagram": Diagram,
    "architecture": Architecture,
}
NODE_KINDS = ("embed", "head", "mlp", "output", "unit")
BOX_KINDS = ("input", "output", "module", "operator", "rearrange")
ROLES = ("text", "number", "bar", "share", "flag", "address", "depth")
_SLACK = 1e-6  # a share summed in floats may pass 1 by rounding


def check_document(document: Document) -> None:
    """Raise DataError, with the place in it, for a document that contradicts itself."""
    if document.schema_version != SCHEMA_VERSION:
        raise DataError(
            "the document has another schema version",
            got=str(document.schema_version),
            expected=str(SCHEMA_VERSION),
        )
    _unique("section id", (section.id for section in document.sections))
    _unique("finding id", (finding.id for finding in document.findings))
    _check_block(document.header, "header")
    for i, section in enumerate(document.sections):
        for j, block in enumerate(section.blocks):
            _check_block(block, f"sections[{i}].blocks[{j}]")


def _unique(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"the {what} '{name}' occurs twice in the document")
        seen.add(name)


def _check_block(block: Block, where: str) -> None:
    if BLOCKS.get(block.kind) is not type(block):
        raise DataError(
            f"{where} is not what its kind says",
            got=f"kind '{block.kind}' on {type(block).__name__}",
            nearest=nearest(block.kind, BLOCKS),
        )
    if isinstance(block, Table):
        _check_table(block, where)
    elif isinstance(block, Bars):
        _check_bars(block, where)
    elif isinstance(block, Histogram):
        _check_histogram(block, where)
    elif isinstance(block, Curve):
        _check_curve(block, where)
    elif isinstance(block, Examples):
        _check_examples(block, where)
    elif isinstance(block, Diagram):
        _check_diagram(block, where)
    elif isinstance(block, Architecture):
        _check_architecture(block, where)


def _check_table(table: Table, where: str) -> None:
    for c, column in enumerate(table.columns):
        if column.role not in ROLES:
            raise DataError(
                f"{where}.columns[{c}] has an unknown role",
                got=f"'{column.role}'",
                expected=", ".join(ROLES),
                nearest=nearest(column.role, ROLES),
            )
    if table.columns and table.columns[-1].role == "depth":
        raise DataError(f"{where} ends in a depth column, which indents the column after it")
    for r, row in enumerate(table.rows):
        if len(row) != len(table.columns):
            raise DataError(
                f"{where}.rows[{r}] has the wrong number of cells",
                got=str(len(row)),
                expected=str(len(table.columns)),
            )
        for column, cell in zip(table.columns, row, strict=True):
            expected = _lacking(column, cell)
            if expected:
                raise DataError(
                    f"{where}.rows[{r}] has a cell that column '{column.name}' cannot draw",
                    got=repr(cell),
                    expected=expected,
                )


def _lacking(column: Column, cell: Cell) -> str:
    """What a cell of this column should have been; empty if it is."""
    if cell is None or column.role in ("text", "address"):
        return ""
    if column.role == "flag":
        return "" if isinstance(cell, bool) else "true, false or null"
    if isinstance(cell, bool | str):
        return "a number or null"
    if column.role == "share" and not -_SLACK <= cell <= 1 + _SLACK:
        return "a share between 0 and 1"
    if column.role == "depth" and not (isinstance(cell, int) and cell >= 0):
        return "a whole number, 0 or more"
    return ""


def _check_bars(bars: Bars, where: str) -> None:
    num = len(bars.labels)
    _lengths(where, num, values=bars.values)
    _pair(where, num, ("low", bars.low), ("high", bars.high))
    _pair(where, num, ("null_low", bars.null_low), ("null_high", bars.null_high))


def _check_histogram(histogram: Histogram, where: str) -> None:
    _lengths(where, len(histogram.counts) + 1, edges=histogram.edges)
    if any(a >= b for a, b in pairwise(histogram.edges)):
        raise DataError(f"{where}.edges do not increase")
    if any(count < 0 for count in histogram.counts):
        raise DataError(f"{where}.counts has a negative count")


def _check_curve(curve: Curve, where: str) -> None:
    _lengths(where, len(curve.x), y=curve.y)
    _pair(where, len(curve.x), ("low", curve.low), ("high", curve.high))
    if curve.weight:
        _lengths(where, len(curve.x), weight=curve.weight)
        if any(weight < 0 for weight in curve.weight):
            raise DataError(f"{where}.weight has a negative weight")


def _check_examples(examples: Examples, where: str) -> None:
    for u, unit in enumerate(examples.units):
        here = f"{where}.units[{u}]"
        if unit.pictures and unit.passages:
            raise DataError(f"{here} has pictures and passages", expected="one of the two")
        for p, picture in enumerate(unit.pictures):
            if png_size(picture.png_base64) is None:
                raise DataError(
                    f"{here}.pictures[{p}] is not a PNG in base64",
                    got=repr(picture.png_base64[:24]),
                )
        for p, passage in enumerate(unit.passages):
            _lengths(f"{here}.passages[{p}]", len(passage.tokens), strengths=passage.strengths)
            if not 0 <= passage.focus < len(passage.tokens):
                raise DataError(
                    f"{here}.passages[{p}].focus is not one of its tokens",
                    got=str(passage.focus),
                    expected=f"0 to {len(passage.tokens) - 1}",
                )


def _check_diagram(diagram: Diagram, where: str) -> None:
    ids = _distinct(f"{where}.nodes", [node.id for node in diagram.nodes])
    for i, node in enumerate(diagram.nodes):
        _one_of(f"{where}.nodes[{i}].kind", node.kind, NODE_KINDS)
        if not 0 <= node.row < len(diagram.rows):
            raise DataError(
                f"{where}.nodes[{i}].row is not one of its rows",
                got=str(node.row),
                expected=f"0 to {len(diagram.rows) - 1}",
            )
    for i, edge in enumerate(diagram.edges):
        for end in (edge.source, edge.target):
            _one_of(f"{where}.edges[{i}]", end, ids)
    if min(diagram.num_edges_left_out, diagram.num_nodes_left_out) < 0:
        raise DataError(f"{where} leaves out a negative number of nodes or edges")


def _check_architecture(architecture: Architecture, where: str) -> None:
    ids = _distinct(f"{where}.boxes", [box.id for box in architecture.boxes])
    frames = _distinct(f"{where}.frames", [frame.id for frame in architecture.frames])
    for i, box in enumerate(architecture.boxes):
        _one_of(f"{where}.boxes[{i}].kind", box.kind, BOX_KINDS)
        _one_of(f"{where}.boxes[{i}].frame", box.frame, ("", *frames))
    for i, frame in enumerate(architecture.frames):
        # A frame stands after the one around it, so that none is inside itself.
        _one_of(f"{where}.frames[{i}].inside", frame.inside, ("", *frames[:i]))
    for i, wire in enumerate(architecture.wires):
        for end in (wire.source, wire.target):
            _one_of(f"{where}.wires[{i}]", end, ids)
        _lengths(f"{where}.wires[{i}]", len(wire.axes), sizes=wire.sizes)


def _distinct(where: str, names: list[str]) -> tuple[str, ...]:
    for name, num in Counter(names).items():
        if num > 1:
            raise DataError(f"the id '{name}' occurs twice in {where}")
    return tuple(names)


def _one_of(where: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise DataError(
            f"{where} names what is not there", got=f"'{name}'", nearest=nearest(name, known)
        )


def _lengths(where: str, num: int, **fields: Sequence[object]) -> None:
    for name, values in fields.items():
        if len(values) != num:
            raise DataError(
                f"{where}.{name} has the wrong length", got=str(len(values)), expected=str(num)
            )


def _pair(
    where: str, num: int, low: tuple[str, Sequence[float]], high: tuple[str, Sequence[float]]
) -> None:
    """Two ends of a range: both absent, or one pair for each value, in order."""
    if not low[1] and not high[1]:
        return
    _lengths(where, num, **{low[0]: low[1], high[0]: high[1]})
    for i, (a, b) in enumerate(zip(low[1], high[1], strict=True)):
        if a > b:
            raise DataError(f"{where}.{low[0]}[{i}] is above {high[0]}[{i}]", got=f"{a} > {b}")
