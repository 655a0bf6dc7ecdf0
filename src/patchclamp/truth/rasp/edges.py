"""The edges of a planted transformer: which exist by its weights, and which matter.

`structural_edges` reads the weights: what a writer can put into the stream, seen through
what a reader takes out of it and makes use of. `edge_effects` patches one edge at a time
in a forward pass of its own, written out part by part, so that the truth does not rest
on the methods that are measured against it.

Shapes: B row, L position, D residual stream, E head, S head dimension, C class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812  (the name that torch's own documentation uses)
from torch import Tensor

from patchclamp.core.circuit import Edge, Node, Reader
from patchclamp.engine.targets import Metric
from patchclamp.truth.rasp.transformer import PlantedTransformer

NOTHING = 1e-9
"""Products of weights below this are rounding."""

EMBED, POSITION, LOGITS = Node("embed"), Node("position"), Node("logits")


def head(n: int, number: int) -> Node:
    """A head of block `n`."""
    return Node(f"attn.{n}.z", number)


def mlp(n: int) -> Node:
    """The perceptron of block `n`."""
    return Node(f"mlp.{n}.out")


def possible_edges(module: PlantedTransformer) -> Iterator[Edge]:
    """Every edge that the anatomy allows, readers in the order of the forward pass."""
    before = [EMBED, POSITION]
    for n in range(module.config.num_layers):
        heads = [head(n, h) for h in range(module.config.num_heads)]
        for reader in heads:
            for slot in ("q", "k", "v"):
                yield from (Edge(writer, reader, slot) for writer in before)
        before += heads
        yield from (Edge(writer, mlp(n)) for writer in before)
        before.append(mlp(n))
    yield from (Edge(writer, LOGITS) for writer in before)


# ---- structural -------------------------------------------------------------------


def structural_edges(module: PlantedTransformer) -> frozenset[Edge]:
    """Edges whose reader takes in what the writer writes, on ways from input to output."""
    with torch.no_grad():
        writes, reads = _writes(module), _reads(module)
        wired = [
            edge
            for edge in possible_edges(module)
            if _largest(reads[Reader(edge.reader, edge.slot)] @ writes[edge.writer]) > NOTHING
        ]
    reached = {EMBED, POSITION}
    for edge in wired:  # in the order of the forward pass, so that one sweep is enough
        if edge.writer in reached:
            reached.add(edge.reader)
    needed = {LOGITS}
    for edge in reversed(wired):
        if edge.reader in needed:
            needed.add(edge.writer)
    return frozenset(e for e in wired if e.writer in reached and e.reader in needed)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _rows(module: PlantedTransformer, number: int) -> slice:
    size = module.config.head_dim
    return slice(number * size, (number + 1) * size)


def _writes(module: PlantedTransformer) -> dict[Node, Tensor]:
    """Columns that span what each writer can add to the stream: (D, ...)."""
    found = {EMBED: module.embed.weight.T, POSITION: module.position.weight.T}
    for n in range(module.config.num_layers):
        attn, perceptron = module.layer(n).attn, module.layer(n).mlp
        for h in range(module.config.num_heads):
            rows = _rows(module, h)
            values = torch.cat([attn.v_proj.weight[rows], attn.v_proj.bias[rows, None]], 1)
            found[head(n, h)] = attn.o_proj.weight[:, rows] @ values
        up, down = perceptron.up, perceptron.down
        live = (up.weight.abs().amax(1) > NOTHING) | (up.bias > NOTHING)
        found[mlp(n)] = torch.cat([down.weight[:, live], down.bias[:, None]], 1)
    return found


def _reads(module: PlantedTransformer) -> dict[Reader, Tensor]:
    """Rows of what each reader takes out of the stream, as far as it makes use of it: (..., D).

    Queries matter through keys that differ between places, so that a bias of the keys
    does not count; keys matter through queries, values through the output projection,
    and a hidden unit of a perceptron through what it writes.
    """
    found = {Reader(LOGITS): module.unembed.weight}
    for n in range(module.config.num_layers):
        attn, perceptron = module.layer(n).attn, module.layer(n).mlp
        for h in range(module.config.num_heads):
            rows, node = _rows(module, h), head(n, h)
            q, k, v = (x.weight[rows] for x in (attn.q_proj, attn.k_proj, attn.v_proj))
            asked = torch.cat([q, attn.q_proj.bias[rows, None]], 1)
            found[Reader(node, "q")] = k.T @ q
            found[Reader(node, "k")] = asked.T @ k
            found[Reader(node, "v")] = attn.o_proj.weight[:, rows] @ v
        used = perceptron.down.weight.abs().amax(0) > NOTHING
        found[Reader(mlp(n))] = perceptron.up.weight[used]
    return found


# ---- active -----------------------------------------------------------------------


@dataclass
class Pass:
    """One forward pass, part by part, in which one edge may carry another run's value.

    Attributes:
        edge: the edge that is patched.
        donor: what every writer wrote in the run that the value is taken from.
        written: what every writer has written in this run: (B, L, D).
        entries: the stream before every block, and before the unembedding: (B, L, D).
    """

    edge: Edge | None = None
    donor: dict[Node, Tensor] | None = None
    written: dict[Node, Tensor] = field(default_factory=dict)
    entries: list[Tensor] = field(default_factory=list)

    def run(self, module: PlantedTransformer, ids: Tensor) -> Tensor:
        """Logits (B, L, C)."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self._write(EMBED, module.embed(ids))
        x = x + self._write(POSITION, module.position(places).expand_as(x))
        return self._finish(module, x, 0)

    def patched(self, module: PlantedTransformer, edge: Edge, donor: Pass) -> Tensor:
        """Logits (B, L, C) of this run with one edge patched; what comes before is kept."""
        site = edge.reader.site.split(".")
        block = int(site[1]) if len(site) > 1 else module.config.num_layers
        again = Pass(edge=edge, donor=donor.written, written=dict(self.written))
        return again._finish(module, self.entries[block], block)

    def _finish(self, module: PlantedTransformer, x: Tensor, first: int) -> Tensor:
        for n in range(first, module.config.num_layers):
            self.entries.append(x)
            x = x + self._attend(module, n, x)
            x = x + self._write(mlp(n), module.layer(n).mlp(self._seen(x, mlp(n), "")))
        self.entries.append(x)
        logits: Tensor = module.unembed(self._seen(x, LOGITS, ""))
        return logits

    def _write(self, node: Node, value: Tensor) -> Tensor:
        self.written[node] = value
        return value

    def _is_patched(self, node: Node, slot: str) -> bool:
        edge = self.edge
        return edge is not None and edge.reader == node and edge.slot == slot

    def _seen(self, x: Tensor, node: Node, slot: str) -> Tensor:
        if not self._is_patched(node, slot) or self.edge is None or self.donor is None:
            return x
        writer = self.edge.writer
        return x + self.donor[writer] - self.written[writer]

    def _attend(self, module: PlantedTransformer, n: int, x: Tensor) -> Tensor:
        attn, config = module.layer(n).attn, module.config
        projections = {"q": attn.q_proj, "k": attn.k_proj, "v": attn.v_proj}
        inner = {slot: project(x) for slot, project in projections.items()}
        for slot, project in projections.items():
            for h in range(config.num_heads):
                if self._is_patched(head(n, h), slot):
                    inner[slot] = inner[slot].clone()
                    rows = _rows(module, h)
                    inner[slot][..., rows] = project(self._seen(x, head(n, h), slot))[..., rows]
        shape = (config.num_heads, config.head_dim)
        q, k, v = (inner[slot].unflatten(-1, shape).transpose(1, 2) for slot in "qkv")
        z_BELS = F.scaled_dot_product_attention(q, k, v, is_causal=config.causal)
        total = attn.o_proj.bias.expand_as(x)
        for h in range(config.num_heads):
            out = z_BELS[:, h] @ attn.o_proj.weight[:, _rows(module, h)].T
            total = total + self._write(head(n, h), out)
        return total


def edge_effects(
    module: PlantedTransformer,
    clean: Tensor,
    corrupt: Tensor,
    metric: Metric,
    edges: Iterable[Edge],
) -> dict[Edge, float]:
    """Largest change of the metric, over all pairs and both directions, by patching an edge.

    Cost: one forward pass of all pairs in both directions for every edge.
    """
    rows = torch.arange(len(clean)).repeat(2)
    here, there = torch.cat([clean, corrupt]), torch.cat([corrupt, clean])
    with torch.no_grad():
        base, other = Pass(), Pass()
        before = _measured(metric, base.run(module, here), rows)
        other.run(module, there)
        found = {}
        for edge in edges:
            output = base.patched(module, edge, other)
            found[edge] = _largest(_measured(metric, output, rows) - before)
    return found


def _measured(metric: Metric, output: Tensor, rows: Tensor) -> Tensor:
    return metric(output if metric.position is None else output[:, metric.position], rows)
