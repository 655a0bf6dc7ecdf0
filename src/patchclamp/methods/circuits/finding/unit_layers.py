"""A network as layers of units with edges between neighbours: values, interventions, gradients.

What graphs of causes and graphs of gradients share; see `causal_graph`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.core.circuit import Circuit, Node, Provenance, Reader
from patchclamp.core.edit_kinds import Callback
from patchclamp.core.errors import SiteError
from patchclamp.methods.circuits.checking.metrics import Metric
from patchclamp.methods.circuits.finding.unit_values import unit_values
from patchclamp.model.inputs import Call
from patchclamp.net import Net

OUTPUT = Node(":output")
"""The reader that the units of the last layer act on: the metric itself."""


class UnitLayers:
    """A network seen as layers of units, some of which can be held while it runs.

    Attributes:
        clean: each layer's values, (row, place, unit).
        reference: what units are set to, (1, place, unit); zero until `hold_at`.
        plain: the metric of each row.

    Raises:
        SiteError: fewer than two sites, or one without units.
    """

    def __init__(
        self, net: Net, call: Call, sites: str | Sequence[str], metric: Metric, batch_size: int
    ) -> None:
        self.net, self.call, self.metric, self.batch_size = net, call, metric, batch_size
        self.taps = net.taps(sites)
        if len(self.taps) < 2:
            raise SiteError("a graph of causes needs at least two sites", got=f"{len(self.taps)}")
        self.dims, self.num = net.call_dims(call), len(self.taps)
        self.clean = self.recorded(call)
        self.num_rows = self.clean[0].shape[0]
        self.plain = self._metric(torch.arange(self.num_rows), [])
        self.reference = [torch.zeros_like(c[:1]) for c in self.clean]

    def recorded(self, call: Call) -> list[Float[Tensor, "row place unit"]]:
        """All layers' values."""
        acts = self.net.record(call, [t.label for t in self.taps], batch_size=self.batch_size)
        return [unit_values(acts.tensor(t.label), t)[0] for t in self.taps]

    def hold_at(self, reference: list[Tensor]) -> None:
        """What units are set to from now on."""
        self.reference = reference

    # ---- interventions ------------------------------------------------------

    def moved(self, at: int) -> list[Float[Tensor, "row place unit"]]:
        """The next layer's values when one unit of this layer is at its reference."""
        found = []
        label = self.taps[at + 1].label
        for unit in range(self.clean[at].shape[2]):
            parts = []
            for rows in torch.arange(self.num_rows).split(self.batch_size):
                edit = self._set(
                    at, torch.full_like(rows, unit), self._at_reference(at, rows, unit)
                )
                acts = self.net.record(self.call.rows(rows, self.dims), label, edits=[edit])
                parts.append(unit_values(acts.tensor(label), self.taps[at + 1])[0])
            found.append(torch.cat(parts))
        return found

    def through(
        self, at: int, units: Tensor, values: Float[Tensor, "edge row place"]
    ) -> Float[Tensor, "row edge"]:
        """What the metric loses when, edge by edge, one unit of the layer takes these values."""
        rows = torch.arange(self.num_rows).repeat(units.numel())
        chosen = units.repeat_interleave(self.num_rows)
        lost = []
        for part in torch.arange(rows.numel()).split(self.batch_size):
            edit = self._set(at, chosen[part], values.flatten(0, 1)[part])
            lost.append(self.plain[rows[part]] - self._metric(rows[part], [edit]))
        return torch.cat(lost).view(units.numel(), self.num_rows).T

    def direct(self) -> Float[Tensor, "row unit"]:
        """What the metric loses when one unit of the last layer is at its reference."""
        last = self.num - 1
        units = torch.arange(self.clean[last].shape[2])
        every = torch.arange(self.num_rows)
        values = torch.stack([self._at_reference(last, every, int(u)) for u in units])
        return self.through(last, units, values)

    def slope(self, at: int) -> Float[Tensor, "row place unit"]:
        """Gradient of the metric at a layer."""
        parts = []
        for rows in torch.arange(self.num_rows).split(self.batch_size):
            parts.append(self._slope(at, rows, []))
        return torch.cat(parts)

    def slopes(self, at: int) -> Float[Tensor, "row place unit reader"]:
        """Gradients of the metric at a layer through one unit of the next layer alone.

        The gradient is linear in what the next layer lets pass, so that half the difference
        of passing unit j with sign + and - is what goes through j, also where other ways
        lead around that layer.
        """
        found = []
        for unit in range(self.clean[at + 1].shape[2]):
            parts = []
            for rows in torch.arange(self.num_rows).split(self.batch_size):
                up, down = (self._slope(at, rows, [self._pass(at + 1, unit, s)]) for s in (1, -1))
                parts.append((up - down) / 2)
            found.append(torch.cat(parts))
        return torch.stack(found, -1)

    def _at_reference(self, at: int, rows: Tensor, unit: int) -> Float[Tensor, "row place"]:
        return self.reference[at][:, :, unit].expand(rows.numel(), -1)

    def _set(self, at: int, units: Tensor, values: Float[Tensor, "row place"]) -> Callback:
        """An edit that sets one unit of each row."""
        tap = self.taps[at]

        def change(value: Tensor) -> Tensor:
            seen, put = unit_values(value, tap)
            index = units[:, None, None].expand(-1, seen.shape[1], 1)
            return put(seen.scatter(2, index, values[..., None].to(seen)))

        return Callback(site=tap.label, function=change)

    def _pass(self, at: int, unit: int, sign: int) -> Callback:
        """An edit that changes no value, and lets a gradient pass one unit only."""
        tap = self.taps[at]

        def change(value: Tensor) -> Tensor:
            seen, put = unit_values(value, tap)
            still = seen.detach()
            only = torch.zeros(seen.shape[2]).to(seen)
            only[unit] = sign
            return put(still + only * (seen - still))

        return Callback(site=tap.label, function=change)

    def _target(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        at = self.metric.position
        return lambda out: self.metric(out if at is None else out[:, at], rows)

    def _metric(self, rows: Tensor, edits: list[Callback]) -> Float[Tensor, "row"]:
        parts = []
        for part in rows.split(self.batch_size):
            output = self.net.run(self.call.rows(part, self.dims), edits=edits).output
            parts.append(self._target(part)(output))
        return torch.cat(parts)

    def _slope(self, at: int, rows: Tensor, edits: list[Callback]) -> Tensor:
        label = self.taps[at].label
        found = self.net.gradients(
            self.call.rows(rows, self.dims), label, self._target(rows), edits=edits
        )
        return unit_values(found.grads.tensor(label), self.taps[at])[0]

    # ---- the graph ----------------------------------------------------------

    def _sizes(self) -> list[int]:
        return [c.shape[2] for c in self.clean]

    def blank(self) -> np.ndarray:
        """False for every (reader, writer)."""
        sizes = self._sizes()
        return np.zeros((sum(sizes[1:]) + 1, sum(sizes)), dtype=bool)

    def block(self, at: int) -> tuple[slice, slice]:
        """Readers and writers of the edges that leave a layer."""
        ends = [0, *itertools.accumulate(self._sizes())]
        first = ends[at + 1] - ends[1]
        size = 1 if at == self.num - 1 else self._sizes()[at + 1]
        return slice(first, first + size), slice(ends[at], ends[at + 1])

    def circuit(self, scores: np.ndarray, record: Provenance) -> Circuit:
        """The scores as a circuit that keeps nothing yet."""
        possible = self.blank()
        for at in range(self.num):
            possible[self.block(at)] = True
        nodes = [
            [Node(t.label, u) for u in range(n)]
            for t, n in zip(self.taps, self._sizes(), strict=True)
        ]
        readers = [Reader(n) for layer in nodes[1:] for n in layer]
        return Circuit(
            writers=tuple(n for layer in nodes for n in layer),
            readers=(*readers, Reader(OUTPUT)),
            possible=possible,
            kept=self.blank(),
            scores=scores,
            record=record,
        )
