"""Branch and bound by dividing the box of inputs: for networks with few inputs.

Each round bounds a batch of boxes; a box is closed where every case has a positive row, which
is replayed in float64 with outward rounding before it is believed. What stays open is looked
through for a counterexample, cut where a linear bound proves a part of it safe, and divided.

The input to divide is not the one with the largest coefficient in the linear bound (what is
loose about a bound is its constant, and on wide boxes that choice was seen to divide one input
hundreds of times for nothing) but the one that can move the output most: its width times a
bound of the slope, with every open ReLU counted as far as its chord rises (Wang et al. 2018,
ReluVal's smear).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from patchclamp.bounding.lowering import Lowered
from patchclamp.bounding.propagate import Propagation
from patchclamp.bounding.sets import Box
from patchclamp.methods.bounds.property import Numbers
from patchclamp.methods.bounds.search.attack import Attack, outputs
from patchclamp.methods.bounds.search.goal import Goal, outward
from patchclamp.methods.bounds.search.limits import Limits
from patchclamp.methods.bounds.search.tree import Ids, Tree
from patchclamp.rules.base import Affine, Nonlinear, magnitude
from patchclamp.rules.value import Value

SPARE = 1e-9
"""More than sums in another order differ by: the checker may have other boxes beside a leaf."""

Margins = Callable[[Numbers, Numbers, Numbers, Numbers], Numbers]
"""Sound lower bounds of rows over boxes: (lower, upper, rows, offsets) -> (B, R)."""


@dataclass(eq=False)
class _Open:
    """Boxes that are not closed: float64 sides, node numbers, and the bound they come from."""

    lower: Tensor
    upper: Tensor
    ids: Ids
    bound: Tensor

    def __len__(self) -> int:
        return len(self.lower)

    def take(self, keep: Tensor) -> _Open:
        """Some of them."""
        return _Open(self.lower[keep], self.upper[keep], self.ids[keep.numpy()], self.bound[keep])

    def joined(self, other: _Open) -> _Open:
        """All of both."""
        return _Open(
            torch.cat([self.lower, other.lower]),
            torch.cat([self.upper, other.upper]),
            np.concatenate([self.ids, other.ids]),
            torch.cat([self.bound, other.bound]),
        )


@dataclass(frozen=True, kw_only=True)
class InputSplit:
    """Options of the search.

    Attributes:
        batch: boxes bounded at a time; 16 to 64 stay within a core's cache.
        margin: how far above 0 a float32 bound has to be before it is replayed.
        cut: the share of an input's width that a cut has to save to be worth a leaf.
        attack: improves the corners that linear bounds point to.
    """

    batch: int = 64
    margin: float = 1e-6
    cut: float = 0.1
    attack: Attack = field(default_factory=lambda: Attack(num_steps=4))

    def run(
        self,
        network: Lowered,
        goal: Goal,
        replayed: Margins | None,
        confirm: Callable[[Tensor], bool],
        limits: Limits,
        on_bound: Callable[[float], None] = lambda bound: None,
    ) -> Tree | None:
        """Prove the goal. The tree of the proof, or None once `confirm` accepted a point.

        Args:
            network: with one perturbed value.
            goal: what has to hold in its box.
            replayed: float64 bounds that decide; None where the network's own bounds, rounded
                outwards, are to be believed.
            confirm: told of points with a computed margin of at most 0; True ends the search.
            limits: time and memory.
            on_bound: told the smallest bound of what is open, after each round.

        Raises: OutOfTimeError, OutOfMemoryError.
        """
        tree = Tree(goal.num_cases)
        pool = _Open(
            torch.as_tensor(goal.lower)[None],
            torch.as_tensor(goal.upper)[None],
            np.zeros(1, np.int64),
            torch.full((1,), -torch.inf, dtype=torch.float64),
        )
        while len(pool):
            limits.check(len(pool))
            batch, pool = self._next(pool)
            limits.num_boxes += len(batch)
            left = self._round(network, goal, replayed, confirm, limits, tree, batch)
            if left is None:
                return None
            pool = pool.joined(left)
            if len(pool):
                on_bound(float(pool.bound.min()))
        return tree

    def _next(self, pool: _Open) -> tuple[_Open, _Open]:
        """The boxes with the lowest bounds, and the rest."""
        if len(pool) <= self.batch:
            return pool, pool.take(torch.zeros(0, dtype=torch.int64))
        lowest = torch.zeros(len(pool), dtype=torch.bool)
        lowest[pool.bound.topk(self.batch, largest=False).indices] = True
        return pool.take(lowest), pool.take(~lowest)

    def _round(
        self,
        network: Lowered,
        goal: Goal,
        replayed: Margins | None,
        confirm: Callable[[Tensor], bool],
        limits: Limits,
        tree: Tree,
        batch: _Open,
    ) -> _Open | None:
        bounds = bounded(network, batch.lower, batch.upper, rounded=replayed is None)
        found = bounds.output(
            goal.matrix(network.dtype).reshape(1, -1, *network.output.shape),
            goal.shifts(network.dtype),
        )
        case_bound, row = goal.best(found.bound)
        closed = (case_bound > (self.margin if replayed is not None else 0)).all(1)
        if replayed is not None and bool(closed.any()):
            closed[closed.clone()] = _holds(goal, replayed, batch.take(closed), row[closed])
        tree.close(batch.ids[closed.numpy()], row[closed].numpy())
        still = ~closed
        if not bool(still.any()):
            return batch.take(still)
        batch = batch.take(still)
        (leaf,) = network.leaves.values()
        A = found.rows[leaf].expand(len(still), *found.rows[leaf].shape[1:])[still].flatten(2)
        worst = case_bound[still].argmin(1)
        chosen = row[still].gather(1, worst[:, None])[:, 0]
        batch.bound = case_bound[still].amin(1).double()
        slope = A.gather(1, chosen[:, None, None].expand(-1, 1, A.shape[2]))[:, 0]
        point = self._tried(network, goal, batch, slope, limits)
        if point is not None and confirm(point):
            return None
        score = influence(bounds, goal.matrix(network.dtype)[0][chosen], still)
        if goal.num_cases == 1 and self.cut < 1:
            constant = found.constant.expand(len(still), -1)[still]
            batch, score = self._cut(network, goal, tree, batch, (A, constant), replayed, score)
            if not len(batch):
                return batch
        return _halved(tree, batch, score)

    def _tried(
        self, network: Lowered, goal: Goal, batch: _Open, slope: Tensor, limits: Limits
    ) -> Tensor | None:
        """A counterexample near the corners where the linear bounds are lowest."""
        lower, upper = batch.lower.to(network.dtype), batch.upper.to(network.dtype)
        corner = torch.where(slope > 0, lower, upper)
        with torch.no_grad():
            middle = (lower + upper) / 2
            at = torch.cat([corner, middle])
            best = goal.margin(outputs(network, at))
            if bool((best <= 0).any()):
                return at[best.argmin()]
            nearest = best.topk(min(16, len(at)), largest=False).indices
        box = nearest % len(lower)
        return self.attack.improve(network, goal, at[nearest], lower[box], upper[box], limits)

    def _cut(
        self,
        network: Lowered,
        goal: Goal,
        tree: Tree,
        batch: _Open,
        linear: tuple[Tensor, Tensor],
        replayed: Margins | None,
        score: Tensor,
    ) -> tuple[_Open, Tensor]:
        """Take off the parts in which one row's linear bound is positive.

        What is taken off is a leaf of its own, replayed like any other.
        """
        cut = _half_lines(batch, *linear)
        worth = (cut.gain > self.cut) & (cut.gain < 1)
        if bool(worth.any()):
            gone = cut.taken(batch, inside=False).take(worth)
            worth[worth.clone()] = _safe(network, goal, replayed, gone, cut.row[worth])
        if not bool(worth.any()):
            return batch, score
        below, above = tree.split(
            batch.ids[worth.numpy()], cut.index[worth].numpy(), cut.point[worth].numpy()
        )
        up = cut.above[worth].numpy()
        tree.close(np.where(up, above, below), cut.row[worth][:, None].numpy())
        trimmed = cut.taken(batch, inside=True)
        kept = _Open(
            torch.where(worth[:, None], trimmed.lower, batch.lower),
            torch.where(worth[:, None], trimmed.upper, batch.upper),
            batch.ids.copy(),
            batch.bound,
        )
        kept.ids[worth.numpy()] = np.where(up, below, above)
        width = (batch.upper - batch.lower).clamp(min=1e-300)
        return kept, score * ((kept.upper - kept.lower) / width).to(score)


@dataclass(frozen=True, eq=False)
class _Cut:
    """For each box one input, divided at a point; a row holds on one side of it.

    Attributes:
        index, point: (B,) of the input.
        above: whether it is the side above that is safe.
        row: which row holds there.
        gain: the share of the input's width that is safe.
    """

    index: Tensor
    point: Tensor
    above: Tensor
    row: Tensor
    gain: Tensor

    def taken(self, batch: _Open, *, inside: bool) -> _Open:
        """The part that is left (inside), or the part that is cut off."""
        pick = torch.arange(len(batch))
        lower, upper = batch.lower.clone(), batch.upper.clone()
        top = self.above if inside else ~self.above
        upper[pick[top], self.index[top]] = self.point[top]
        lower[pick[~top], self.index[~top]] = self.point[~top]
        return _Open(lower, upper, batch.ids, batch.bound)


def _half_lines(batch: _Open, A: Tensor, constant: Tensor) -> _Cut:
    """Where A x + c > 0 a row holds; with the other inputs at their worst, a half-line of each."""
    low, high = batch.lower, batch.upper
    A, constant = A.double(), constant.double()
    ends = torch.minimum(A * low[:, None], A * high[:, None])
    rest = -(ends.sum(2, keepdim=True) + constant[:, :, None] - ends)
    reach = rest / torch.where(A.abs() < 1e-12, torch.nan, A)
    width = high - low
    slack = 1e-4 * width[:, None]
    tops = torch.where(A > 1e-12, reach + slack, torch.inf).min(1)
    floors = torch.where(A < -1e-12, reach - slack, -torch.inf).max(1)
    gain = torch.stack([(high - tops.values) / width, (floors.values - low) / width], 2)
    best, place = gain.nan_to_num(0.0).flatten(1).max(1)
    index, above = place // 2, place % 2 == 0
    pick = torch.arange(len(batch))
    return _Cut(
        index,
        torch.where(above, tops.values[pick, index], floors.values[pick, index]),
        above,
        torch.where(above, tops.indices[pick, index], floors.indices[pick, index]),
        best,
    )


def _safe(
    network: Lowered, goal: Goal, replayed: Margins | None, batch: _Open, row: Tensor
) -> Tensor:
    """Whether a row is positive all over each box, by what decides."""
    if replayed is not None:
        return _holds(goal, replayed, batch, row[:, None])
    bounds = bounded(network, batch.lower, batch.upper, rounded=True)
    C = goal.matrix(network.dtype).reshape(1, -1, *network.output.shape)
    found = bounds.output(C, goal.shifts(network.dtype)).bound
    return found.gather(1, row[:, None])[:, 0] > 0


def bounded(network: Lowered, lower: Tensor, upper: Tensor, *, rounded: bool) -> Propagation:
    """All layers bounded on boxes (B, num_inputs) of float64, rounded outwards to the network's."""
    ((name, leaf),) = network.leaves.items()
    low, high = outward(lower, upper, network.dtype)
    shape = (len(lower), *leaf.shape)
    bounds = Propagation(
        network, {name: Box(low.reshape(shape), high.reshape(shape))}, rounded=rounded
    )
    with torch.no_grad():
        bounds.run()
    return bounds


def influence(bounds: Propagation, rows: Tensor, still: Tensor) -> Tensor:
    """How far each input can move the row of each open box: (B, num_inputs).

    Absolute coefficients go backwards through absolute constants; a nonlinear operator passes
    as much as its steeper line. A screen, not a bound: shared paths are counted twice.
    """
    network = bounds.network
    (leaf,) = network.leaves.values()
    shape = (len(rows), 1, *network.output.shape)
    pending: dict[Value, Tensor] = {network.output: rows.abs().reshape(shape)}
    for value in reversed(network.values):
        G = pending.pop(value, None)
        if G is None or value.rule is None:
            if value is leaf and G is not None:
                pending[value] = G
            continue
        for argument, part in zip(value.arguments, _passed(bounds, value, G, still), strict=True):
            pending[argument] = pending[argument] + part if argument in pending else part
    box = bounds.interval(leaf)
    width = (box.upper - box.lower)[still].flatten(1)
    return pending[leaf].flatten(1) * width


def _passed(bounds: Propagation, value: Value, G: Tensor, still: Tensor) -> tuple[Tensor, ...]:
    rule = value.rule
    if isinstance(rule, Affine):
        return _absolute(rule, G)
    if not isinstance(rule, Nonlinear):
        raise TypeError(f"{value} has no rule to go back through")
    boxes = [bounds.interval(a) for a in value.arguments]
    made = rule.interval(*boxes)
    passed = []
    for box in boxes:
        if box.lower.shape != made.lower.shape:  # not elementwise: everything may pass
            rise = magnitude(made)[still].flatten(1).amax(1)
            wide = (box.upper - box.lower)[still].flatten(1).amax(1).clamp(min=1e-12)
            total = G.flatten(1).sum(1) * rise / wide
            ones = (1,) * (len(box.lower.shape) - 1)
            passed.append(total.reshape(-1, 1, *ones).expand(-1, 1, *box.lower.shape[1:]))
            continue
        rise = (made.upper - made.lower)[still]
        wide = (box.upper - box.lower)[still].clamp(min=torch.finfo(rise.dtype).tiny)
        passed.append(G * (rise / wide)[:, None])
    return tuple(passed)


def _absolute(rule: Affine, G: Tensor) -> tuple[Tensor, ...]:
    """The transpose of `spread`, by its gradient; weights are taken by hand where it is one."""
    weight = getattr(rule, "weight", None)
    if weight is not None and weight.ndim == 2:
        return (G @ weight.abs(),)
    with torch.enable_grad():
        at = [G.new_zeros(len(G), *shape).requires_grad_() for shape in rule.inputs]
        return tuple(g[:, None] for g in torch.autograd.grad(rule.spread(*at), at, G[:, 0]))


def _holds(goal: Goal, replayed: Margins, batch: _Open, row: Tensor) -> Tensor:
    """Whether the rows (B, num_cases) are positive in float64 all over their boxes."""
    used = row.unique()
    found = replayed(
        batch.lower.numpy(),
        batch.upper.numpy(),
        goal.rows[used.numpy()],
        goal.offsets[used.numpy()],
    )
    place = torch.searchsorted(used, row)
    return (torch.as_tensor(found).gather(1, place) > SPARE).all(1)


def _halved(tree: Tree, batch: _Open, score: Tensor) -> _Open:
    width = batch.upper - batch.lower
    middle = (batch.lower + batch.upper) / 2
    can = (middle > batch.lower) & (middle < batch.upper)
    index = torch.where(can, score.double() + 1e-9 * width, -torch.inf).argmax(1)
    pick = torch.arange(len(batch))
    point = middle[pick, index]
    below, above = tree.split(batch.ids, index.numpy(), point.numpy())
    upper, lower = batch.upper.clone(), batch.lower.clone()
    upper[pick, index] = point
    lower[pick, index] = point
    return _Open(
        torch.cat([batch.lower, lower]),
        torch.cat([upper, batch.upper]),
        np.concatenate([below, above]),
        torch.cat([batch.bound, batch.bound]),
    )
