"""Fused softmax: against corners, against the four operators it replaces, and masks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from patchclamp.core.errors import BoundError
from patchclamp.rules.base import Interval
from patchclamp.rules.convex import Exp, Reciprocal
from patchclamp.rules.products import Mul
from patchclamp.rules.softmax import Softmax, log_others, others


def around(centre: Tensor, radius: float) -> Interval:
    return Interval(centre - radius, centre + radius)


def planes(box: Interval, n: int) -> tuple[Tensor, Tensor]:
    """Bounds of single outputs by the default planes."""
    eye = torch.eye(n, dtype=box.lower.dtype)[None]
    made = []
    for sign in (1, -1):
        (rows,), constant = Softmax((n,)).relax((box,)).backward(sign * eye)
        low, high = box.lower[:, None], box.upper[:, None]
        least = (rows.clamp(min=0) * low + rows.clamp(max=0) * high).sum(-1)
        made.append(sign * (constant + least))
    return made[0], made[1]


@pytest.mark.parametrize("n", [4, 5, 8])
def test_fused_stays_below_one_where_the_parts_do_not(n: int) -> None:
    """Logits in +-2: exp, sum, reciprocal and product one by one reach far above 1."""
    box = around(torch.zeros(1, n, dtype=torch.float64), 2.0)
    e = Exp((n,)).interval(box)
    total = Interval(e.lower.sum(-1, keepdim=True), e.upper.sum(-1, keepdim=True))
    inverse = Reciprocal((1,)).interval(total)
    parts = Mul((n,)).interval(e, Interval(*(s.expand(1, n) for s in inverse)))
    fused = Softmax((n,)).interval(box)
    assert float(parts.upper.max()) == pytest.approx(math.exp(4) / n)
    assert bool((fused.lower >= 0).all())
    assert bool((fused.upper <= 1).all())
    low, high = planes(box, n)
    assert bool((low >= -0.51).all())
    assert bool((high <= 1.01).all())


def test_the_interval_is_the_exact_one() -> None:
    """Over all corners of boxes with five logits."""
    lower = torch.randn(6, 5, dtype=torch.float64) * 2
    upper = lower + torch.rand(6, 5, dtype=torch.float64) * 3
    made = Softmax((5,)).interval(Interval(lower, upper))
    corners = [
        torch.softmax(torch.where(torch.tensor(choice), upper, lower), -1)
        for choice in itertools.product((False, True), repeat=5)
    ]
    values = torch.stack(corners)
    torch.testing.assert_close(made.lower, values.amin(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(made.upper, values.amax(0), rtol=1e-12, atol=1e-14)


def test_small_boxes_have_bounds_of_second_order() -> None:
    """Planes that are no tangents would leave a gap that shrinks with the radius only."""
    centre = torch.randn(3, 6, dtype=torch.float64)
    gaps = []
    for radius in (1e-2, 1e-3):
        box = around(centre, radius)
        A = torch.randn(3, 1, 6, dtype=torch.float64, generator=torch.manual_seed(1))
        (rows,), constant = Softmax((6,)).relax((box,)).backward(A)
        at_centre = constant[:, 0] + (rows[:, 0] * centre).sum(-1)
        gaps.append((A[:, 0] * torch.softmax(centre, -1)).sum(-1) - at_centre)
    assert bool((gaps[0] > 0).all())
    assert bool((gaps[1] < gaps[0] / 50).all())


def test_two_logits_are_a_sigmoid_of_their_difference() -> None:
    lower, upper = torch.tensor([[-1.0, 0.0]]).double(), torch.tensor([[1.0, 0.0]]).double()
    relaxation = Softmax((2,)).relax((Interval(lower, upper),))
    (rows,), _ = relaxation.backward(torch.tensor([[[1.0, 0.0]]]).double())
    assert float(rows[0, 0, 0]) == pytest.approx(-float(rows[0, 0, 1]))


def test_the_axis_and_a_single_logit() -> None:
    centre = torch.randn(2, 3, 4, dtype=torch.float64)
    across = Softmax((3, 4), 0).interval(around(centre, 0.5))
    along = Softmax((4, 3), -1).interval(around(centre.mT, 0.5))
    torch.testing.assert_close(across.lower, along.lower.mT)
    one = Softmax((3, 1)).interval(around(centre[:, :, :1], 5.0))
    assert bool((one.lower > 1 - 1e-14).all())
    assert bool((one.upper == 1).all())


@pytest.mark.parametrize("masked", [-math.inf, torch.finfo(torch.float32).min, -1e9])
def test_masked_logits_are_left_out(masked: float) -> None:
    lower = torch.randn(2, 4)
    upper = lower + 1
    lower[:, 2], upper[:, 2] = masked, masked
    keep = [0, 1, 3]
    box = Interval(lower, upper)
    made = Softmax((4,)).interval(box)
    assert bool((made.upper[:, 2] < 1e-30).all())
    without = Softmax((3,)).interval(Interval(lower[:, keep], upper[:, keep]))
    torch.testing.assert_close(made.upper[:, keep], without.upper)
    A = torch.randn(2, 3, 4)
    (rows,), constant = Softmax((4,)).relax((box,)).backward(A)
    (fewer,), same = (
        Softmax((3,)).relax((Interval(lower[:, keep], upper[:, keep]),)).backward(A[:, :, keep])
    )
    assert bool((rows[:, :, 2] == 0).all())
    torch.testing.assert_close(rows[:, :, keep], fewer)
    torch.testing.assert_close(constant, same, rtol=1e-4, atol=1e-4)


def test_rows_without_a_logit_are_refused() -> None:
    box = Interval(torch.full((1, 3), -torch.inf), torch.full((1, 3), -torch.inf))
    with pytest.raises(BoundError, match="Softmax"):
        Softmax((3,)).interval(box)
    box = Interval(torch.zeros(1, 3), torch.full((1, 3), torch.inf))
    with pytest.raises(BoundError, match="Softmax"):
        Softmax((3,)).relax((box,))


def test_sums_that_leave_one_out_do_not_cancel() -> None:
    x = torch.tensor([1e-20, 1e20, 3.0, 2e-20], dtype=torch.float64)
    torch.testing.assert_close(others(x), torch.tensor([1e20, 3.0, 1e20, 1e20]).double())
    y = torch.tensor([0.0, 900.0, 1.0], dtype=torch.float64)
    expected = [900.0, math.log(1 + math.e), 900.0]
    torch.testing.assert_close(log_others(y), torch.tensor(expected).double())
