"""The wiring of a network with a residual stream; see engine/streams.py.

Shape suffixes: B batch, S slots of one read, U writers of one source, P position,
D width, R readers, W writers, X position and width together.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from patchclamp.core.circuit import Node, Reader
from patchclamp.core.errors import TargetError
from patchclamp.engine.gates import Gate, gates
from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.rewiring import Rewired, fanned, heads_back, heads_first, masked, written
from patchclamp.engine.streams import Read, Streams, projection
from patchclamp.engine.targets import Metric, measured
from patchclamp.methods.circuits.network.wiring import EdgeVariants, Recording, Slopes, Wiring
from patchclamp.model.inputs import Call, principal
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamWiring(Wiring):
    """Heads, MLPs and embeddings write; queries, keys, values, MLPs and the output read."""

    streams: Streams
    first_writer: tuple[int, ...]
    first_reader: tuple[int, ...]
    fan: Rewired = field(repr=False)
    mask: Rewired = field(repr=False)

    @classmethod
    def of(cls, net: Net, engine: GraphEngine, streams: Streams) -> StreamWiring:
        """Names and numbers of all writers and readers."""
        writers: list[Node] = []
        first_writer = []
        for source in streams.sources:
            first_writer.append(len(writers))
            units = [None] if source.num_heads is None else range(source.num_heads)
            writers += [Node(source.site, unit) for unit in units]
        readers: list[Reader] = []
        first_reader = []
        for read in streams.reads:
            first_reader.append(len(readers))
            readers += [
                Reader(Node(s.site, h), s.role) for s in read.slots for h in range(s.num_heads)
            ] or [Reader(Node(read.site))]
        possible = np.zeros((len(readers), len(writers)), dtype=bool)
        feeds = np.zeros_like(possible)
        for i, read in enumerate(streams.reads):
            rows = range(first_reader[i], first_reader[i] + read.num_slots)
            for s in read.sources:
                end = first_writer[s] + streams.sources[s].num_writers
                possible[rows, first_writer[s] : end] = True
            for s in read.feeds:
                _feed(feeds, read, first_reader[i], first_writer[s], streams.sources[s].num_writers)
        fed = {s for read in streams.reads for s in read.feeds}
        return cls(
            net=net,
            engine=engine,
            streams=streams,
            writers=tuple(writers),
            readers=tuple(readers),
            possible=possible,
            feeds=feeds,
            roots=tuple(i for i in range(len(streams.sources)) if i not in fed),
            first_writer=tuple(first_writer),
            first_reader=tuple(first_reader),
            notes=_notes(streams),
            fan=fanned(engine, streams),
            mask=masked(engine, streams),
        )

    def record(self, call: Call) -> Recording:
        with torch.no_grad():
            raw, values = self.fan.run(call, record=self.fan.values)
        output = principal(raw)
        return Recording(values=tuple(self._batched(values, output.shape[0])), output=output)

    def _batched(self, values: Sequence[Tensor], num_rows: int) -> list[Tensor]:
        """Values as (B, P, D) or (B, H, P, K), also those made once for all examples."""
        return [
            _with_rows(value.detach(), num_rows)  # a summand may be a parameter itself
            if source.attention is None
            else heads_first(value, source.attention)
            for source, value in zip(self.streams.sources, values, strict=True)
        ]

    def slopes(
        self,
        call: Call,
        metric: Metric,
        rows: Tensor,
        held: Mapping[int, Tensor] | None = None,
    ) -> Slopes:
        caught: dict[int, Tensor] = {}

        def catch(key: int, value: Tensor | None = None) -> Callable[[Tensor], Tensor]:
            def keep(x: Tensor) -> Tensor:
                x = (_with_rows(x, len(rows)) if key in shared else x).clone()
                if value is not None:
                    x = value.to(x.dtype).expand_as(x).clone()
                if not x.requires_grad:
                    x.requires_grad_(True)
                caught[key] = x
                return x

            return keep

        held, num = held or {}, len(self.fan.values)
        shared = {i for i, s in enumerate(self.streams.sources) if s.attention is None}
        catches = {v: catch(i, self._raw(i, held)) for i, v in enumerate(self.fan.values)}
        catches |= {r: catch(num + i) for i, r in enumerate(self.fan.reads)}
        with torch.enable_grad():
            raw, _ = self.fan.run(call, transforms=catches)
            found = measured(metric, principal(raw), rows)
            if not found.requires_grad:
                raise TargetError(f"the metric '{metric.name}' does not depend on the network")
            leaves = [caught[k] for k in range(num + len(self.fan.reads))]
            grads = torch.autograd.grad(found.sum(), leaves, allow_unused=True)
        filled = [
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
        ]
        return Slopes(
            metric=found.detach(),
            at=tuple(self._batched([x.detach() for x in leaves[:num]], len(rows))),
            values=tuple(self._batched(filled[:num], len(rows))),
            reads=tuple(filled[num:]),
        )

    def _raw(self, i: int, held: Mapping[int, Tensor]) -> Tensor | None:
        """A held value in the layout of the network."""
        attention = self.streams.sources[i].attention
        return held.get(i) if attention is None or i not in held else heads_back(held[i], attention)

    def _written(self, values: Sequence[Tensor], num_rows: int) -> Tensor:
        """What all writers add to the stream, (B, W, X), without biases."""
        parts = []
        for source, value in zip(self.streams.sources, values, strict=True):
            weight = None if source.output is None else self.engine.constant(source.output.weight)
            part = written(source, value, weight).detach()
            parts.append(part.expand(num_rows, *part.shape[1:]).flatten(2))
        return torch.cat(parts, 1)

    def products(self, differences: Sequence[Tensor], slopes: Slopes) -> Tensor:
        num_rows = slopes.metric.shape[0]
        with torch.no_grad():
            d_BWX = self._written(differences, num_rows)
            made = d_BWX.new_zeros(num_rows, len(self.readers), len(self.writers))
            for i, (read, slope) in enumerate(zip(self.streams.reads, slopes.reads, strict=True)):
                slope_BSPD = slope.transpose(0, 1) if read.slots else slope[:, None]
                g_BSX = slope_BSPD.flatten(2)
                columns = self._columns(read)
                rows = slice(self.first_reader[i], self.first_reader[i] + read.num_slots)
                if columns == list(range(columns[0], columns[-1] + 1)):  # no copy of a prefix
                    part = g_BSX @ d_BWX[:, columns[0] : columns[-1] + 1].transpose(1, 2)
                else:
                    part = g_BSX @ d_BWX[:, columns].transpose(1, 2)
                made[:, rows, columns] = part
        return made

    def _columns(self, read: Read) -> list[int]:
        """Writers of a read, in the order of its sources."""
        return [
            self.first_writer[s] + u
            for s in read.sources
            for u in range(self.streams.sources[s].num_writers)
        ]

    def node_products(self, differences: Sequence[Tensor], slopes: Slopes) -> Tensor:
        parts = []
        for source, d, g in zip(self.streams.sources, differences, slopes.values, strict=True):
            product = d * g
            if source.attention is not None:
                parts.append(product.flatten(2).sum(2))
            else:
                parts.append(product.flatten(1).sum(1, keepdim=True))
        return torch.cat(parts, 1)

    def variants(
        self, call: Call, differences: Sequence[Tensor], edges: Sequence[tuple[int, int]]
    ) -> Iterator[EdgeVariants]:
        d_BWX = self._written(differences, max(d.shape[0] for d in differences))
        by_read: dict[int, list[tuple[int, int]]] = {}
        for edge in edges:
            by_read.setdefault(bisect_right(self.first_reader, edge[0]) - 1, []).append(edge)
        entries = self.engine.values(call, [self.streams.reads[i].entry for i in by_read])
        for (i, mine), entry in zip(by_read.items(), entries, strict=True):
            read, first = self.streams.reads[i], self.first_reader[i]
            for gate in gates(self.streams, read):
                of_gate = [e for e in mine if e[0] - first in gate.slots]
                if of_gate:
                    yield EdgeVariants(
                        address=gate.node.address,
                        edges=tuple(of_gate),
                        first_row=_first_row(d_BWX, of_gate, entry),
                        make=partial(self._cut, gate, first, entry, d_BWX),
                    )

    def _cut(
        self,
        gate: Gate,
        first: int,
        entry: Tensor,
        d_BWX: Tensor,
        base: Tensor,
        edges: Sequence[tuple[int, int]],
    ) -> Tensor:
        """What a reader's gate holds with one edge cut at a time."""
        writers = torch.tensor([w for _, w in edges])
        change_KBPD = d_BWX[:, writers].transpose(0, 1).unflatten(2, entry.shape[1:])
        seen = (entry + change_KBPD).flatten(0, 1)
        return gate.cut(self.engine, seen, base, [r - first for r, _ in edges])

    def place_axis(self, source: int) -> int:
        return 1 if self.streams.sources[source].attention is None else 2

    def position_means(self, source: int, value: Tensor) -> Tensor:
        return value.mean(1 if self.streams.sources[source].attention is None else 2, keepdim=True)

    def run(self, call: Call, references: Sequence[Tensor], cut: Tensor) -> Tensor:
        raw, _ = self.mask.run(call, extra=[*references, *self._masks(cut)])
        return principal(raw)

    def record_cut(self, call: Call, references: Sequence[Tensor], cut: Tensor) -> Recording:
        with torch.no_grad():
            raw, values = self.mask.run(
                call, extra=[*references, *self._masks(cut)], record=self.mask.values
            )
        output = principal(raw)
        return Recording(values=tuple(self._batched(values, output.shape[0])), output=output)

    def _masks(self, cut: Tensor) -> list[Tensor]:
        """What of `cut` belongs to every read."""
        masks = []
        for i, read in enumerate(self.streams.reads):
            rows = slice(self.first_reader[i], self.first_reader[i] + read.num_slots)
            masks.append(cut[:, rows][:, :, self._columns(read)])
        return masks


def _notes(streams: Streams) -> tuple[str, ...]:
    """Norms that come after a sum."""
    norms = [
        read.site
        for read in streams.reads
        if read.feeds and not read.slots and not any(projection(n) for n in read.region)
    ]
    if not norms:
        return ()
    return (
        f"in this network norms come after the sums ('{norms[0]}' and {len(norms) - 1} more): they "
        "are nodes of their own, through which every edge between layers goes",
    )


def _first_row(d_BWX: Tensor, edges: Sequence[tuple[int, int]], entry: Tensor) -> int:
    """The first position at which any of these writers changes."""
    changed = d_BWX[:, sorted({w for _, w in edges})].unflatten(2, entry.shape[1:]) != 0
    by_position = changed.flatten(0, 1).any(0).any(-1).nonzero()
    return int(by_position[0]) if by_position.numel() else 0


def _with_rows(value: Tensor, num_rows: int) -> Tensor:
    """(P, D), (1, P, D) or (B, P, D) as (B, P, D)."""
    return value.expand(num_rows, *value.shape[-2:])


def _feed(feeds: np.ndarray, read: Read, reader: int, writer: int, num_writers: int) -> None:
    """A head's queries feed that head; a shared key head feeds all the heads that share it."""
    if not read.slots:
        feeds[reader, writer : writer + num_writers] = True
        return
    at = reader
    for slot in read.slots:
        shared = num_writers // slot.num_heads
        for h in range(slot.num_heads):
            feeds[at + h, writer + h * shared : writer + (h + 1) * shared] = True
        at += slot.num_heads
