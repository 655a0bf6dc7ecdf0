"""Graphs in which every reader of a residual stream has an input of its own.

In the plain network all heads of a layer read one value. Here each reader (a
head's queries, keys or values, an MLP, the output) gets its own copy, so that one
edge, from one writer to one reader, can be cut or its gradient taken. The graph is
rewritten, not the module: `fanned` only makes the copies, `masked` also replaces in
every copy the writers that its mask names by reference values.

Nothing is computed more than needed: norms run on the copies, but a head's projection
still multiplies only its own input with its own rows of the weight, which is as much
arithmetic as the plain projection.

Shape suffixes: B batch, S reader slots of one read, U writers of one source,
P position, D width of the stream, H heads, K head size, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from patchclamp.core.errors import EngineError
from patchclamp.engine.attention import Attention
from patchclamp.engine.codegen import Compiled, compile_request
from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.ir import Graph, Kind, Node
from patchclamp.engine.protocol import Transform
from patchclamp.engine.streams import Source, Streams, batch_axis, names_of
from patchclamp.model.inputs import Call


@dataclass
class Rewired:
    """A rewritten graph that can be run.

    Attributes:
        engine: the graph engine whose weights it uses.
        streams: what was rewritten.
        graph: the result.
        values: for every source, what is remembered of it; see `Source.value`.
        reads: for every read, its input: (S, B, P, D) for an attention, else (B, P, D).
        is_masked: whether it takes references and masks.
    """

    engine: GraphEngine
    streams: Streams
    graph: Graph
    values: tuple[Node, ...]
    reads: tuple[Node, ...]
    is_masked: bool
    _programs: dict[object, Compiled] = field(default_factory=dict, repr=False)

    def run(
        self,
        call: Call,
        *,
        extra: Sequence[Tensor] = (),
        record: Sequence[Node] = (),
        transforms: Mapping[Node, Transform] | None = None,
        output: bool = True,
    ) -> tuple[object, list[Tensor]]:
        """One pass; gradients flow where the caller has them enabled.

        Args:
            extra: for a masked graph, a reference for every source (it broadcasts to its
                value, heads first), then a mask for every read, float (B or 1, S, writers of the
                read's sources): 1 where the reference is read, 0 where the present value is.
            record: nodes of this graph to hand back.
            transforms: functions of nodes of this graph.
        """
        changes = dict(transforms or {})
        key = (tuple(record), tuple(changes), output)
        if key not in self._programs:
            self._programs[key] = compile_request(
                self.graph, list(record), list(changes), output=output
            )
        compiled = self._programs[key]
        constants = [self.engine.constant(n) for n in compiled.constants]
        given = [*call.tensors(), *extra]
        values, leaves = compiled.program(given, constants, list(changes.values()))
        result = pytree.tree_unflatten(leaves, self.graph.out_spec) if output else None
        return result, values


def fanned(engine: GraphEngine, streams: Streams) -> Rewired:
    """The graph with a copy of the stream for every reader."""
    return _Rewirer(engine, streams, masked=False).rewired()


def masked(engine: GraphEngine, streams: Streams) -> Rewired:
    """The graph in which readers see references in place of the writers that a mask names."""
    return _Rewirer(engine, streams, masked=True).rewired()


# ---- arithmetic ---------------------------------------------------------------


def heads_first(z: Tensor, attention: Attention) -> Tensor:
    """The heads' values as (B, H, P, K), whatever their layout in the network."""
    z = attention.view().read(z)
    axes = attention.axes("z")
    order = [axes.index(a) for a in ("batch", "head", "position", "unit")]
    return z.permute(order)


def heads_back(z: Tensor, attention: Attention) -> Tensor:
    """The inverse of `heads_first`: (B, H, P, K) in the layout of the network."""
    axes = attention.axes("z")
    names = ("batch", "head", "position", "unit")
    z = z.permute([names.index(a) for a in axes])
    return z if attention.num_heads is None else z.flatten(0, 1)


def output_weight(weight: Tensor, source: Source) -> Tensor:
    """The output projection as (H, K, D)."""
    if source.output is None or source.num_heads is None:
        raise EngineError(f"source '{source.site}' has no heads")
    w_FD = weight.T if source.output.transposed else weight
    w_HKD: Tensor = w_FD.unflatten(0, (source.num_heads, -1))
    return w_HKD


def written(source: Source, value: Tensor, weight: Tensor | None) -> Tensor:
    """What every writer of a source adds to the stream, without biases: (B or 1, U, P, D).

    Args:
        value: the source's value; (B, H, P, K) where it has heads.
        weight: of its output projection, where it has heads.
    """
    if weight is None:
        return value[None, None] if value.ndim == 2 else value[:, None]
    return value @ output_weight(weight, source)


def _difference(
    source: Source, reference: Tensor, value: Tensor, weight: Tensor | None = None
) -> Tensor:
    """What changes in the stream if the reference is written instead: (B or 1, U, P, D)."""
    if source.attention is not None:
        value = heads_first(value, source.attention)
    return written(source, reference - value, weight)


def _fan(num_slots: int, stream: Tensor) -> Tensor:
    """(B, P, D) to (S, B, P, D)."""
    return stream.expand(num_slots, *stream.shape)


def _mix(num_slots: int, stream: Tensor, mask: Tensor, *differences: Tensor) -> Tensor:
    """The stream as each slot sees it, with the masked writers replaced: (S, B, P, D)."""
    num_rows = max([stream.shape[0], mask.shape[0], *(d.shape[0] for d in differences)])
    seen_BSX = stream.flatten(1)[:, None].expand(num_rows, num_slots, -1)
    in_place = not (torch.is_grad_enabled() and any(x.requires_grad for x in (mask, *differences)))
    if in_place:  # one buffer that is added to, rather than a new one for every source
        seen_BSX = seen_BSX.clone(memory_format=torch.contiguous_format)
    start = 0
    for d_BUPD in differences:
        part = mask[:, :, start : start + d_BUPD.shape[1]]
        start += d_BUPD.shape[1]
        if part.requires_grad or bool(part.any()):
            part = part.expand(num_rows, -1, -1)
            d_BUX = d_BUPD.flatten(2).expand(num_rows, -1, -1)
            if in_place:
                seen_BSX.baddbmm_(part, d_BUX)
            else:
                seen_BSX = torch.baddbmm(seen_BSX, part, d_BUX)
    seen_BSPD: Tensor = seen_BSX.unflatten(2, stream.shape[1:])
    return seen_BSPD.transpose(0, 1)


def _mix_one(stream: Tensor, mask: Tensor, *differences: Tensor) -> Tensor:
    """`_mix` for a read of one slot: (B, P, D)."""
    return _mix(1, stream, mask, *differences)[0]


def _joined(fan: Tensor) -> Tensor:
    """(S, B, P, D) to (S * B, P, D): to the operators the copies are more examples."""
    return fan.flatten(0, 1)


@dataclass(frozen=True)
class _HeadRows:
    """One role's part of a projection: slots `first` to `first + num_heads` of the fan."""

    first: int
    start: int
    num_heads: int
    head_dim: int


def _per_head(
    num_slots: int,
    batch_axis: int,
    transposed: bool,
    rows: Sequence[_HeadRows],
    data: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """A projection in which every head's features come from its own copy of the data.

    Shapes: data (..., S * B, ..., D), the slots being outermost on `batch_axis`; the result is
    what the plain projection would give, (..., B, ..., F).
    """
    data = data.unflatten(batch_axis, (num_slots, -1)).movedim(batch_axis, 0)
    x_SND = data.flatten(1, -2)
    w_FD = weight if transposed else weight.T
    parts = []
    for r in rows:
        w_HDK = w_FD[r.start : r.start + r.num_heads * r.head_dim]
        w_HDK = w_HDK.unflatten(0, (r.num_heads, r.head_dim)).transpose(1, 2)
        y_HNK = x_SND[r.first : r.first + r.num_heads] @ w_HDK
        parts.append(y_HNK.transpose(0, 1).flatten(1))
    y_NF = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if bias is not None:
        y_NF = y_NF + bias
    return y_NF.reshape(*data.shape[1:-1], y_NF.shape[-1])


# ---- rewriting ----------------------------------------------------------------


class _Rewirer:
    """Used once by `fanned` and `masked`."""

    def __init__(self, engine: GraphEngine, streams: Streams, *, masked: bool) -> None:
        self.engine, self.streams, self.masked = engine, streams, masked
        self.num_inputs = len(engine.capture.dims)
        self.names = [names_of(streams.graph, read.entry) for read in streams.reads]
        self.role = self._roles()
        self.nodes: list[Node] = []
        self.swap: dict[Node, Node] = {}
        # what the nodes of a region see instead, for every read
        self.local: list[dict[Node, Node]] = [{} for _ in streams.reads]
        self.differences: dict[int, Node] = {}
        self.fans: dict[int, Node] = {}

    def rewired(self) -> Rewired:
        streams = self.streams
        sources = {s.leaf: i for i, s in enumerate(streams.sources)}
        entries: dict[Node, list[int]] = {}
        for i, read in enumerate(streams.reads):
            entries.setdefault(read.entry, []).append(i)
        for node in streams.graph.nodes:
            self._copy(node)
            if node in sources and self.masked:
                self._add_difference(sources[node])
            for i in entries.get(node, []):
                self._add_read(i)
        outputs = [self.swap[x] if isinstance(x, Node) else x for x in streams.graph.outputs]
        return Rewired(
            engine=self.engine,
            streams=streams,
            graph=Graph(self.nodes, outputs, streams.graph.out_spec),
            values=tuple(self.swap[s.value] for s in streams.sources),
            reads=tuple(self.fans[i] for i in range(len(streams.reads))),
            is_masked=self.masked,
        )

    def _roles(self) -> dict[Node, tuple[int, str]]:
        """What the nodes of a region are: its "whole", the "path" to the heads' projections, or
        such a projection ("slot"). The stream value itself and its tags stay as they are."""
        role: dict[Node, tuple[int, str]] = {}
        for i, read in enumerate(self.streams.reads):
            inside = read.region - set(self.names[i])
            if not read.slots:
                role.update(dict.fromkeys(inside, (i, "whole")))
                continue
            if len(read.feeds) > 1:
                raise EngineError(
                    f"'{read.site}' and another part read the stream through one norm",
                    hint="parallel attention and MLP that share a norm are not supported",
                )
            path = self.streams.graph.upstream([s.projection.data for s in read.slots])
            role.update(dict.fromkeys(path & inside, (i, "path")))
            role.update({s.projection.node: (i, "slot") for s in read.slots})
        return role

    def _copy(self, node: Node) -> None:
        i, kind = self.role.get(node, (-1, ""))
        if kind == "slot":
            self.swap[node] = self._per_head(node, i)
        elif kind == "whole":
            self.swap[node] = self.local[i][node] = self._clone(node, self.local[i])
        else:
            self.swap[node] = self._clone(node, {})
            if kind:  # the plain value serves those outside the region
                self.local[i][node] = self._clone(node, self.local[i])

    def _clone(self, node: Node, scope: Mapping[Node, Node]) -> Node:
        made = Node(**vars(node))
        made.replace_inputs(lambda x: scope.get(x) or self.swap[x])
        self.nodes.append(made)
        return made

    def _operator(self, target: Callable[..., object], args: Sequence[Node], like: Node) -> Node:
        made = Node(Kind.OP, module=like.module, target=target, args=tuple(args), dtype=like.dtype)
        self.nodes.append(made)
        return made

    def _input(self, number: int) -> Node:
        made = Node(Kind.INPUT, operation="input", number=self.num_inputs + number)
        self.nodes.append(made)
        return made

    def _add_difference(self, i: int) -> None:
        source = self.streams.sources[i]
        args = [self._input(i), self.swap[source.value]]
        if source.output is not None:
            args.append(self.swap[source.output.weight])
        self.differences[i] = self._operator(partial(_difference, source), args, source.leaf)

    def _add_read(self, i: int) -> None:
        read, stream = self.streams.reads[i], self.swap[self.streams.reads[i].entry]
        if self.masked:
            mask = self._input(len(self.streams.sources) + i)
            args = [stream, mask, *(self.differences[s] for s in read.sources)]
            mix = partial(_mix, read.num_slots) if read.slots else _mix_one
            fan = self._operator(mix, args, read.entry)
        elif read.slots:
            fan = self._operator(partial(_fan, read.num_slots), [stream], read.entry)
        else:
            fan = Node(Kind.TAG, args=(stream,), dtype=stream.dtype)
            self.nodes.append(fan)
        self.fans[i] = fan
        seen = self._operator(_joined, [fan], read.entry) if read.slots else fan
        self.local[i].update(dict.fromkeys(self.names[i], seen))

    def _per_head(self, node: Node, i: int) -> Node:
        """The projection with every head reading its own copy."""
        read = self.streams.reads[i]
        rows, first = [], 0
        for slot in read.slots:
            if slot.projection.node is node:
                rows.append(_HeadRows(first, slot.start, slot.num_heads, slot.head_dim))
            first += slot.num_heads
        made = next(s.projection for s in read.slots if s.projection.node is node)
        rows.sort(key=lambda r: r.start)
        covered = sum(r.num_heads * r.head_dim for r in rows)
        if node.shape is None or covered != node.shape[-1]:
            raise EngineError(
                f"'{node.address}' gives more than queries, keys and values",
                got=f"{covered} features of heads",
                expected=f"{node.shape[-1] if node.shape else 'unknown'}",
            )
        target = partial(_per_head, read.num_slots, batch_axis(made.data), made.transposed, rows)
        args = [self.local[i][made.data], self.swap[made.weight]]
        if made.bias is not None:
            args.append(self.swap[made.bias])
        return self._operator(target, args, node)
