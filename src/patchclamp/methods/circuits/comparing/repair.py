"""Repair a behaviour by holding chosen heads at what they should have done.

Where a network fails a task although it has the parts for it, one may ask which heads do
the wrong thing: hold them at their values (or attention) from a task that works, or make
them attend to the right tokens, and see whether the rest does its work again.
Source: Merullo et al. 2024 (heads adjusted in the middle layers repair a second task).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from patchclamp.core.edit_kinds import Patch
from patchclamp.core.edits import Edit
from patchclamp.core.errors import DataError, OptionError, SiteError
from patchclamp.core.findings import Interval, Json, Null
from patchclamp.engine.targets import Metric
from patchclamp.methods.circuits.checking.measuring import metric_rows
from patchclamp.methods.circuits.heads.attention_patterns import patterns
from patchclamp.methods.circuits.heads.weights import layers_of
from patchclamp.methods.statistics import bootstrap_mean, permutation_null, wilson
from patchclamp.net import Net

Head = tuple[int, int]
"""Layer and number of a query head."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Hold:
    """What any head would be held at.

    Attributes:
        site: "attn.{layer}.z" or "attn.{layer}.pattern".
        values: layer -> values with all axes of that site; a batch axis of size 1 serves
            every row, a head axis of size 1 every head.
        positions: query positions at which heads are held (None: all).
        description: for the record.
    """

    site: str
    values: Mapping[int, Tensor]
    positions: tuple[int, ...] | None
    description: str

    def edits(self, heads: Sequence[Head]) -> list[Edit]:
        """One edit for each layer with a held head."""
        made: list[Edit] = []
        for layer in sorted({layer for layer, _ in heads}):
            chosen = sorted(head for at, head in heads if at == layer)
            where: dict[str, list[int]] = {"head": chosen}
            values = self.values[layer]
            axis = 2 if self.site.endswith(".z") else 1
            if values.shape[axis] != 1:
                values = values.index_select(axis, torch.tensor(chosen))
            if self.positions is not None:
                name, at = ("position", 1) if axis == 2 else ("query", 2)
                where[name] = list(self.positions)
                values = values.index_select(at, _absolute(self.positions, values.shape[at]))
            made.append(Patch(site=self.site.format(layer=layer), values=values, where=where))
        return made


def _absolute(positions: Sequence[int], length: int) -> Tensor:
    return torch.tensor([p % length for p in positions])


def hold_outputs(net: Net, inputs: object, *, positions: Sequence[int] | None = None) -> Hold:
    """Heads' outputs (z) as they are in another run: row by row, or one row for all."""
    sites = [f"attn.{n}.z" for n in layers_of(net)]
    acts = net.record(inputs, sites)
    return Hold(
        site="attn.{layer}.z",
        values={n: acts.tensor(site) for n, site in enumerate(sites)},
        positions=None if positions is None else tuple(positions),
        description="outputs from another run",
    )


def hold_patterns(net: Net, inputs: object, *, positions: Sequence[int] | None = None) -> Hold:
    """Heads' attention as it is in another run."""
    return Hold(
        site="attn.{layer}.pattern",
        values=patterns(net, inputs),
        positions=None if positions is None else tuple(positions),
        description="attention from another run",
    )


def attend_to(
    net: Net,
    keys: Bool[Tensor, "row query key"],
    *,
    positions: Sequence[int] | None = None,
) -> Hold:
    """Attention shared equally among chosen keys; a query without any attends to itself.

    Args:
        keys: which keys each query attends to; one row serves all.
    """
    if keys.ndim != 3 or keys.shape[1] != keys.shape[2] or keys.dtype is not torch.bool:
        raise DataError(
            "keys to attend to are a mask over (row, query, key)",
            got=f"{keys.dtype} {tuple(keys.shape)}",
        )
    own = torch.eye(keys.shape[1], dtype=torch.bool).expand_as(keys)
    mask = torch.where(keys.any(2, keepdim=True), keys, own).float()
    pattern = (mask / mask.sum(2, keepdim=True))[:, None]
    return Hold(
        site="attn.{layer}.pattern",
        values=dict.fromkeys(layers_of(net), pattern),
        positions=None if positions is None else tuple(positions),
        description="attention to chosen keys",
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class RepairResult:
    """A task before and after heads were held.

    Attributes:
        before, after: mean metric.
        gain: after - before; interval over rows (paired).
        accuracy_before, accuracy_after: share of rows with a metric above 0.
        accuracy_interval: of the accuracy after.
        null: the gain by holding as many random other heads at their values.
        edits: what was done; `record` is the same as plain data, values left out.
    """

    heads: tuple[Head, ...]
    before: float
    after: float
    gain: float
    interval: Interval
    accuracy_before: float
    accuracy_after: float
    accuracy_interval: Interval
    null: Null
    edits: tuple[Edit, ...]
    record: tuple[dict[str, Json], ...]


@dataclass(frozen=True, kw_only=True)
class Repair:
    """Hold chosen heads while the network runs a task, against as many random heads.

    The null holds random sets of heads, none of them chosen ones, in the same way: so it
    asks whether *these* heads were at fault. All sets are taken where there are no more
    than `num_nulls`.

    Shapes: see `RepairResult`.
    Units: those of the metric; a row above 0 counts as answered correctly.
    Randomness: the random heads and the bootstrap, by `seed`.
    Cost: 2 + num_nulls forward passes.
    Raises: SiteError for a head that is not there; OptionError for no heads, or where too
        few others are left for a null; EditError where held values do not fit the inputs.
    Fails when: values of another run hold its *answer* as well as its mechanism: prefer
        attention, or positions before the answer is known.
    Source: see the module docstring.
    """

    num_nulls: int = 50
    seed: int = 0

    def run(
        self, net: Net, inputs: object, metric: Metric, heads: Sequence[Head], hold: Hold
    ) -> RepairResult:
        """Metric and accuracy with and without the hold."""
        chosen = tuple(dict.fromkeys(heads))
        others = self._others(net, chosen)
        before = metric_rows(net, inputs, metric)
        edits = hold.edits(chosen)
        after = metric_rows(net, inputs, metric, edits)
        drawn = [
            float((metric_rows(net, inputs, metric, hold.edits(heads)) - before).mean())
            for heads in self._random(others, len(chosen))
        ]
        gain = float((after - before).mean())
        right = int((after > 0).sum())
        return RepairResult(
            heads=chosen,
            before=float(before.mean()),
            after=float(after.mean()),
            gain=gain,
            interval=bootstrap_mean(after - before, seed=self.seed),
            accuracy_before=float((before > 0).double().mean()),
            accuracy_after=right / after.numel(),
            accuracy_interval=wilson(right, after.numel()),
            null=permutation_null(
                gain, torch.tensor(drawn), f"{len(chosen)} random other heads held alike"
            ),
            edits=tuple(edits),
            record=tuple(_described(e, hold) for e in edits),
        )

    def _others(self, net: Net, chosen: Sequence[Head]) -> list[Head]:
        """All heads but the chosen ones."""
        every = []
        for layer in layers_of(net):
            tap = net.taps(f"attn.{layer}.z")[0]
            every += [(layer, h) for h in range(int(tap.shape[tap.axes.index("head")]))]
        missing = [h for h in chosen if h not in every]
        if missing:
            raise SiteError(
                f"{net.name} has no head {missing[0]}", expected="(layer, head) of one of its heads"
            )
        others = [h for h in every if h not in chosen]
        if not chosen or math.comb(len(others), len(chosen)) < 1 or self.num_nulls < 1:
            raise OptionError(
                "no null can be drawn for these heads",
                got=f"{len(chosen)} heads to hold and {len(others)} others",
                expected="at least one head, and as many others",
            )
        return others

    def _random(self, others: Sequence[Head], num: int) -> list[tuple[Head, ...]]:
        if math.comb(len(others), num) <= self.num_nulls:
            return list(itertools.combinations(others, num))
        generator = torch.Generator().manual_seed(self.seed)
        return [
            tuple(others[i] for i in torch.randperm(len(others), generator=generator)[:num])
            for _ in range(self.num_nulls)
        ]


def _described(edit: Edit, hold: Hold) -> dict[str, Json]:
    data = edit.to_dict()
    data["values"] = hold.description
    return data
