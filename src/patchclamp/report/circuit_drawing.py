"""Circuits as SVG: rows of the network from its input up, kept edges between.

`diagram_of` lays a circuit out as plain data, which `diagram_drawing` draws;
`circuit_svg` does both and gives a file that stands alone. Rows follow what may feed
what in the network, not names, so transformers and networks of layers are drawn alike.
Heads stand in their own order; rows of units are ordered so that fewer edges cross.
A circuit with more edges than can be seen is thinned, and says by how much.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from patchclamp.core.circuit import Circuit, Edge, Node, Reader
from patchclamp.core.document import Diagram, DiagramEdge, DiagramNode
from patchclamp.core.errors import OptionError
from patchclamp.report.diagram_drawing import diagram_drawing, diagram_summary
from patchclamp.report.layered import depths, ordered

MAX_EDGES = 200

_HEAD = re.compile(r"attn\.(\d+)\.(\w+)")
_MLP = re.compile(r"mlp\.(\d+)\.\w+")


def diagram_of(
    circuit: Circuit,
    *,
    title: str = "Circuit",
    note: str = "",
    max_edges: int = MAX_EDGES,
    groups: Mapping[Node, str] | None = None,
    node_scores: Mapping[Node, float] | None = None,
) -> Diagram:
    """The strongest kept edges of a circuit, and the nodes they touch, in rows.

    Key and value heads that several query heads share get a fixed link, without a
    score, to the query heads they serve, where the numbers of both tell which.

    Args:
        circuit: what to draw.
        max_edges: edges drawn; the rest is counted in the diagram.
        groups: a name for some nodes, such as a head's type; drawn as colours.
        node_scores: a score for some nodes.

    Raises:
        OptionError: `max_edges` is below 1.
    """
    if max_edges < 1:
        raise OptionError("'max_edges' is too small", got=str(max_edges), expected="1 or more")
    groups, node_scores = groups or {}, node_scores or {}
    edges = circuit.edges()[:max_edges]
    touched = {node for edge in edges for node in (edge.writer, edge.reader)}
    nodes = [node for node in _all_nodes(circuit) if node in touched]
    fixed = [(a, b) for a, b in _shared_heads(circuit) if a in touched and b in touched]
    links = [(str(a), str(b)) for a, b in [*((e.writer, e.reader) for e in edges), *fixed]]

    level = _levels(circuit)
    kinds = _kinds(circuit, level)
    stages = sorted({level[_stage(node)] for node in nodes})
    rows = [[n for n in nodes if level[_stage(n)] == stage] for stage in stages]
    free = [all(kinds[n] not in ("head", "mlp") for n in row) for row in rows]
    columns = ordered([[str(n) for n in row] for row in rows], links, free)
    place = {name: (r, c) for r, row in enumerate(columns) for c, name in enumerate(row)}
    drawn = []
    for node in nodes:
        row, column = place[str(node)]
        one_site = len({n.site for n in rows[row]}) == 1
        drawn.append(
            DiagramNode(
                id=str(node),
                label=_label(node, one_site=one_site),
                row=row,
                column=column,
                kind=kinds[node],
                score=node_scores.get(node),
                group=groups.get(node, ""),
            )
        )
    return Diagram(
        title=title,
        nodes=tuple(drawn),
        edges=(*_scored(circuit, edges), *map(_fixed, fixed)),
        rows=tuple(_row_name(row) for row in rows),
        unit=circuit.record.metric,
        num_edges_left_out=circuit.num_edges - len(edges),
        num_nodes_left_out=len(circuit.nodes()) - len(nodes),
        note=note,
    )


def circuit_svg(
    circuit: Circuit,
    *,
    title: str = "Circuit",
    max_edges: int = MAX_EDGES,
    groups: Mapping[Node, str] | None = None,
    node_scores: Mapping[Node, float] | None = None,
) -> str:
    """The circuit as an SVG file that needs nothing else; arguments as `diagram_of`."""
    diagram = diagram_of(
        circuit, title=title, max_edges=max_edges, groups=groups, node_scores=node_scores
    )
    return diagram_drawing(diagram).alone(title, diagram_summary(diagram))


def _stage(node: Node) -> tuple[str, int | None]:
    return node.site, node.position


def _all_nodes(circuit: Circuit) -> list[Node]:
    """Readers that do not write stand behind the writers, in the order of the forward pass."""
    return list(dict.fromkeys([*circuit.writers, *(r.node for r in circuit.readers)]))


def _levels(circuit: Circuit) -> dict[tuple[str, int | None], int]:
    """The row of every site (at every position): how many may feed each other below it."""
    stages = list(dict.fromkeys(_stage(node) for node in _all_nodes(circuit)))
    at = {stage: i for i, stage in enumerate(stages)}
    writers = np.array([at[_stage(w)] for w in circuit.writers], dtype=int)
    readers = np.array([at[_stage(r.node)] for r in circuit.readers], dtype=int)
    reader, writer = np.nonzero(circuit.possible)
    pairs = np.unique(np.stack([writers[writer], readers[reader]], axis=1), axis=0)
    links = [(int(a), int(b)) for a, b in pairs]
    links += [(at[_stage(a)], at[_stage(b)]) for a, b in _shared_heads(circuit)]
    depth = depths([str(i) for i in range(len(stages))], [(str(a), str(b)) for a, b in links])
    return {stage: depth[str(i)] for i, stage in enumerate(stages)}


def _shared_heads(circuit: Circuit) -> list[tuple[Node, Node]]:
    """Key and value heads with the query heads they serve, where the numbers come out even."""
    heads: dict[tuple[str, int | None], list[Node]] = {}
    for node in _all_nodes(circuit):
        if _HEAD.fullmatch(node.site) and node.unit is not None:
            heads.setdefault(_stage(node), []).append(node)
    found = []
    for (site, position), shared in heads.items():
        served = heads.get((re.sub(r"\w+$", "z", site), position), [])
        if site.endswith((".k", ".v")) and len(served) % len(shared) == 0:
            each = len(served) // len(shared)
            found += [
                (node, served[i]) for i, node in enumerate(n for n in shared for _ in range(each))
            ]
    return found


def _kinds(circuit: Circuit, level: Mapping[tuple[str, int | None], int]) -> dict[Node, str]:
    writers = set(circuit.writers)

    def kind(node: Node) -> str:
        if _HEAD.fullmatch(node.site):
            return "head"
        if _MLP.fullmatch(node.site):
            return "mlp"
        if node not in writers:
            return "output"
        return "embed" if level[_stage(node)] == 0 else "unit"

    return {node: kind(node) for node in _all_nodes(circuit)}


def _label(node: Node, *, one_site: bool) -> str:
    """The shortest name that tells the node from the others of its row."""
    if head := _HEAD.fullmatch(node.site):
        unit = "" if node.unit is None else f".{node.unit}"
        name = f"{head[1]}{unit}" if head[2] == "z" else f"{head[2]} {head[1]}{unit}"
    elif mlp := _MLP.fullmatch(node.site):
        name = f"mlp {mlp[1]}"
    elif one_site and node.unit is not None:
        name = f"[{node.unit}]"
    else:
        name = str(Node(node.site, node.unit))
    return name if node.position is None else f"{name} @{node.position}"


def _row_name(row: Sequence[Node]) -> str:
    names = []
    for node in row:
        head, mlp = _HEAD.fullmatch(node.site), _MLP.fullmatch(node.site)
        if head:
            names.append(f"heads {head[1]}" if head[2] == "z" else f"keys, values {head[1]}")
        else:
            names.append(f"mlp {mlp[1]}" if mlp else node.site)
    several = list(dict.fromkeys(names))
    return several[0] if len(several) == 1 else f"{several[0]} and {len(several) - 1} more"


def _scored(circuit: Circuit, edges: Sequence[Edge]) -> list[DiagramEdge]:
    row = {reader: i for i, reader in enumerate(circuit.readers)}
    column = {writer: i for i, writer in enumerate(circuit.writers)}
    return [
        DiagramEdge(
            source=str(e.writer),
            target=str(e.reader),
            slot=e.slot,
            score=float(circuit.scores[row[Reader(e.reader, e.slot)], column[e.writer]]),
        )
        for e in edges
    ]


def _fixed(ends: tuple[Node, Node]) -> DiagramEdge:
    source, target = ends
    return DiagramEdge(source=str(source), target=str(target), slot=source.site[-1])
