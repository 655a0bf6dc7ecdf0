"""Maximum and minimum: exact where one argument wins, and the planes of least area."""

from __future__ import annotations

import pytest
import torch

from patchclamp.core.errors import BoundError
from patchclamp.rules.base import Interval
from patchclamp.rules.maximum import AmaxAxis, Maximum, MaxPool, Minimum


def boxes(num: int, n: int) -> Interval:
    centre, radius = torch.randn(num, n).double(), torch.rand(num, n).double() * 2
    return Interval(centre - radius, centre + radius)


def test_a_sure_winner_is_passed_on_exactly() -> None:
    x = Interval(torch.tensor([[1.0]]), torch.tensor([[2.0]]))
    y = Interval(torch.tensor([[-3.0]]), torch.tensor([[1.0]]))
    A = torch.tensor([[[2.0]], [[-2.0]]]).permute(1, 0, 2)
    (on_x, on_y), constant = Maximum((1,)).relax((x, y)).backward(A)
    assert torch.equal(on_x, A)
    assert not on_y.any()
    assert not constant.any()
    (on_x, on_y), constant = Minimum((1,)).relax((x, y)).backward(A)
    assert torch.equal(on_y, A)
    assert not on_x.any()
    assert not constant.any()


def test_minimum_mirrors_maximum() -> None:
    x, y = boxes(7, 3), boxes(7, 3)
    mirrored = tuple(Interval(-b.upper, -b.lower) for b in (x, y))
    A = torch.randn(7, 2, 3, dtype=torch.float64)
    rows, constant = Minimum((3,)).relax((x, y)).backward(A)
    others, same = Maximum((3,)).relax(mirrored).backward(-A)
    torch.testing.assert_close(constant, same)
    for a, b in zip(rows, others, strict=True):
        torch.testing.assert_close(a, -b)


def test_the_default_level_has_the_least_area_and_the_largest_upper_end() -> None:
    """Against a hundred other levels, at the midpoint; and over the box against max u."""
    box = boxes(40, 5)
    rule = AmaxAxis((5,))
    A = torch.full((40, 1), -1.0, dtype=torch.float64)
    middle = (box.lower + box.upper) / 2

    def at_middle(slopes: torch.Tensor | None) -> torch.Tensor:
        (rows,), constant = rule.relax((box,), slopes).backward(A)
        return -(constant + (rows * middle[:, None]).sum(-1))[:, 0]

    default = at_middle(None)
    for t in torch.linspace(0, 1, 100):
        slopes = torch.full((2, 40, 1), float(t), dtype=torch.float64)
        assert bool((default <= at_middle(slopes) + 1e-12).all())
    (rows,), constant = rule.relax((box,)).backward(A)
    least = rows.clamp(min=0) * box.lower[:, None] + rows.clamp(max=0) * box.upper[:, None]
    highest = -(constant + least.sum(-1))[:, 0]
    torch.testing.assert_close(highest, box.upper.amax(-1))
    assert bool((default < box.upper.amax(-1) - 1e-3).any())


def test_below_is_as_good_as_interval_arithmetic_at_slope_zero() -> None:
    box = boxes(20, 4)
    rule = AmaxAxis((4,))
    A = torch.ones(20, 1, dtype=torch.float64)
    slopes = torch.zeros(2, 20, 1, dtype=torch.float64)
    (rows,), constant = rule.relax((box,), slopes).backward(A)
    assert bool((rows.sum(-1) == 1).all())
    lowest = constant[:, 0] + (rows * box.lower[:, None]).sum(-1)[:, 0]
    torch.testing.assert_close(lowest, box.lower.amax(-1))


@pytest.mark.parametrize(
    "options",
    [
        ((2, 2), (2, 2), (0, 0), (1, 1), False),
        ((3, 3), (1, 1), (1, 1), (1, 1), False),
        ((3, 2), (2, 3), (1, 1), (2, 1), False),
        ((3, 3), (2, 2), (1, 1), (1, 1), True),
        ((2, 2), (3, 3), (0, 0), (1, 1), True),
    ],
    ids=str,
)
def test_windows_are_those_of_torch(
    options: tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int], bool],
) -> None:
    kernel, stride, padding, dilation, ceil = options
    rule = MaxPool((1, 3, 7, 8), kernel, stride, padding, dilation, ceil)
    x = torch.randn(4, 1, 3, 7, 8)
    expected = torch.nn.functional.max_pool2d(x[:, 0], kernel, stride, padding, dilation, ceil)
    assert rule.output == (1, *expected.shape[1:])
    assert torch.equal(rule.forward(x)[:, 0], expected)
    made = rule.interval(Interval(x, x))
    assert torch.equal(made.lower[:, 0], expected)
    # at a point the bound below is the value itself
    A = torch.randn(4, 2, *rule.output).abs()
    (rows,), constant = rule.relax((Interval(x, x),)).backward(A)
    found = (rows * x[:, None]).flatten(2).sum(2) + constant
    torch.testing.assert_close(found, (A * expected[:, None, None]).flatten(2).sum(2))


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BoundError, match="max pooling"):
        MaxPool((3, 4, 4), (2, 2), (2,), (0, 0), (1, 1))
    box = Interval(torch.zeros(1, 3), torch.full((1, 3), torch.nan))
    with pytest.raises(BoundError, match="AmaxAxis"):
        AmaxAxis((3,)).relax((box,))
    with pytest.raises(BoundError, match="Maximum"):
        Maximum((3,)).relax((box, box))
