"""Products of two perturbed values against closed forms and against each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patchclamp.core.errors import BoundError
from patchclamp.rules import products
from patchclamp.rules.base import Interval
from patchclamp.rules.products import MatMul, Mul


def boxes(*shapes: tuple[int, ...]) -> tuple[Interval, ...]:
    made = []
    for shape in shapes:
        centre, radius = torch.randn(shape).double(), torch.rand(shape).double() * 2
        made.append(Interval(centre - radius, centre + radius))
    return tuple(made)


def concrete(rows: tuple[Tensor, ...], constant: Tensor, given: tuple[Interval, ...]) -> Tensor:
    """The smallest value of rows over boxes."""
    for row, box in zip(rows, given, strict=True):
        low, high = box.lower[:, None], box.upper[:, None]
        least = row.clamp(min=0) * low + row.clamp(max=0) * high
        constant = constant + least.flatten(2).sum(2)
    return constant


def test_the_default_planes_are_as_good_as_interval_arithmetic() -> None:
    given = boxes((30, 8), (30, 8))
    rule = Mul((8,))
    eye = torch.eye(8, dtype=torch.float64)[None]
    interval = rule.interval(*given)
    for sign, side in ((1, interval.lower), (-1, -interval.upper)):
        bound = concrete(*rule.relax(given).backward(sign * eye), given)
        torch.testing.assert_close(bound, side, rtol=1e-12, atol=1e-12)


def test_mccormick_planes_at_the_ends_of_the_slopes() -> None:
    """xy >= c x + a y - a c on [a, b] x [c, d], and three more, by hand on [1, 2] x [-3, 5]."""
    given = tuple(
        Interval(torch.tensor([[low]]).double(), torch.tensor([[high]]).double())
        for low, high in ((1.0, 2.0), (-3.0, 5.0))
    )
    rule = Mul((1,))
    planes = [rule.relax(given, torch.full((2, 1, 1, 1), t).double()) for t in (0.0, 1.0)]
    found = [[round(float(k), 9) for k in (*p.below, *p.above)] for p in planes]
    assert found[0] == [-3, 1, 3, 5, 1, -5]
    assert found[1] == [5, 2, -10, -3, 2, 6]


def test_a_matrix_product_is_a_sum_of_products() -> None:
    """Planes of x @ y against Mul on the expanded product, for the same t."""
    left, right = boxes((4, 2, 3), (4, 3, 5))
    rule = MatMul(((2, 3), (3, 5)))
    expanded = (
        Interval(*(s[..., None].expand(4, 2, 3, 5) for s in left)),
        Interval(*(s[:, None].expand(4, 2, 3, 5) for s in right)),
    )
    A = torch.randn(4, 6, 2, 5, dtype=torch.float64)
    single = Mul((2, 3, 5))
    wide = A[:, :, :, None].expand(4, 6, 2, 3, 5)
    for t in (0.0, 1.0):
        rows, constant = rule.relax(
            (left, right), torch.full((2, 1, 1, 2, 5), t).double()
        ).backward(A)
        (x, y), total = single.relax(expanded, torch.full((2, 1, 1, 2, 3, 5), t).double()).backward(
            wide
        )
        torch.testing.assert_close(rows[0], x.sum(-1))
        torch.testing.assert_close(rows[1], y.sum(2))
        torch.testing.assert_close(constant, total)


def test_matrix_defaults_are_as_good_as_interval_arithmetic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = boxes((5, 2, 3, 4), (5, 2, 4, 3))
    rule = MatMul(((2, 3, 4), (2, 4, 3)))
    interval = rule.interval(*given)
    eye = torch.eye(18, dtype=torch.float64).reshape(1, 18, 2, 3, 3)
    for sign, side in ((1, interval.lower), (-1, -interval.upper)):
        bound = concrete(*rule.relax(given).backward(sign * eye), given)
        torch.testing.assert_close(bound, side.flatten(1), rtol=1e-11, atol=1e-11)
    monkeypatch.setattr(products, "MAX_PRODUCTS", 1)
    again = rule.interval(*given)
    torch.testing.assert_close(again.lower, interval.lower)
    torch.testing.assert_close(again.upper, interval.upper)


def test_matrices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BoundError, match="do not fit"):
        MatMul(((2, 3), (4, 5)))


def test_infinite_factors_are_refused() -> None:
    box = Interval(torch.tensor([[0.0]]), torch.tensor([[torch.inf]]))
    with pytest.raises(BoundError, match="Mul"):
        Mul((1,)).relax((box, box))
    matrix = Interval(torch.zeros(1, 1, 1), torch.full((1, 1, 1), torch.inf))
    with pytest.raises(BoundError, match="MatMul"):
        MatMul(((1, 1), (1, 1))).relax((matrix, matrix))
