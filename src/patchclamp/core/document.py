"""The document between an audit and its page: typed blocks of plain data.

`audit/` fills it, `report/` draws it, and neither knows the other. Blocks hold
numbers and strings only, never tensors, so a document is JSON as it stands and
a page can be drawn again years later without the model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TypeAlias

from patchclamp.core.findings import Finding, Json

Cell: TypeAlias = "bool | int | float | str | None"

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Column:
    """A table column. `unit` is shown in the head; `role` says how to draw the cells.

    role: "text", "number", "bar" (number drawn as a bar, zero at the left or in the
    middle), "share" (0..1 drawn as a percentage bar), "flag" (bool), "address"
    (site or unit address, monospaced), "depth" (tree indentation of the next column).
    """

    name: str
    title: str
    role: str = "text"
    unit: str = ""
    help: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells; the page sorts, filters and shows `page` rows at a time."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    kind: str = "table"


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Labelled bars with optional intervals and the null's range behind them.

    low, high: the interval of each value. null_low, null_high: the shaded range
    that a matched null reaches; one pair for each bar.
    """

    title: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    unit: str
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    null_low: tuple[float, ...] = ()
    null_high: tuple[float, ...] = ()
    note: str = ""
    kind: str = "bars"


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts between `edges`; len(edges) = len(counts) + 1."""

    title: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    unit: str
    note: str = ""
    kind: str = "histogram"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points with intervals against a reference line (calibration: the diagonal)."""

    title: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    x_title: str
    y_title: str
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    weight: tuple[float, ...] = ()
    diagonal: bool = False
    note: str = ""
    kind: str = "curve"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image as PNG bytes in base64, with what it shows."""

    png_base64: str
    label: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text with a strength for each token; `focus` is the token the value belongs to."""

    tokens: tuple[str, ...]
    strengths: tuple[float, ...]
    focus: int
    value: float
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class UnitExamples:
    """The inputs that drive one unit most: pictures or passages (one of the two)."""

    unit: str
    summary: str
    pictures: tuple[Picture, ...] = ()
    passages: tuple[Passage, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Top examples of several units."""

    title: str
    units: tuple[UnitExamples, ...]
    note: str = ""
    kind: str = "examples"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Short name-value pairs, such as a model card."""

    title: str
    items: tuple[tuple[str, str], ...]
    note: str = ""
    kind: str = "facts"


@dataclass(frozen=True, kw_only=True)
class DiagramNode:
    """A part of a network in a drawn circuit.

    row: 0 at the bottom, the input's side; column: its place in the row.
    kind: "embed", "head", "mlp", "output" or "unit". group: such as a head's type.
    """

    id: str
    label: str
    row: int
    column: int
    kind: str = "unit"
    score: float | None = None
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class DiagramEdge:
    """What `target` reads of `source`; a score of None is a fixed link that nothing scored."""

    source: str
    target: str
    slot: str = ""
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Diagram:
    """A circuit to be drawn: rows from the input up.

    rows: a name for each row; unit: what a score measures. What was left out of a
    large circuit is counted, and the page says so.
    """

    title: str
    nodes: tuple[DiagramNode, ...]
    edges: tuple[DiagramEdge, ...]
    rows: tuple[str, ...]
    unit: str = ""
    num_edges_left_out: int = 0
    num_nodes_left_out: int = 0
    note: str = ""
    kind: str = "diagram"


@dataclass(frozen=True, kw_only=True)
class Box:
    """One or more operators of a network, folded into one box.

    kind: "input", "output", "module" (several operators), "operator" or "rearrange".
    operations: addresses of all operators in it, those of collapsed repeats included.
    times: how many identical parts it stands for. frame: the innermost frame it is in.
    over: axes that it is applied to one index at a time; None where that is not known.
    linear: for fixed weights the map is linear, up to a constant.
    """

    id: str
    label: str
    kind: str
    operations: tuple[str, ...] = ()
    times: int = 1
    over: tuple[str, ...] | None = None
    linear: bool = False
    num_weights: int = 0
    frame: str = ""


@dataclass(frozen=True, kw_only=True)
class Wire:
    """A value on its way from one box to another, with a name and a size for each axis.

    value: address of what is carried. broadcast: axes along which the target repeats it.
    """

    source: str
    target: str
    value: str
    axes: tuple[str, ...]
    sizes: tuple[str, ...]
    broadcast: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A part that the network has `times` times, drawn once. `inside`: the frame around it."""

    id: str
    label: str
    times: int
    inside: str = ""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The operators of a network and the values between them."""

    title: str
    boxes: tuple[Box, ...]
    wires: tuple[Wire, ...]
    frames: tuple[Frame, ...] = ()
    note: str = ""
    kind: str = "architecture"


Block: TypeAlias = "Table | Bars | Histogram | Curve | Examples | Facts | Diagram | Architecture"


@dataclass(frozen=True, kw_only=True)
class Section:
    """One chapter of the page. `summary` is plain text and opens it."""

    id: str
    title: str
    summary: str
    blocks: tuple[Block, ...] = ()
    findings: tuple[Finding, ...] = ()
    cpu_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Work that was not done, or done smaller, and why."""

    what: str
    why: str
    how_to_get_it: str


@dataclass(frozen=True, kw_only=True)
class Document:
    """A whole audit."""

    title: str
    subtitle: str
    created: str
    command: str
    header: Facts
    sections: tuple[Section, ...]
    left_out: tuple[LeftOut, ...] = ()
    schema_version: int = SCHEMA_VERSION
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The ledger: every finding in the order of the page."""
        return tuple(f for section in self.sections for f in section.findings)

    def to_json(self) -> dict[str, Json]:
        """Plain data; findings in their own JSON form."""
        data = dataclasses.asdict(self)
        for section, plain in zip(self.sections, data["sections"], strict=True):
            plain["findings"] = [f.to_json() for f in section.findings]
        return data
