"""Circuits in the JSON form of the MIB benchmark (and of EAP-IG), in and out.

    {"cfg":   {"n_layers": 2, "n_heads": 4, "parallel_attn_mlp": false, "d_model": 128},
     "nodes": {"input": {"in_graph": true}, "a0.h3": {...}, "m0": {...}, "logits": {...}},
     "edges": {"input->a0.h3<q>": {"score": 0.5, "in_graph": true}, "a0.h3->m0": {...}}}

Nodes are `input` (token embeddings), `aL.hH` (a head), `mL` (an MLP) and `logits`; an edge
into a head says which of its inputs it enters. Every edge that the network has is listed.

Two things differ from a `Circuit`. The form gives keys and values to every *query* head:
where heads share them (grouped-query attention), an edge into a shared key head is written
once for each query head of its group, with an equal part of the score, and is put together
again by `from_mib(..., num_kv_heads=...)`, which sums the scores. And it has one input
node: a table of positions that writes to the stream by itself is refused, or merged into
`input` if asked for (scores add, kept if either was).

Source: Mueller et al. 2025 (MIB) and Hanna et al. 2024 (EAP-IG); the fields are those that
the latter's public graph class reads and writes. Its optional scores of nodes are passed
over, masks over neurons refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from patchclamp.core.circuit import Circuit, Edge, Node, Provenance, Reader
from patchclamp.core.errors import DataError, nearest

_EDGE = re.compile(r"(\w+(?:\.h\d+)?)->(\w+(?:\.h\d+)?)(?:<([qkv])>)?")
_WRITER = re.compile(r"(?:a(\d+)\.h(\d+)|m(\d+)|input)")
_EMBED, _LOGITS = Node("embed"), Node("logits")


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """Anatomy of a graph. `shared` query heads use one key head; `parallel`: attention and
    MLP of a layer read the same stream."""

    num_layers: int
    num_heads: int
    shared: int
    parallel: bool

    def writers(self) -> list[Node]:
        made = [_EMBED]
        for n in range(self.num_layers):
            made += [Node(f"attn.{n}.z", h) for h in range(self.num_heads)]
            made.append(Node(f"mlp.{n}.out"))
        return made

    def readers(self) -> list[Reader]:
        made = []
        for n in range(self.num_layers):
            made += [Reader(Node(f"attn.{n}.z", h), "q") for h in range(self.num_heads)]
            for slot in "kv":
                heads = range(0, self.num_heads, self.shared)
                made += [self.key_reader(n, h, slot) for h in heads]
            made.append(Reader(Node(f"mlp.{n}.out")))
        return [*made, Reader(_LOGITS)]

    def key_reader(self, layer: int, head: int, slot: str) -> Reader:
        """The reader of a query head's keys or values."""
        if self.shared == 1:
            return Reader(Node(f"attn.{layer}.z", head), slot)
        return Reader(Node(f"attn.{layer}.{slot}", head // self.shared), slot)

    def place(self, node: Node) -> tuple[int, int]:
        """Where in the stream a node reads; it sees writers of smaller places."""
        if node == _EMBED:
            return (-1, 0)
        if node == _LOGITS:
            return (self.num_layers, 0)
        part, layer, _ = node.site.split(".")
        return (int(layer), 0 if part == "attn" or self.parallel else 1)

    def possible(self) -> np.ndarray:
        """Bool (reader, writer)."""
        return np.array(
            [[self.place(w) < self.place(r.node) for w in self.writers()] for r in self.readers()]
        )


def to_mib(circuit: Circuit, *, width: int, merge_inputs: bool = False) -> str:
    """A transformer's circuit as MIB's JSON.

    Args:
        width: of the stream, which the form states (`d_model`) and a circuit does not know.
        merge_inputs: add other writers before the first layer (a table of positions) to `input`.

    Raises:
        DataError: the circuit is not a transformer's, has positions, or has several inputs.
    """
    shape = _shape_of(circuit)
    inputs = [w for w in circuit.writers if _named(w) is None]
    if len(inputs) != (_EMBED in inputs) and not merge_inputs:
        extra = next(w for w in inputs if w != _EMBED)
        raise DataError(
            f"MIB's form has one input node, and '{extra}' writes to the stream as well",
            hint="to_mib(..., merge_inputs=True) adds it to 'input'",
        )
    edges: dict[str, dict[str, object]] = {}
    for r, w in np.argwhere(circuit.possible):
        writer = _named(circuit.writers[w]) or "input"
        for reader, part in _query_readers(circuit.readers[r], shape):
            entry = edges.setdefault(f"{writer}->{reader}", {"score": 0.0, "in_graph": False})
            entry["score"] = float(entry["score"]) + float(circuit.scores[r, w]) / part  # type: ignore[arg-type]  # a float
            entry["in_graph"] = bool(entry["in_graph"]) or bool(circuit.kept[r, w])
    nodes = {"input": {"in_graph": False}}
    nodes |= {str(_named(w)): {"in_graph": False} for w in shape.writers() if w != _EMBED}
    nodes["logits"] = {"in_graph": True}
    for name, entry in edges.items():
        if entry["in_graph"]:
            writer, _, reader = name.partition("->")
            nodes[writer]["in_graph"] = True
            nodes[reader.partition("<")[0]]["in_graph"] = True
    cfg = {
        "n_layers": shape.num_layers,
        "n_heads": shape.num_heads,
        "parallel_attn_mlp": shape.parallel,
        "d_model": width,
    }
    return json.dumps({"cfg": cfg, "nodes": nodes, "edges": edges}, allow_nan=False)


def from_mib(text: str, *, num_kv_heads: int | None = None, task: str = "") -> Circuit:
    """A circuit from MIB's JSON. Edges that are not listed have score 0 and are not kept.

    Args:
        num_kv_heads: of the network, where heads share keys and values: edges into the
            query heads of a group become one, with the sum of their scores.

    Raises:
        DataError: not this form; an edge that the network cannot have; an edge kept at a
            node that is not; heads of a group that disagree; masks over neurons.
    """
    data = _read(text)
    shape = _shape_from(data["cfg"], num_kv_heads)
    nodes, edges = data["nodes"], data["edges"]
    _check_nodes(nodes, shape)
    writers, readers = shape.writers(), shape.readers()
    possible = shape.possible()
    kept, scores = np.zeros(possible.shape, dtype=bool), np.zeros(possible.shape)
    row = {r: i for i, r in enumerate(readers)}
    column = {w: i for i, w in enumerate(writers)}
    seen: dict[tuple[int, int], bool] = {}
    for name, entry in edges.items():
        edge = _edge(name, shape)
        r, w = row.get(Reader(edge.reader, edge.slot)), column.get(edge.writer)
        if r is None or w is None or not possible[r, w]:
            raise DataError(f"a network of this shape has no edge '{name}'")
        score, on = _entry(name, entry)
        if seen.setdefault((r, w), on) != on:
            raise DataError(
                f"query heads that share keys and values disagree about '{name}'",
                hint="read the circuit without num_kv_heads",
            )
        if on:
            _check_ends(name, nodes)
        scores[r, w] += score
        kept[r, w] = on
    return Circuit(
        writers=tuple(writers),
        readers=tuple(readers),
        possible=possible,
        kept=kept,
        scores=scores,
        record=Provenance(task=task, method="read from MIB's JSON"),
    )


def _named(node: Node) -> str | None:
    """MIB's name of a head, an MLP or the logits; None for what writes before the first layer."""
    if node == _LOGITS:
        return "logits"
    found = re.fullmatch(r"attn\.(\d+)\.z|mlp\.(\d+)\.out", node.site)
    if found is None:
        return None
    return f"m{found[2]}" if found[1] is None else f"a{found[1]}.h{node.unit}"


def _shape_of(circuit: Circuit) -> _Shape:
    heads = [w for w in circuit.writers if re.fullmatch(r"attn\.\d+\.z", w.site)]
    mlps = {int(w.site.split(".")[1]) for w in circuit.writers if w.site.startswith("mlp.")}
    at = next((n for n in circuit.nodes() if n.position is not None), None)
    if at is not None:
        raise DataError("MIB's form has no positions", got=str(at))
    num_layers = len({w.site for w in heads})
    num_heads = 1 + max((w.unit or 0 for w in heads), default=-1)
    if not heads or len(heads) != num_layers * num_heads or mlps != set(range(num_layers)):
        raise DataError(
            "MIB's form is for transformers with as many heads and one MLP in every layer",
            got=f"{len(heads)} heads and {len(mlps)} MLPs as writers",
        )
    keys = {r.node.unit for r in circuit.readers if re.fullmatch(r"attn\.\d+\.k", r.node.site)}
    shared = num_heads // len(keys) if keys else 1
    feeds = {str(circuit.edge(int(r), int(w))) for r, w in np.argwhere(circuit.possible)}
    parallel = "attn.0.z[0]->mlp.0.out" not in feeds
    shape = _Shape(num_layers=num_layers, num_heads=num_heads, shared=shared, parallel=parallel)
    unknown = [str(r) for r in circuit.readers if r not in shape.readers()]
    if unknown:
        raise DataError(
            "MIB's form has no such reader",
            got=unknown[0],
            nearest=nearest(unknown[0], [str(r) for r in shape.readers()]),
        )
    return shape


def _query_readers(reader: Reader, shape: _Shape) -> list[tuple[str, int]]:
    """MIB's names of a reader, and into how many parts its score goes."""
    if reader.node.site.endswith((".k", ".v")):
        layer, first = reader.node.site.split(".")[1], (reader.node.unit or 0) * shape.shared
        heads = range(first, first + shape.shared)
        return [(f"a{layer}.h{h}<{reader.slot}>", shape.shared) for h in heads]
    slot = f"<{reader.slot}>" if reader.slot else ""
    return [(f"{_named(reader.node)}{slot}", 1)]


def _read(text: str) -> dict[str, Mapping[str, object]]:
    try:
        data = json.loads(text)
    except ValueError as e:
        raise DataError(f"a circuit in MIB's form is not JSON: {e}") from None
    if not isinstance(data, dict) or not all(
        isinstance(data.get(key), dict) for key in ("cfg", "nodes", "edges")
    ):
        raise DataError(
            "this is not a circuit in MIB's form",
            got=", ".join(data) if isinstance(data, dict) else type(data).__name__,
            expected="objects 'cfg', 'nodes' and 'edges'",
        )
    return data


def _shape_from(cfg: Mapping[str, object], num_kv_heads: int | None) -> _Shape:
    layers, heads = cfg.get("n_layers"), cfg.get("n_heads")
    parallel = cfg.get("parallel_attn_mlp", False)
    if not (isinstance(layers, int) and isinstance(heads, int) and layers > 0 and heads > 0):
        raise DataError(
            "'cfg' of a circuit in MIB's form lacks counts",
            got=f"n_layers={layers!r}, n_heads={heads!r}",
        )
    kv = heads if num_kv_heads is None else num_kv_heads
    if kv < 1 or heads % kv:
        raise DataError(f"{heads} heads cannot share {kv} key heads equally")
    return _Shape(num_layers=layers, num_heads=heads, shared=heads // kv, parallel=bool(parallel))


def _check_nodes(nodes: Mapping[str, object], shape: _Shape) -> None:
    known = {_named(w) or "input" for w in shape.writers()} | {"logits"}
    for name, entry in nodes.items():
        if name not in known:
            raise DataError(
                f"a network of this shape has no node '{name}'", nearest=nearest(name, known)
            )
        if not isinstance(entry, dict) or not isinstance(entry.get("in_graph"), bool):
            raise DataError(f"node '{name}' does not say whether it is 'in_graph'")
        if "neurons" in entry:
            raise DataError(
                f"node '{name}' has a mask over neurons, which a circuit cannot hold",
                hint="export the graph at the level of nodes or edges",
            )


def _edge(name: str, shape: _Shape) -> Edge:
    found = _EDGE.fullmatch(name)
    writer = _WRITER.fullmatch(found[1]) if found else None
    reader = _WRITER.fullmatch(found[2]) if found else None
    is_logits = found is not None and found[2] == "logits"
    if found is None or writer is None or (reader is None and not is_logits):
        raise DataError("an edge in MIB's form cannot be read", got=repr(name))
    slot = found[3] or ""
    if reader is None:
        return Edge(_node(writer), _LOGITS, slot)
    if reader[1] is None:
        return Edge(_node(writer), _node(reader), slot)
    layer, head = int(reader[1]), int(reader[2])
    if slot in ("k", "v"):
        read = shape.key_reader(layer, head, slot)
        return Edge(_node(writer), read.node, read.slot)
    return Edge(_node(writer), Node(f"attn.{layer}.z", head), slot)


def _node(found: re.Match[str]) -> Node:
    if found[1] is not None:
        return Node(f"attn.{int(found[1])}.z", int(found[2]))
    return _EMBED if found[3] is None else Node(f"mlp.{int(found[3])}.out")


def _entry(name: str, entry: object) -> tuple[float, bool]:
    if isinstance(entry, dict):
        score, on = entry.get("score", 0.0), entry.get("in_graph")
        if isinstance(on, bool) and isinstance(score, int | float):
            return float(score), on
    raise DataError(
        f"edge '{name}' cannot be read",
        got=str(entry),
        expected='{"score": number, "in_graph": true or false}',
    )


def _check_ends(name: str, nodes: Mapping[str, object]) -> None:
    writer, _, reader = name.partition("->")
    for end in (writer, reader.partition("<")[0]):
        entry = nodes.get(end)
        if end != "logits" and (not isinstance(entry, dict) or not entry["in_graph"]):
            raise DataError(
                f"edge '{name}' is kept, but its node '{end}' is not",
                hint="prune the graph before it is written",
            )
