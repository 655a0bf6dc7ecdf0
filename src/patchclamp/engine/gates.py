"""Where an edge into a reader can be cut in the plain network: one value for each reader.

A reader that reads for itself has a tag of its own, behind which nobody else reads
the stream. Heads share theirs, so the gate of a head's queries is its part of the
projection's output, which is computed from the changed stream: norm and one head's rows of
the weight, next to nothing against a layer.

Shape suffixes: K edges, B batch, P position, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.core.errors import EngineError
from patchclamp.engine.codegen import Compiled, compile_request
from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.ir import Graph, Kind, Node
from patchclamp.engine.streams import Projection, Read, Streams, batch_axis, names_of


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Features `start` to `start + head_dim` of a projection are one head's."""

    start: int
    head_dim: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Gate:
    """A value through which some readers of one read take the stream in.

    Attributes:
        node: the value.
        slots: reader -> its features of the value; empty features for the whole value.
        projection: what makes the value; None where it is the stream itself.
        path: from the stream to the projection's data; None where that is the stream.
    """

    node: Node
    slots: dict[int, Rows | None]
    projection: Projection | None
    path: Compiled | None

    def cut(self, engine: GraphEngine, seen: Tensor, base: Tensor, slots: Sequence[int]) -> Tensor:
        """The value where the reader `slots[k]` sees `seen`, everybody else the base.

        Shapes: seen (K * B, P, D); base as in the network, its batch of B; the same with K * B.
        """
        if self.projection is None:
            return seen
        num = len(slots)
        data = seen
        if self.path is not None:
            constants = [engine.constant(n) for n in self.path.constants]
            data = self.path.program([seen], constants, [])[0][0]
        axis = batch_axis(self.projection.data)
        data_KN = data.unflatten(axis, (num, -1)).movedim(axis, 0)
        weight = engine.constant(self.projection.weight).detach()
        weight = weight if self.projection.transposed else weight.T
        bias = self.projection.bias
        offset = None if bias is None else engine.constant(bias).detach()
        made = base.expand(num, *base.shape).clone()
        for slot in sorted(set(slots)):
            rows = self.slots[slot]
            if rows is None:
                raise EngineError("a head's part of its projection is not known")
            which = torch.tensor([k for k, s in enumerate(slots) if s == slot])
            part = slice(rows.start, rows.start + rows.head_dim)
            y = data_KN[which] @ weight[part].T
            made[which, ..., part] = y if offset is None else y + offset[part]
        out_axis = batch_axis(self.projection.node)
        return made.movedim(0, out_axis).flatten(out_axis, out_axis + 1)


def gates(streams: Streams, read: Read) -> list[Gate]:
    """The gates of a read.

    Raises:
        EngineError: something reads the stream without a module of its own.
    """
    if not read.slots:
        if len(read.consumers) != 1 or not read.consumers[0].address:
            raise EngineError(
                f"'{read.site}' reads the stream at several places at once",
                got=", ".join(c.address or c.operation for c in read.consumers),
                hint="its edges can be cut by masks (wiring.run), not one by one",
            )
        return [Gate(node=_own(streams.graph, read), slots={0: None}, projection=None, path=None)]
    first = 0
    found: dict[Node, tuple[Projection, dict[int, Rows | None]]] = {}
    for slot in read.slots:
        made = slot.projection
        rows = {
            first + h: Rows(start=slot.start + h * slot.head_dim, head_dim=slot.head_dim)
            for h in range(slot.num_heads)
        }
        found.setdefault(made.node, (made, {}))[1].update(rows)
        first += slot.num_heads
    return [
        Gate(
            node=node,
            slots=dict(rows),
            projection=made,
            path=_path(streams.graph, read, made.data),
        )
        for node, (made, rows) in found.items()
    ]


def _own(graph: Graph, read: Read) -> Node:
    """The consumer itself where it is a tag, which changes nothing."""
    node = read.consumers[0]
    if node.kind is not Kind.TAG:
        raise EngineError(
            f"'{read.site}' reads the stream through the operator '{node.address}', not a module",
            hint="its edges can be cut by masks (wiring.run), not one by one",
        )
    return node


def _path(graph: Graph, read: Read, data: Node) -> Compiled | None:
    """The program from the stream value to a projection's data."""
    names = set(names_of(graph, read.entry))
    if data in names:
        return None
    given = Node(Kind.INPUT, operation="input", number=0)
    swap: dict[Node, Node] = dict.fromkeys(names, given)
    nodes = [given]
    needed = graph.upstream([data])
    for node in graph.nodes:
        if node not in needed or node in names:
            continue
        if node.kind is not Kind.CONST and node not in read.region:
            continue
        made = Node(**vars(node))
        for x in made.inputs():
            if x not in swap:
                raise EngineError(f"'{node.address}' reads more than the stream: {x}")
        made.replace_inputs(lambda x: swap[x])
        swap[node] = made
        nodes.append(made)
    mini = Graph(nodes, [], graph.out_spec)
    return compile_request(mini, [swap[data]], [], output=False)
