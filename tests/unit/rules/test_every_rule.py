"""What must hold of every nonlinear rule, on boxes of all kinds and in both precisions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patchclamp.rules.base import Interval, Lines
from patchclamp.rules.convex import Softplus
from tests.unit.rules.cases import CASES, KINDS, UNARY, Case, boxes_of, hold_everything

WIDE_CHOICE = ("Exp", "Sin", "Cos")
"""Where the default is not the line of least area on wide intervals, on purpose."""


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_bounds_hold_on_samples(case: Case, dtype: torch.dtype) -> None:
    """Over 10^4 numbers for every rule and precision: eight kinds of boxes, six of each."""
    for kind in KINDS:
        hold_everything(case, boxes_of(case, kind, dtype), 64, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_smaller_box_has_no_wider_interval(case: Case) -> None:
    for kind in ("usual", "wide", "mixed"):
        boxes = boxes_of(case, kind, torch.float64)
        smaller = []
        for lower, upper in boxes:
            a, b = torch.rand(2, *lower.shape, dtype=torch.float64).sort(0).values
            smaller.append(Interval(lower + a * (upper - lower), lower + b * (upper - lower)))
        outer, inner = case.rule.interval(*boxes), case.rule.interval(*smaller)
        slack = 1e-14 * (outer.lower.abs() + outer.upper.abs() + 1)
        assert bool((inner.lower >= outer.lower - slack).all())
        assert bool((inner.upper <= outer.upper + slack).all())
        assert bool(((inner.upper - inner.lower) <= (outer.upper - outer.lower) + 2 * slack).all())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_initial_slopes_are_the_default_choice(case: Case) -> None:
    boxes = boxes_of(case, "usual", torch.float64)
    rule = case.rule
    slopes = rule.initial(boxes)
    assert slopes.shape == (rule.num_slopes, boxes[0].lower.shape[0], 1, *rule.output)
    assert bool(((slopes >= 0) & (slopes <= 1)).all())
    A = torch.randn(boxes[0].lower.shape[0], 2, *rule.output, dtype=torch.float64)
    default, chosen = (rule.relax(boxes, s).backward(A) for s in (None, slopes))
    for a, b in zip((*default[0], default[1]), (*chosen[0], chosen[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_finite(case: Case) -> None:
    """With regard to slopes and, for training on bounds, to the boxes."""
    for kind in ("tiny", "usual", "wide", "point"):
        boxes = tuple(
            Interval(*(side.clone().requires_grad_() for side in box))
            for box in boxes_of(case, kind, torch.float32)
        )
        rule = case.rule
        num = boxes[0].lower.shape[0]
        slopes = torch.rand(rule.num_slopes, num, 2, *rule.output, requires_grad=True)
        A = torch.randn(num, 2, *rule.output)
        rows, constant = rule.relax(boxes, slopes).backward(A)
        total = constant.sum() + sum(
            (
                (row.clamp(min=0) * box.lower[:, None]).sum()
                for row, box in zip(rows, boxes, strict=True)
            ),
            torch.zeros(()),
        )
        made = rule.interval(*boxes)
        total = total + made.lower.sum() + made.upper.sum()
        wanted: list[Tensor] = [slopes, *(side for box in boxes for side in box)]
        for gradient in torch.autograd.grad(total, wanted, allow_unused=True):
            assert gradient is None or bool(gradient.isfinite().all())


def envelope_at_middle(x: Tensor, y: Tensor) -> Tensor:
    """The lower convex envelope of points at their middle one, by all chords across it."""
    half = len(x) // 2
    left, right = slice(0, half + 1), slice(half, None)
    a, b = x[left, None], x[None, right]
    share = torch.where(b > a, (x[half] - a) / torch.where(b > a, b - a, 1), 0)
    values = y[left, None] * (1 - share) + y[None, right] * share
    return values.amin((0, 1))


@pytest.mark.parametrize("case", UNARY, ids=str)
def test_default_lines_have_the_least_area(case: Case) -> None:
    """No line below f is higher at the midpoint than the convex envelope, by brute force."""
    widths = (0.3, 1.5) if case.name in WIDE_CHOICE else (0.3, 1.5, 4.0)
    for width in widths:
        (box,) = boxes_of(case, "usual", torch.float64, 2)
        middle = (box.lower + box.upper) / 2
        lower, upper = middle - width / 2, middle + width / 2
        if case.domain in ("positive", "not negative"):
            lower, upper = lower.abs() + 0.05, lower.abs() + 0.05 + width
        if case.domain == "negative":
            lower, upper = -upper.abs() - 0.05 - width, -upper.abs() - 0.05
        lines = case.rule.relax((Interval(lower, upper),))
        assert isinstance(lines, Lines)
        grid = torch.linspace(0, 1, 201, dtype=torch.float64)
        x = lower + grid[:, None, None] * (upper - lower)
        y = case.rule.forward(x.flatten(0, 1)).reshape(x.shape)
        at = ((lower + upper) / 2)[:, None]
        below = torch.zeros_like(lines.above) if lines.below is None else lines.below
        down = (lines.below_slope * at + below)[:, 0]
        up = (lines.above_slope * at + lines.above)[:, 0]
        for i in range(lower.shape[0]):
            for j in range(lower.shape[1]):
                span = float(y[:, i, j].max() - y[:, i, j].min())
                drop = case.rule.drop if isinstance(case.rule, Softplus) else 0.0
                tolerance = 2e-3 * span + 1e-12 + drop
                best = envelope_at_middle(x[:, i, j], y[:, i, j])
                assert best - tolerance <= down[i, j] <= best + 1e-9 + 1e-3 * span
                best = -envelope_at_middle(x[:, i, j], -y[:, i, j])
                assert best - 1e-9 - 1e-3 * span <= up[i, j] <= best + tolerance


@pytest.mark.parametrize("case", UNARY, ids=str)
def test_slopes_move_the_lines(case: Case) -> None:
    """A slope that chooses nothing would make optimising it a waste."""
    box = boxes_of(case, "usual", torch.float64, 40)
    ends = []
    for value in (0.0, 1.0):
        slopes = torch.full((case.rule.num_slopes, 40, 1, *case.rule.output), value).double()
        lines = case.rule.relax(box, slopes)
        assert isinstance(lines, Lines)
        ends.append(torch.stack(torch.broadcast_tensors(lines.below_slope, lines.above_slope)))
    assert bool((ends[0] - ends[1]).abs().max() > 1e-3)
