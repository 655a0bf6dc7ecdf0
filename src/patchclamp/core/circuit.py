"""A circuit as data: which writers matter to which readers, and on what grounds.

A network is seen as *writers*, whose values are added up somewhere, and *readers*,
which take those sums in. In a transformer the sums are the residual stream: heads,
MLPs and the embedding write; queries, keys and values of each head, each MLP and the
unembedding read. In a network of linear and convolutional layers every operator adds
up its input units, so its input units write and its output units read. An *edge* is
one writer's part in what one reader takes in.

Names. A node is a site with a unit along its unit or head axis:

    attn.3.z[5]    head 5 of layer 3     mlp.3.out    an MLP     logits    the output
    embed          token embeddings      conv1[4]     a channel
    attn.3.k[1]    a key head that several query heads share, where they do

`slot` says which input of the reader is meant: "q", "k" or "v" of a head, "" else.

A circuit holds scores for all possible edges and a mask of those that are kept; the
record says how both came about. It is plain data: JSON both ways, no tensors.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from patchclamp.core.errors import DataError, nearest
from patchclamp.core.findings import Json

SCHEMA = "patchclamp/circuit/1"


@dataclass(frozen=True, slots=True)
class Node:
    """A part of a network. `unit` None is the whole site, `position` None every position."""

    site: str
    unit: int | None = None
    position: int | None = None

    def __str__(self) -> str:
        unit = "" if self.unit is None else f"[{self.unit}]"
        if self.unit is None and self.site.endswith("]"):
            unit = "[*]"  # the address of a structured value ends like a unit
        return f"{self.site}{unit}" + ("" if self.position is None else f"@@{self.position}")

    @classmethod
    def parse(cls, text: str) -> Node:
        """The inverse of `str`."""
        match = re.fullmatch(r"(.*?)(?:\[(\d+|\*)\])?(?:@@(\d+))?", text, re.DOTALL)
        if match is None or not match[1]:
            raise DataError("a node is written site[unit]@@position", got=repr(text))
        unit = None if match[2] in (None, "*") else int(match[2])
        return cls(match[1], unit, None if match[3] is None else int(match[3]))


@dataclass(frozen=True, slots=True)
class Reader:
    """One input of a node."""

    node: Node
    slot: str = ""

    def __str__(self) -> str:
        return f"{self.node}<{self.slot}>" if self.slot else str(self.node)

    @classmethod
    def parse(cls, text: str) -> Reader:
        """The inverse of `str`."""
        match = re.fullmatch(r"(.*?)(?:<(\w+)>)?", text, re.DOTALL)
        if match is None:
            raise DataError("a reader is written node<slot>", got=repr(text))
        return cls(Node.parse(match[1]), match[2] or "")


@dataclass(frozen=True, slots=True)
class Edge:
    """A writer's part in what one slot of a reader takes in."""

    writer: Node
    reader: Node
    slot: str = ""

    def __str__(self) -> str:
        return f"{self.writer}->{Reader(self.reader, self.slot)}"

    @classmethod
    def parse(cls, text: str) -> Edge:
        """The inverse of `str`."""
        writer, arrow, reader = text.partition("->")
        if not arrow:
            raise DataError("an edge is written writer->reader<slot>", got=repr(text))
        read = Reader.parse(reader)
        return cls(Node.parse(writer), read.node, read.slot)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a circuit came about, enough to find it again.

    Attributes:
        model, model_hash: the network, and its class and weights.
        task, data_hash: what it does, and the prompt pairs or inputs it was shown.
        metric: what was measured of the output.
        method: how edges were scored.
        ablation: what an edge carries when it is not kept ("resample", "mean", ...).
        direction: "noising", "denoising" or "both".
        sign: "absolute" (size of the effect) or "signed".
        truth: for planted circuits, "structural" or "active".
        options: of the method.
        versions: of the libraries.
    """

    model: str = ""
    model_hash: str = ""
    task: str = ""
    data_hash: str = ""
    metric: str = ""
    method: str = ""
    ablation: str = ""
    direction: str = ""
    sign: str = ""
    truth: str = ""
    seed: int | None = None
    options: Mapping[str, Json] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Circuit:
    """A mask and scores over writers x readers; see the module docstring.

    Attributes:
        writers: in the order of the forward pass.
        readers: likewise.
        possible: bool (reader, writer): edges that exist in the network.
        kept: bool (reader, writer): edges that belong to the circuit.
        scores: float (reader, writer); 0 where an edge is not possible.
        record: how it came about.
    """

    writers: tuple[Node, ...]
    readers: tuple[Reader, ...]
    possible: np.ndarray
    kept: np.ndarray
    scores: np.ndarray
    record: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        shape = (len(self.readers), len(self.writers))
        for name in ("possible", "kept", "scores"):
            got = getattr(self, name).shape
            if got != shape:
                raise DataError(
                    f"'{name}' of a circuit has the wrong shape", got=str(got), expected=str(shape)
                )
        if bool((self.kept & ~self.possible).any()):
            reader, writer = (int(i) for i in np.argwhere(self.kept & ~self.possible)[0])
            edge = f"{self.writers[writer]}->{self.readers[reader]}"
            raise DataError(f"a circuit keeps the edge {edge}, which the network does not have")
        if not bool(np.isfinite(self.scores).all()):
            raise DataError("the scores of a circuit hold NaN or infinity")

    @property
    def num_edges(self) -> int:
        """Edges that are kept."""
        return int(self.kept.sum())

    @property
    def num_possible(self) -> int:
        """Edges that the network has."""
        return int(self.possible.sum())

    def edges(self) -> list[Edge]:
        """The kept edges, largest score first."""
        found = np.argwhere(self.kept)
        order = np.argsort(-np.abs(self.scores[self.kept]), kind="stable")
        return [self.edge(int(r), int(w)) for r, w in found[order]]

    def edge(self, reader: int, writer: int) -> Edge:
        """The edge at these indices."""
        read = self.readers[reader]
        return Edge(self.writers[writer], read.node, read.slot)

    def nodes(self) -> list[Node]:
        """Nodes that a kept edge touches, in the order of the forward pass."""
        touched = [self.writers[i] for i in np.flatnonzero(self.kept.any(axis=0))]
        touched += [self.readers[i].node for i in np.flatnonzero(self.kept.any(axis=1))]
        return list(dict.fromkeys(touched))

    def with_kept(self, kept: np.ndarray) -> Circuit:
        """The same scores with another mask."""
        return dataclasses.replace(self, kept=kept & self.possible)

    def top(self, num: int) -> Circuit:
        """The same scores, keeping the `num` edges whose scores are largest in size.

        Ties are broken by the order of readers and writers, so that the same scores
        always keep the same edges.
        """
        flat = np.where(self.possible, np.abs(self.scores), -1.0).ravel()
        kept = np.zeros(flat.size, dtype=bool)
        kept[np.argsort(-flat, kind="stable")[: max(0, min(num, self.num_possible))]] = True
        return self.with_kept(kept.reshape(self.possible.shape))

    def to_dict(self) -> dict[str, Json]:
        """Plain data that `from_dict` turns back into this circuit."""
        listed: list[Json] = [
            [int(r), int(w), float(self.scores[r, w]), bool(self.kept[r, w])]
            for r, w in np.argwhere(self.possible)
        ]
        return {
            "schema": SCHEMA,
            "writers": [str(w) for w in self.writers],
            "readers": [str(r) for r in self.readers],
            "edges": listed,
            "record": dataclasses.asdict(self.record),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Circuit:
        """Read back what `to_dict` gave.

        Raises:
            DataError: another schema, unknown or missing fields, indices out of range.
        """
        if data.get("schema") != SCHEMA:
            raise DataError(
                "this is not a circuit", got=f"schema {data.get('schema')!r}", expected=SCHEMA
            )
        try:
            writers = tuple(Node.parse(str(w)) for w in _list(data["writers"]))
            readers = tuple(Reader.parse(str(r)) for r in _list(data["readers"]))
            shape = (len(readers), len(writers))
            possible, kept = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
            scores = np.zeros(shape)
            for item in _list(data["edges"]):
                r, w, score, on = _edge_row(item, shape)
                possible[r, w], scores[r, w], kept[r, w] = True, score, on
            record = data["record"]
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(f"a circuit cannot be read: {type(e).__name__}: {e}") from None
        return cls(
            writers=writers,
            readers=readers,
            possible=possible,
            kept=kept,
            scores=scores,
            record=_provenance(record),
        )

    def to_json(self) -> str:
        """The circuit as JSON text."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Circuit:
        """Read back what `to_json` gave."""
        try:
            data = json.loads(text)
        except ValueError as e:
            raise DataError(f"a circuit is not JSON: {e}") from None
        if not isinstance(data, dict):
            raise DataError("this is not a circuit", got=type(data).__name__, expected="an object")
        return cls.from_dict(data)


def circuit_of(
    edges: Iterable[Edge],
    writers: Iterable[Node],
    readers: Iterable[Reader],
    possible: np.ndarray,
    record: Provenance,
) -> Circuit:
    """The circuit of exactly these edges, with score 1 each.

    Raises:
        DataError: an edge's writer or reader is not listed, or the edge is not possible.
    """
    writers, readers = tuple(writers), tuple(readers)
    row = {r: i for i, r in enumerate(readers)}
    column = {w: i for i, w in enumerate(writers)}
    kept = np.zeros(possible.shape, dtype=bool)
    for edge in edges:
        read = Reader(edge.reader, edge.slot)
        for what, known in ((read, row), (edge.writer, column)):
            if what not in known:
                raise DataError(
                    f"edge {edge} has an end that the network lacks",
                    nearest=nearest(str(what), [str(k) for k in known]),
                )
        kept[row[read], column[edge.writer]] = True
    return Circuit(
        writers=writers,
        readers=readers,
        possible=possible,
        kept=kept,
        scores=kept.astype(float),
        record=record,
    )


def _list(x: object) -> list[object]:
    if not isinstance(x, (list, tuple)):
        raise TypeError(f"expected a list, got {type(x).__name__}")
    return list(x)


def _edge_row(item: object, shape: tuple[int, int]) -> tuple[int, int, float, bool]:
    match item:
        case [int(r), int(w), float() | int() as score, bool(on)]:
            if 0 <= r < shape[0] and 0 <= w < shape[1]:
                return r, w, float(score), on
    raise DataError(
        "an edge of a circuit cannot be read",
        got=f"{item}",
        expected=f"[reader below {shape[0]}, writer below {shape[1]}, score, kept]",
    )


def _provenance(data: object) -> Provenance:
    if not isinstance(data, Mapping):
        raise DataError("the record of a circuit is not an object", got=type(data).__name__)
    names = {f.name for f in dataclasses.fields(Provenance)}
    unknown = [str(k) for k in data if k not in names]
    if unknown:
        raise DataError(
            f"the record of a circuit has an unknown field '{unknown[0]}'",
            nearest=nearest(unknown[0], names),
        )
    return Provenance(**data)
