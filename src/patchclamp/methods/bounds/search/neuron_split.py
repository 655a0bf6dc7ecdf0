"""Branch and bound by dividing the arguments of nonlinear operators: for many inputs.

The layers are bounded once, on the whole box. Dividing a neuron restricts the interval of its
argument, and enters the bound as a Lagrange multiplier besides: inside a side z >= p the term
m (p - z) is at most 0, so that adding it to a row keeps a lower bound of the row's sum one of
the row. Slopes and multipliers of a batch of sub-problems are improved together by gradient
ascent, each from where its parent stopped.

Source: Wang et al. 2021, arXiv 2103.06624 (multipliers of ReLU splits); Shi et al. 2024,
arXiv 2405.21063 (splits of any nonlinearity at any point).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from patchclamp.bounding.lowering import Lowered
from patchclamp.bounding.propagate import Linearised, Propagation, Start
from patchclamp.bounding.sets import Box
from patchclamp.bounding.slopes import Optimised, SlopeSearch, free_values
from patchclamp.methods.bounds.search.branching import Choice, divisible, screened
from patchclamp.methods.bounds.search.goal import outward
from patchclamp.methods.bounds.search.limits import Limits
from patchclamp.rules.base import Interval, Nonlinear, gamma, magnitude
from patchclamp.rules.value import Value

Split = tuple[int, int, float, bool]
"""Place among the divisible values, element, point, and whether it is the side above."""


class NothingLeftError(Exception):
    """A sub-problem in which nothing can be divided is still open."""


@dataclass(frozen=True, eq=False)
class Paths:
    """The splits of B sub-problems as one list of entries.

    Attributes:
        num: B; depth: the longest path.
        leaf, level, place, index: of each entry, int64.
        above, point: of each entry.
    """

    num: int
    depth: int
    leaf: Tensor
    level: Tensor
    place: Tensor
    index: Tensor
    above: Tensor
    point: Tensor

    @classmethod
    def of(cls, paths: Sequence[tuple[Split, ...]]) -> Paths:
        """From the paths themselves."""
        entries = [
            (i, level, place, index, above, point)
            for i, path in enumerate(paths)
            for level, (place, index, point, above) in enumerate(path)
        ]
        table = torch.tensor(entries, dtype=torch.float64).reshape(-1, 6)
        leaf, level, place, index = table[:, :4].long().T.contiguous()
        depth = max(len(path) for path in paths)
        return cls(len(paths), depth, leaf, level, place, index, table[:, 4] > 0, table[:, 5])

    def extended(self, still: Tensor, choice: Choice, *, above: bool) -> Paths:
        """Some of them, each with one split more."""
        number = torch.full((self.num,), -1)
        number[still] = torch.arange(len(still))
        kept = number[self.leaf] >= 0
        new = torch.arange(len(still))
        return Paths(
            len(still),
            self.depth + 1,
            torch.cat([number[self.leaf[kept]], new]),
            torch.cat([self.level[kept], torch.full_like(new, self.depth)]),
            torch.cat([self.place[kept], choice.place[still]]),
            torch.cat([self.index[kept], choice.index[still]]),
            torch.cat([self.above[kept], torch.full((len(still),), above)]),
            torch.cat([self.point[kept], choice.point[still].double()]),
        )


@dataclass(frozen=True, eq=False)
class SubProblem:
    """One node of the tree.

    Attributes:
        path: its splits, from the root.
        slopes: for each nonlinear value, (num_slopes, R, *shape).
        multipliers: of the splits, (R, len(path)).
        bound: of its best row; choice: what to divide next.
    """

    path: tuple[Split, ...]
    slopes: dict[Value, Tensor]
    multipliers: Tensor
    bound: float
    choice: Split | None = None


@dataclass(frozen=True, eq=False)
class Leaf:
    """A closed sub-problem, and the row that is positive in it."""

    path: tuple[Split, ...]
    row: int
    slopes: dict[Value, Tensor]
    multipliers: Tensor


@dataclass(eq=False)
class Root:
    """A network with all its layers bounded on one box.

    Attributes:
        bounds: of the box.
        optimised: the slopes that were used in every layer.
        places: the values that can be divided; the perturbed input first.
        given: sides of neurons that every sub-problem starts from: what is proved holds where
            they do. `bounds` may have been cut by them already.
    """

    bounds: Propagation
    optimised: Optimised
    places: list[Value]
    given: tuple[Split, ...] = ()

    @classmethod
    def of(
        cls, network: Lowered, lower: Tensor, upper: Tensor, search: SlopeSearch, *, rounded: bool
    ) -> Root:
        """Bound every layer, with slopes optimised where that is affordable."""
        ((name, leaf),) = network.leaves.items()
        dtype = network.dtype
        low, high = outward(lower, upper, dtype)
        shape = (1, *leaf.shape)
        box = Box(low.reshape(shape), high.reshape(shape))
        bounds = Propagation(network, {name: box}, rounded=rounded)
        optimised = Optimised(bounds, search, kept={})
        if search.num_steps:
            bounds.improve = optimised
        with torch.enable_grad():  # for the slopes; nothing else asks for gradients
            bounds.run()
        return cls(bounds, optimised, [leaf, *divisible(network.values)])


@dataclass(frozen=True, kw_only=True)
class NeuronSplit:
    """Options of the search.

    Attributes:
        batch: sub-problems divided at a time.
        search: of slopes and multipliers in each sub-problem.
        margin: how far above 0 a bound has to be before it is replayed.
        num_tried: divisions of each sub-problem that are tried before one is taken.
        only_root: divide nothing.
    """

    batch: int = 64
    search: SlopeSearch = field(
        default_factory=lambda: SlopeSearch(num_steps=12, rate=0.1, decay=0.95)
    )
    margin: float = 1e-5
    num_tried: int = 3
    only_root: bool = False

    def run(
        self,
        root: Root,
        C: Tensor,
        d: Tensor,
        replayed: Callable[[list[Leaf]], list[bool]],
        limits: Limits,
        on_bound: Callable[[float], None] = lambda bound: None,
        tried: Callable[[Tensor], None] = lambda points: None,
    ) -> list[Leaf] | None:
        """Prove that in the box, on the root's given sides, some row of C . y + d is positive.

        The leaves, or None if the root stays open and nothing may be divided.

        Args:
            C, d: (1, R, *output) and (1, R).
            replayed: says of closed leaves whether they are to be believed.
            tried: told of inputs (B, *input) that linear bounds point to; raises to stop.

        Raises: OutOfTimeError, OutOfMemoryError, NothingLeftError.
        """
        work = _Work(self, root, C, d, limits, replayed, tried)
        multipliers = torch.zeros(C.shape[1], len(root.given), dtype=C.dtype)
        first = SubProblem(root.given, {}, multipliers, -torch.inf)
        heap: list[tuple[float, int, SubProblem]] = []
        leaves: list[Leaf] = []
        work.sort([first], heap, leaves, num_steps=4 * self.search.num_steps)
        while heap:
            if self.only_root:
                return None
            limits.check(len(heap))
            taken = [heapq.heappop(heap)[2] for _ in range(min(self.batch, len(heap)))]
            children = [child for problem in taken for child in work.divided(problem)]
            work.sort(children, heap, leaves, num_steps=self.search.num_steps)
            if heap:
                on_bound(heap[0][0])
        return leaves


@dataclass(eq=False)
class _Work:
    """One run."""

    options: NeuronSplit
    root: Root
    C: Tensor
    d: Tensor
    limits: Limits
    replayed: Callable[[list[Leaf]], list[bool]]
    tried: Callable[[Tensor], None]
    num_seen: int = 0

    @cached_property
    def free(self) -> list[Value]:
        """The values whose slopes every sub-problem chooses: those that are open at the root."""
        return free_values(self.root.bounds, [self.root.bounds.network.output])

    @staticmethod
    def _first(bounds: Propagation, value: Value, size: tuple[int, int]) -> Tensor:
        if not isinstance(value.rule, Nonlinear):
            raise TypeError(f"{value} has no slopes")
        chosen = value.rule.initial(tuple(bounds.interval(a) for a in value.arguments))
        return chosen.expand(-1, *size, *chosen.shape[3:]).clone()

    def divided(self, problem: SubProblem) -> list[SubProblem]:
        """Both sides; they inherit slopes and multipliers."""
        if problem.choice is None:
            raise NothingLeftError
        place, index, point, _ = problem.choice
        more = torch.cat(
            [problem.multipliers, problem.multipliers.new_zeros(len(problem.multipliers), 1)], 1
        )
        return [
            SubProblem(
                (*problem.path, (place, index, point, above)), problem.slopes, more, problem.bound
            )
            for above in (False, True)
        ]

    def sort(
        self,
        problems: list[SubProblem],
        heap: list[tuple[float, int, SubProblem]],
        leaves: list[Leaf],
        num_steps: int,
    ) -> None:
        """Bound sub-problems; the closed ones become leaves, the others wait."""
        self.limits.num_boxes += len(problems)
        paths = Paths.of([p.path for p in problems])
        bounds = self.restricted(paths)
        best, slopes, multipliers = self.improved(bounds, paths, problems, num_steps)
        value, row = best.max(1)
        closed = (value > self.options.margin).tolist()
        made = [
            Leaf(
                p.path,
                int(row[i]),
                {v: s[:, i] for v, s in slopes.items()},
                multipliers[i][:, : len(p.path)],
            )
            for i, p in enumerate(problems)
        ]
        candidates = [i for i, good in enumerate(closed) if good]
        held = self.replayed([made[i] for i in candidates]) if candidates else []
        for i, good in zip(candidates, held, strict=True):
            closed[i] = good
        leaves += [made[i] for i, good in enumerate(closed) if good]
        still = [i for i, good in enumerate(closed) if not good]
        if not still:
            return
        choices = self.chosen(bounds, paths, slopes, multipliers, row, torch.tensor(still))
        for i, choice in zip(still, choices, strict=True):
            self.num_seen += 1
            kept = SubProblem(
                problems[i].path,
                {v: s[:, i].clone() for v, s in slopes.items()},
                made[i].multipliers.clone(),
                float(value[i]),
                choice,
            )
            heapq.heappush(heap, (kept.bound, self.num_seen, kept))

    def restricted(self, paths: Paths) -> Propagation:
        """The root's layers, cut by the splits of each sub-problem."""
        base = self.root.bounds
        bounds = Propagation(base.network, base.sets, rounded=base.rounded)
        bounds.intervals.update(base.intervals)
        leaf = self.root.places[0]
        for place in paths.place.unique().tolist():
            value = self.root.places[place]
            lower, upper = (
                side.expand(paths.num, *value.shape).flatten(1).clone()
                for side in base.interval(value)
            )
            for side, above, reduce in ((lower, True, "amax"), (upper, False, "amin")):
                here = (paths.place == place) & (paths.above == above)
                at = paths.leaf[here] * lower.shape[1] + paths.index[here]
                side.view(-1).scatter_reduce_(0, at, paths.point[here].to(side), reduce)
            shape = (paths.num, *value.shape)
            bounds.intervals[value] = Interval(lower.reshape(shape), upper.reshape(shape))
            if value is leaf:
                bounds.sets = {leaf.name: Box(*bounds.intervals[value])}
        return bounds

    def start(self, bounds: Propagation, paths: Paths, multipliers: Tensor) -> Start:
        """The rows, with the splits' multipliers (B, R, depth) on what they divide."""
        rows = self.C.shape[1]
        rows_on = {self.root.bounds.network.output: self.C}
        constant = self.d.expand(paths.num, rows)
        if not len(paths.leaf):
            return rows_on, constant
        force = multipliers[paths.leaf, :, paths.level]
        force = torch.where(paths.above[:, None], -force, force)
        point = paths.point.to(force.dtype)
        constant = constant.index_add(0, paths.leaf, -force * point[:, None])
        if bounds.rounded:
            constant = constant - self._noise(bounds, multipliers, point)
        for place in paths.place.unique().tolist():
            here = paths.place == place
            value = self.root.places[place]
            size = torch.Size(value.shape).numel()
            on = torch.zeros(paths.num, size, rows, dtype=force.dtype)
            on = on.index_put((paths.leaf[here], paths.index[here]), force[here], accumulate=True)
            on = on.mT.reshape(paths.num, rows, *value.shape)
            held = rows_on.get(value)
            rows_on[value] = on if held is None else held + on
        return rows_on, constant

    def _noise(self, bounds: Propagation, multipliers: Tensor, point: Tensor) -> Tensor:
        """What rounding can do to the sum of the multipliers' terms, (B, R)."""
        largest = max(float(magnitude(bounds.interval(v)).max()) for v in self.root.places)
        size = (largest + float(point.abs().max())) * multipliers.detach().sum(2)
        return gamma(2 * multipliers.shape[2] + 4, multipliers.dtype) * size

    def improved(
        self, bounds: Propagation, paths: Paths, problems: list[SubProblem], num_steps: int
    ) -> tuple[Tensor, dict[Value, Tensor], Tensor]:
        """Bounds (B, R), their slopes (num, B, R, *shape) and multipliers (B, R, depth)."""
        num, rows = len(problems), self.C.shape[1]
        multipliers = torch.zeros(num, rows, paths.depth, dtype=self.C.dtype)
        for i, p in enumerate(problems):
            multipliers[i, :, : len(p.path)] = p.multipliers
        least = torch.full((num, rows), -torch.inf, dtype=self.C.dtype)
        slopes = {
            v: torch.stack([p.slopes[v] for p in problems], 1)
            if v in problems[0].slopes
            else self._first(bounds, v, (num, rows))
            for v in self.free
        }
        own = torch.zeros(num, paths.depth, dtype=torch.bool)
        own[paths.leaf, paths.level] = True
        return self._ascend(bounds, paths, slopes, multipliers, own, least, num_steps)

    def _ascend(
        self,
        bounds: Propagation,
        paths: Paths,
        slopes: dict[Value, Tensor],
        multipliers: Tensor,
        own: Tensor,
        best: Tensor,
        num_steps: int,
    ) -> tuple[Tensor, dict[Value, Tensor], Tensor]:
        multipliers.requires_grad_()
        moving = [s.requires_grad_() for s in slopes.values()]
        rate = self.options.search.rate
        adam = torch.optim.Adam(
            [{"params": moving, "lr": rate}, {"params": [multipliers], "lr": rate / 2}],
            betas=(0.9, 0.99),
        )
        kept = {v: s.detach().clone() for v, s in slopes.items()}
        kept_multipliers = multipliers.detach().clone()
        for step in range(num_steps + 1):
            self.limits.check()
            with torch.enable_grad():
                found = bounds.linearise(*self.start(bounds, paths, multipliers), slopes)
                loss = -found.bound.sum()
            bound = found.bound.detach()
            better = bound > best
            best = torch.maximum(best, bound)
            for v, s in slopes.items():
                where = better.reshape(1, *better.shape, *(1,) * (s.ndim - 3))
                kept[v] = torch.where(where, s.detach(), kept[v])
            kept_multipliers = torch.where(
                better[:, :, None], multipliers.detach(), kept_multipliers
            )
            if step == num_steps or bool((best.amax(1) > self.options.margin).all()):
                self._show(bounds, found)
                break
            wanted = [*moving, multipliers]
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            for s, gradient in zip(wanted, gradients, strict=True):
                s.grad = gradient
            adam.step()
            with torch.no_grad():
                for s in moving:
                    s.clamp_(0, 1)
                multipliers.clamp_(min=0).mul_(own[:, None])
            for group in adam.param_groups:
                group["lr"] *= self.options.search.decay
        return best, kept, kept_multipliers

    def _show(self, bounds: Propagation, found: Linearised) -> None:
        """Offer the corners where the linear bounds are lowest as counterexamples."""
        leaf = self.root.places[0]
        A, num = found.rows[leaf].detach(), len(found.bound)
        low, high = (side.expand(num, *leaf.shape) for side in bounds.interval(leaf))
        lowest = found.bound.detach().amin(1).topk(min(8, num), largest=False).indices
        A = A.expand(num, *A.shape[1:])[lowest]
        corners = torch.where(A > 0, low[lowest][:, None], high[lowest][:, None])
        self.tried(corners.flatten(0, 1))

    def chosen(
        self,
        bounds: Propagation,
        paths: Paths,
        slopes: dict[Value, Tensor],
        multipliers: Tensor,
        row: Tensor,
        still: Tensor,
    ) -> list[Split | None]:
        """What to divide in each open sub-problem; None where nothing can be."""
        met: dict[Value, Tensor] = {}
        with torch.no_grad():
            found = bounds.linearise(*self.start(bounds, paths, multipliers), slopes, met)
            candidates = screened(bounds, met, row, self.root.places, self.options.num_tried)
            gains = torch.stack(
                [self._gain(paths, c, slopes, multipliers, row, still) for c in candidates]
            )
        best = gains.argmax(0).tolist()
        picked: list[Split | None] = []
        for at, i in enumerate(still.tolist()):
            c = candidates[best[at]]
            if float(c.score[i]) > 0:
                picked.append((int(c.place[i]), int(c.index[i]), float(c.point[i]), False))
            else:
                picked.append(self._input(bounds, found, int(row[i]), i))
        return picked

    def _input(self, bounds: Propagation, found: Linearised, row: int, at: int) -> Split | None:
        """The input that moves the row most, halved: where every neuron is settled."""
        leaf = self.root.places[0]
        A = found.rows[leaf]
        A = A.expand(len(found.bound), *A.shape[1:])[at, row].flatten()
        low, high = (
            side.expand(len(found.bound), *leaf.shape)[at].flatten()
            for side in bounds.interval(leaf)
        )
        index = int((A.abs() * (high - low)).argmax())
        middle = float((low[index] + high[index]) / 2)
        if not float(low[index]) < middle < float(high[index]):
            return None
        return 0, index, middle, False

    def _gain(
        self,
        paths: Paths,
        choice: Choice,
        slopes: dict[Value, Tensor],
        multipliers: Tensor,
        row: Tensor,
        still: Tensor,
    ) -> Tensor:
        """The worse side's bound plus a little of the better one's, with the slopes at hand."""
        if self.options.num_tried == 1:
            return choice.score[still]
        sides = []
        mine = {v: s[:, still] for v, s in slopes.items()}
        held = torch.nn.functional.pad(multipliers[still], (0, 1))
        for above in (False, True):
            longer = paths.extended(still, choice, above=above)
            bounds = self.restricted(longer)
            found = bounds.linearise(*self.start(bounds, longer, held), mine).bound
            sides.append(found.gather(1, row[still][:, None])[:, 0])
        low, high = torch.minimum(*sides), torch.maximum(*sides)
        worth = low + 0.1 * high
        return torch.where(choice.score[still] > 0, worth, torch.full_like(worth, -torch.inf))
