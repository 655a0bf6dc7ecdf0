"""The path of neurons, one in each layer, that together carry a target.

Neurons are often judged one by one, each with all others at their values. Two neurons
that hand on one signal then both look important, although the second adds nothing once
the first is known. A path is judged as a whole: all its neurons are scaled together
from 0 to their values, and the gradient of the target is gathered on the way
(Wang et al. 2025). With F the target as a function of the path's activations w,

    line      sum_l  w_l * integral dF/dw_l (a w) da
    product  (sum_l w_l) * (integral sum_l dF/dw_l (a w) da)

The authors' score is *product*. It mixes one neuron's activation with another's
gradient, so it is not a share of the target. *line* is the path integral itself and
sums to F(w) - F(0): exactly what the target loses when the path's neurons are set to
zero. It is the default here, and needs no integral where only its value is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.core.edit_kinds import Callback
from patchclamp.core.errors import DataError, OptionError, SiteError
from patchclamp.core.findings import Interval, Null
from patchclamp.core.sites import Tap
from patchclamp.methods.circuits.checking.metrics import Metric
from patchclamp.methods.circuits.finding.unit_values import unit_values
from patchclamp.methods.statistics import bootstrap_mean, permutation_null
from patchclamp.model.inputs import Call
from patchclamp.net import Net


class Influence(StrEnum):
    """How a set of neurons is scored together; see the module docstring."""

    LINE = "line"
    PRODUCT = "product"


@dataclass(frozen=True, kw_only=True)
class ScoredPath:
    """A path and what it does to the target on the measured rows.

    Attributes:
        name: "joint" (the one that was searched for), "top activation" or "independent".
        units: its neuron in each layer; rows are alike unless paths are sought for each row.
        influence: the joint influence on each row, in units of the target.
        interval: of its mean over rows.
        removal: mean over rows of how far the target moves, either way, when the neurons
            take their mean over rows: another removal than the one searched with.
    """

    name: str
    units: Int[Tensor, "row layer"]
    influence: Float[Tensor, "row"]
    interval: Interval
    removal: float

    @property
    def mean(self) -> float:
        """Mean influence over rows."""
        return float(self.influence.mean())


@dataclass(frozen=True, kw_only=True)
class NeuronPathResult:
    """The path that was found, its baselines and its nulls.

    Attributes:
        sites: one for each layer, in order.
        found: the layer-progressive path.
        baselines: the neuron that is most active in each layer, and the one that is most
            influential alone in each layer.
        margins: interval of the mean over rows of found - baseline, by the baseline's name.
        null: influence of random paths, with the p value of the found path.
        removal_null: likewise for `removal`.
        progress: influence on the searched rows after each layer.
        estimates: first-order guesses of what each chosen neuron would add; next to
            `progress` they say how far the gradients could be trusted.
    """

    sites: tuple[str, ...]
    found: ScoredPath
    baselines: tuple[ScoredPath, ...]
    margins: Mapping[str, Interval]
    null: Null
    removal_null: Null
    progress: tuple[float, ...]
    estimates: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class NeuronPaths:
    """Layer-progressive search for the neurons that carry a target together.

    Layer by layer, the neuron is added that gives the path so far the largest joint
    influence. Gradients propose `top_k` neurons twice (with the layer at its values, and
    with the layer scaled along with the path); all proposals are then scored exactly.
    Unless every row has a path of its own, the search sees only some of the rows and
    all numbers are measured on the others, so that a path fitted to chance has no
    influence left. The null draws paths uniformly from all units. A path is there where
    its p value is small *and* its interval is above 0: where a target's signs are chance,
    large activations alone can beat random paths, but not their own interval.

    Shapes: see `ScoredPath`; a neuron is one unit of a site, at `position` or at all
        positions at once.
    Units: those of the metric; positive means that the path holds it up.
    Randomness: which rows are held out, random paths, bootstrap; all by `seed`.
    Cost: each layer 2 num_steps forward and backward passes over the searched rows and
        2 top_k forward passes (times num_steps and a backward pass for the product);
        then num_random + 3 forward passes over the measured rows.
    Raises: OptionError; SiteError for fewer than two sites or one without batch and unit
        axes; DataError for too few rows to hold some out.
    Fails when: the target has a backup that takes over whenever one neuron is removed. Then no
        first step has an effect and the greedy search starts at random. With `LINE`, later
        neurons that only hand on an earlier one's signal add nothing and are not chosen.
    Source: Wang et al. 2025, "Discovering influential neuron path in vision transformers".
    """

    influence: Influence = Influence.LINE
    position: int | None = None
    per_row: bool = False
    held_out: float = 0.5
    num_steps: int = 8
    top_k: int = 8
    num_random: int = 99
    batch_size: int = 256
    seed: int = 0

    def run(
        self, net: Net, inputs: object, sites: str | Sequence[str], metric: Metric
    ) -> NeuronPathResult:
        """Find a path through `sites` (globs, in the order of the forward pass).

        Args:
            metric: the target; see `patchclamp.methods.circuits.checking.metrics.Metric`.
        """
        self._check()
        generator = torch.Generator().manual_seed(self.seed)
        probe = _Probe(self, net, net.call(inputs), net.taps(sites), metric)
        searched, measured = self._split(probe.num_rows, generator)
        found, progress, estimates = self._search(probe, searched)
        alone = torch.cat(
            [self._next(probe, searched, at, _none(searched))[0] for at in range(probe.num_layers)],
            1,
        )
        active = torch.stack([self._argmax(c[searched].sum(1)) for c in probe.clean], 1)
        scored = [
            self._scored(probe, name, self._units(units, measured), measured)
            for name, units in (
                ("joint", found),
                ("top activation", active),
                ("independent", alone),
            )
        ]
        null, removal_null = self._nulls(probe, scored[0], measured, generator)
        return NeuronPathResult(
            sites=tuple(t.label for t in probe.taps),
            found=scored[0],
            baselines=tuple(scored[1:]),
            margins={
                b.name: bootstrap_mean(scored[0].influence - b.influence, seed=self.seed)
                for b in scored[1:]
            },
            null=null,
            removal_null=removal_null,
            progress=progress,
            estimates=estimates,
        )

    def _check(self) -> None:
        if not 0 < self.held_out < 1:
            raise OptionError("held_out is a share of the rows", got=f"{self.held_out:g}")
        for name in ("num_steps", "top_k", "num_random", "batch_size"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1", got=str(getattr(self, name)))

    def _split(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows to search on and rows to measure on."""
        everyone = torch.arange(num)
        if self.per_row:
            return everyone, everyone
        order = torch.randperm(num, generator=generator)
        out = round(num * self.held_out)
        if not 0 < out < num:
            raise DataError(
                "there are too few rows to hold some out",
                got=f"{num} rows, held_out={self.held_out:g}",
                hint="give more rows, or seek a path for each row with per_row=True",
            )
        return order[out:].sort().values, order[:out].sort().values

    def _search(
        self, probe: _Probe, rows: Tensor
    ) -> tuple[Tensor, tuple[float, ...], tuple[float, ...]]:
        """The path on these rows (row, layer), with its influence and estimate layer by layer."""
        path, progress, estimates = _none(rows), [], []
        for at in range(probe.num_layers):
            chosen, score, estimate = self._next(probe, rows, at, path)
            path = torch.cat([path, chosen], 1)
            progress.append(score)
            estimates.append(estimate)
        return path, tuple(progress), tuple(estimates)

    def _next(
        self, probe: _Probe, rows: Tensor, at: int, path: Tensor
    ) -> tuple[Tensor, float, float]:
        """The neuron of layer `at` that gives the path the largest influence: (row, 1)."""
        layers = (*range(path.shape[1]), at)
        guesses = probe.proposals(rows, path, at)
        best = torch.cat([self._over_rows(g).topk(self._k(g)).indices for g in guesses], 1)
        num = best.shape[1]
        tried = torch.cat([path.repeat(num, 1), best.T.reshape(-1, 1)], 1)  # candidate by candidate
        scores = probe.influence(rows.repeat(num), tried, layers).view(num, -1).T
        exact = self._over_rows(scores)
        top = exact.argmax(1, keepdim=True)
        chosen = best.gather(1, top)
        estimate = float(guesses[0].gather(1, chosen).mean())
        return chosen, float(exact.gather(1, top).mean()), estimate

    def _k(self, guess: Tensor) -> int:
        return min(self.top_k, guess.shape[1])

    def _over_rows(self, scores: Tensor) -> Tensor:
        """(row, candidate): as they are, or their mean in every row."""
        return scores if self.per_row else scores.mean(0, keepdim=True).expand_as(scores)

    def _argmax(self, scores: Tensor) -> Tensor:
        return self._over_rows(scores).argmax(1)

    def _units(self, units: Tensor, measured: Tensor) -> Tensor:
        return units if self.per_row else units[:1].expand(measured.numel(), -1)

    def _scored(self, probe: _Probe, name: str, units: Tensor, rows: Tensor) -> ScoredPath:
        influence = probe.influence(rows, units, range(probe.num_layers))
        return ScoredPath(
            name=name,
            units=units,
            influence=influence,
            interval=bootstrap_mean(influence, seed=self.seed),
            removal=probe.moved(rows, units),
        )

    def _nulls(
        self, probe: _Probe, found: ScoredPath, rows: Tensor, generator: torch.Generator
    ) -> tuple[Null, Null]:
        influences, removals = [], []
        layers = range(probe.num_layers)
        for _ in range(self.num_random):
            num = rows.numel() if self.per_row else 1
            drawn = [torch.randint(c.shape[2], (num,), generator=generator) for c in probe.clean]
            units = torch.stack(drawn, 1).expand(rows.numel(), -1)
            influences.append(probe.influence(rows, units, layers).mean())
            removals.append(probe.moved(rows, units))
        kind = "random paths, one unit of each layer"
        return (
            permutation_null(found.mean, torch.stack(influences), kind),
            permutation_null(found.removal, torch.tensor(removals), kind),
        )


def _none(rows: Tensor) -> Tensor:
    """A path without neurons, for these rows."""
    return torch.zeros(rows.numel(), 0, dtype=torch.long)


class _Probe:
    """The network with some units of some rows held at part of their values."""

    def __init__(
        self, method: NeuronPaths, net: Net, call: Call, taps: Sequence[Tap], metric: Metric
    ) -> None:
        if len(taps) < 2:
            raise SiteError("a path goes through at least two sites", got=f"{len(taps)}")
        self.method, self.net, self.call, self.taps, self.metric = method, net, call, taps, metric
        self.dims = net.call_dims(call)
        acts = net.record(call, [t.label for t in taps], batch_size=method.batch_size)
        self.clean = [self._seen(acts.tensor(t.label), t) for t in taps]
        self.means = [c.mean(0, keepdim=True).expand_as(c) for c in self.clean]
        self.num_layers, self.num_rows = len(taps), self.clean[0].shape[0]
        every = torch.arange(self.num_rows)
        self.plain = torch.cat([self._metric(part, []) for part in self._parts(every)])

    def drops(
        self, rows: Tensor, units: Tensor, layers: Sequence[int], *, to_mean: bool = False
    ) -> Float[Tensor, "row"]:
        """What the target loses when these units are set to zero (or to their mean)."""
        lost = []
        for part in self._parts(torch.arange(rows.numel())):
            edits = []
            for column, layer in enumerate(layers):
                held = self.means if to_mean else [torch.zeros_like(c) for c in self.clean]
                edits.append(self._hold(layer, units[part, column], held[layer][rows[part]]))
            lost.append(self.plain[rows[part]] - self._metric(rows[part], edits))
        return torch.cat(lost)

    def moved(self, rows: Tensor, units: Tensor) -> float:
        """Mean size of the target's change when these units are set to their mean."""
        return float(self.drops(rows, units, range(self.num_layers), to_mean=True).abs().mean())

    def influence(self, rows: Tensor, units: Tensor, layers: Sequence[int]) -> Float[Tensor, "row"]:
        """The joint influence of these units, by the method's measure."""
        if self.method.influence is Influence.LINE:
            return self.drops(rows, units, layers)
        activation, slope = self.along(rows, units, layers)
        return activation.sum((1, 2)) * slope.sum((1, 2))

    def along(
        self, rows: Tensor, units: Tensor, layers: Sequence[int]
    ) -> tuple[Float[Tensor, "row layer place"], Float[Tensor, "row layer place"]]:
        """Activations of these units, and their mean gradients while all are scaled 0 to 1."""
        clean = [_picked(self.clean[at][rows], units[:, i]) for i, at in enumerate(layers)]
        total = [torch.zeros_like(c) for c in clean]
        for part, scale in self._scaled(rows.numel()):
            edits = [
                self._hold(at, units[part, i], scale * self.clean[at][rows[part]])
                for i, at in enumerate(layers)
            ]
            for i, slope in enumerate(self._slopes(rows[part], edits, layers)):
                total[i].index_add_(0, part, _picked(slope, units[part, i]))
        return torch.stack(clean, 1), torch.stack(total, 1) / self.method.num_steps

    def proposals(self, rows: Tensor, path: Tensor, at: int) -> list[Float[Tensor, "row unit"]]:
        """First-order guesses of what each unit of layer `at` adds to the path's influence.

        Once with the layer at its values, once with all of it scaled along with the path.
        """
        guesses = []
        for whole in (False, True):
            total = torch.zeros_like(self.clean[at][rows])
            for part, scale in self._scaled(rows.numel()):
                chosen = rows[part]
                edits = [
                    self._hold(layer, path[part, layer], scale * self.clean[layer][chosen])
                    for layer in range(path.shape[1])
                ]
                if whole:
                    edits.append(self._hold(at, None, scale * self.clean[at][chosen]))
                total.index_add_(0, part, self._slopes(chosen, edits, [at])[0])
            guesses.append((total * self.clean[at][rows]).sum(1) / self.method.num_steps)
        return guesses

    def _scaled(self, num: int) -> Iterator[tuple[Tensor, Float[Tensor, "row 1 1"]]]:
        """Every row at the midpoints of `num_steps` equal parts of 0 to 1, in batches."""
        steps = self.method.num_steps
        scales = ((torch.arange(steps) + 0.5) / steps).repeat_interleave(num)
        for part in self._parts(torch.arange(num * steps)):
            yield part % num, scales[part][:, None, None]

    def _parts(self, index: Tensor) -> Iterator[Tensor]:
        yield from index.split(self.method.batch_size)

    def _target(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        at = self.metric.position
        return lambda out: self.metric(out if at is None else out[:, at], rows)

    def _metric(self, rows: Tensor, edits: list[Callback]) -> Float[Tensor, "row"]:
        output = self.net.run(self.call.rows(rows, self.dims), edits=edits).output
        return self._target(rows)(output)

    def _slopes(
        self, rows: Tensor, edits: list[Callback], layers: Sequence[int]
    ) -> list[Float[Tensor, "row place unit"]]:
        """Gradients of the target at the given layers."""
        labels = [self.taps[layer].label for layer in layers]
        found = self.net.gradients(
            self.call.rows(rows, self.dims), labels, self._target(rows), edits=edits
        )
        return [
            self._seen(found.grads.tensor(name), self.taps[layer])
            for name, layer in zip(labels, layers, strict=True)
        ]

    def _seen(self, value: Tensor, tap: Tap) -> Float[Tensor, "row place unit"]:
        """A site's value at the chosen position."""
        return unit_values(value, tap, self.method.position)[0]

    def _hold(
        self, layer: int, units: Tensor | None, held: Float[Tensor, "row place unit"]
    ) -> Callback:
        """An edit that holds a unit of each row (None: all units) at a value."""
        tap, position = self.taps[layer], self.method.position

        def hold(value: Tensor) -> Tensor:
            seen, put = unit_values(value, tap, position)
            if units is None:
                return put(held.to(seen))
            index = units[:, None, None].expand(-1, seen.shape[1], 1)
            return put(seen.scatter(2, index, held.to(seen).gather(2, index)))

        return Callback(site=tap.label, function=hold)


def _picked(values: Tensor, units: Tensor) -> Tensor:
    """(row, place, unit) at one unit of each row: (row, place)."""
    return values.gather(2, units[:, None, None].expand(-1, values.shape[1], 1))[..., 0]
