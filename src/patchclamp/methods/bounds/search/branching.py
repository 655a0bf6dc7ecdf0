"""Which neuron to divide, and where.

A neuron is worth dividing if the linear bounds that stand for it are far from it where the row
reads it: the coefficient of the row times the largest gap between the function and the line
that the coefficient's sign picks. The best few of that screen are tried: both sides are bounded
once with the slopes at hand, and the one whose worse side gains most is taken.

Source: Bunel et al. 2020 and De Palma et al. 2021 (screening, then trying); Shi et al. 2024,
arXiv 2405.21063 (any nonlinearity; where to divide is chosen by the gap that is left).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.bounding.propagate import Propagation
from patchclamp.rules.base import Interval, Lines, Nonlinear
from patchclamp.rules.leaky import Kinked
from patchclamp.rules.products import Mul
from patchclamp.rules.relu import ReLU
from patchclamp.rules.smooth import Unary
from patchclamp.rules.value import Value

NUM_POINTS = 7


@dataclass(frozen=True)
class Choice:
    """One division for each sub-problem, (B,) each.

    Attributes:
        place: number of the value that is divided, among those that can be.
        index: element of it; point: where; score: how much is expected of it (0: nothing to do).
    """

    place: Tensor
    index: Tensor
    point: Tensor
    score: Tensor


def divisible(values: tuple[Value, ...]) -> list[Value]:
    """Arguments of nonlinear operators that are elementwise, each once, in order."""
    found: dict[Value, None] = {}
    for value in values:
        if isinstance(value.rule, (ReLU, Unary, Mul)):
            found.update(dict.fromkeys(value.arguments))
    return list(found)


def screened(
    bounds: Propagation, met: dict[Value, Tensor], row: Tensor, places: list[Value], num: int
) -> list[Choice]:
    """The `num` most promising divisions of every sub-problem, best first.

    Args:
        bounds: B sub-problems.
        met: rows on the nonlinear values, (B or 1, R, *shape).
        row: (B,) which row each sub-problem has to prove.
    """
    num_boxes = len(row)
    scores = [
        torch.zeros(num_boxes, v.shape.numel(), dtype=bounds.network.dtype)
        for v in map(_sized, places)
    ]
    points = [torch.zeros_like(s) for s in scores]
    for value, A in met.items():
        for argument in value.arguments:
            if argument not in places or not isinstance(value.rule, (ReLU, Unary, Mul)):
                continue
            at = places.index(argument)
            coefficient = A.expand(num_boxes, *A.shape[1:])[torch.arange(num_boxes), row]
            gain, point = _gain(bounds, value, argument, coefficient)
            better = gain > scores[at]
            points[at] = torch.where(better, point, points[at])
            scores[at] = scores[at] + gain
    sizes = [s.shape[1] for s in scores]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    flat, point = torch.cat(scores, 1), torch.cat(points, 1)
    best = flat.topk(min(num, flat.shape[1]), 1)
    choices = []
    for k in range(best.values.shape[1]):
        number = best.indices[:, k].contiguous()
        place = torch.searchsorted(starts, number, right=True) - 1
        choices.append(
            Choice(
                place,
                number - starts[place],
                point.gather(1, number[:, None])[:, 0],
                best.values[:, k],
            )
        )
    return choices


@dataclass(frozen=True)
class _Sized:
    shape: torch.Size


def _sized(value: Value) -> _Sized:
    return _Sized(torch.Size(value.shape))


def _gain(bounds: Propagation, value: Value, argument: Value, A: Tensor) -> tuple[Tensor, Tensor]:
    """How loose a value's bounds are where a row reads it, and where to divide: (B, elements)."""
    rule, box = value.rule, bounds.interval(argument)
    if isinstance(rule, Mul):
        first, second = (bounds.interval(a) for a in value.arguments)
        spare = (first.upper - first.lower) * (second.upper - second.lower) / 4
        middle = ((box.lower + box.upper) / 2).expand(A.shape)
        return (A.abs() * spare).flatten(1), middle.flatten(1)
    if not isinstance(rule, (ReLU, Unary)):
        raise TypeError(f"{value} is not elementwise")
    if isinstance(rule, ReLU):
        open_ = rule.open(box)
        lift = box.upper * -box.lower / (box.upper - box.lower).clamp(min=1e-12)
        low = torch.minimum(box.upper, -box.lower)
        gap = A.clamp(max=0).abs() * lift + A.clamp(min=0) * low * 0.5
        return torch.where(open_, gap, 0.0).flatten(1), torch.zeros(
            len(A), A[0].numel(), dtype=A.dtype
        )
    lines = bounds.relaxation(value)
    if not isinstance(lines, Lines):
        raise TypeError(f"{value} has no lines")
    below, above = _gaps(rule, lines, box)
    gap = A.clamp(min=0) * below + A.clamp(max=0).abs() * above
    return gap.flatten(1), _where(rule, box).expand(A.shape).flatten(1)


def _gaps(rule: Nonlinear, lines: Lines, box: Interval) -> tuple[Tensor, Tensor]:
    """The largest distance of the function from the line below it, and from the one above."""
    below = torch.zeros_like(box.lower)
    above = torch.zeros_like(box.lower)
    rest = 0.0 if lines.below is None else lines.below[:, 0]
    for t in torch.linspace(0, 1, NUM_POINTS).tolist():
        x = box.lower + t * (box.upper - box.lower)
        y = rule.forward(x)
        below = torch.maximum(below, y - (lines.below_slope[:, 0] * x + rest))
        above = torch.maximum(above, lines.above_slope[:, 0] * x + lines.above[:, 0] - y)
    return below, above


def _where(rule: Unary, box: Interval) -> Tensor:
    """The point of a few that leaves the smallest gaps on both sides together."""
    width = box.upper - box.lower
    if isinstance(rule, Kinked):
        kinks = [*rule.bent_up, *rule.bent_down]
        found = (box.lower + box.upper) / 2
        for kink in kinks:
            inside = (box.lower < kink) & (box.upper > kink)
            found = torch.where(inside, torch.full_like(found, kink), found)
        return found
    best = torch.full_like(width, torch.inf)
    found = box.lower + width / 2
    for t in (0.5, 0.3, 0.4, 0.6, 0.7):
        point = box.lower + t * width
        left = _loose(rule, Interval(box.lower, point)) * t
        right = _loose(rule, Interval(point, box.upper)) * (1 - t)
        better = left + right < best
        best, found = torch.where(better, left + right, best), torch.where(better, point, found)
    return found


def _loose(rule: Unary, box: Interval) -> Tensor:
    lines = rule.relax((box,))
    if not isinstance(lines, Lines):
        raise TypeError(f"{rule} has no lines")
    below, above = _gaps(rule, lines, box)
    return below + above
