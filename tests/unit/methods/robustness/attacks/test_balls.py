"""Projections against a slow exact one; nothing leaves a ball by rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patchclamp.core.errors import InputError, OptionError
from patchclamp.methods.robustness.attacks.balls import Ball, Norm

LIMITS = (torch.zeros(2, 3), torch.ones(2, 3))


def ball(norm: Norm, radius: Tensor | float, *, limits: bool = True, num: int = 40) -> Ball:
    generator = torch.Generator().manual_seed(3)
    centre = torch.rand(num, 2, 3, generator=generator)
    centre[0], centre[1] = 0.0, 1.0  # on the limits themselves
    return Ball.of(norm, centre, radius, LIMITS if limits else None)


def far(num: int = 40, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(num, 2, 3, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize(
    ("norm", "radius"), [(Norm.LINF, 0.1), (Norm.L2, 0.3), (Norm.L0, 2.0), (Norm.LINF, 1e-9)]
)
def test_projections_stay_inside_without_any_slack(norm: Norm, radius: float, scale: float) -> None:
    b = ball(norm, radius)
    z = b.project(b.centre + far(scale=scale))
    assert bool((b.distance(z) <= b.radius * (1 + 1e-15)).all())
    assert float(z.min()) >= 0
    assert float(z.max()) <= 1
    assert torch.equal(b.project(b.centre), b.centre)
    drawn = b.drawn(torch.Generator().manual_seed(0))
    assert bool((b.distance(drawn) <= b.radius * (1 + 1e-15)).all())


def test_the_l2_projection_is_the_nearest_point() -> None:
    b = ball(Norm.L2, 0.3)
    x = b.centre + far()
    z = b.project(x)
    c, d = b.centre.double(), (x - b.centre).double()
    low, high = torch.zeros(40, 1, 1, dtype=torch.float64), torch.ones(40, 1, 1).double()
    for _ in range(60):  # the scale by bisection
        middle = (low + high) / 2
        size = ((c + middle * d).clamp(0, 1) - c).flatten(1).norm(dim=1)[:, None, None]
        low, high = torch.where(size <= 0.3, middle, low), torch.where(size <= 0.3, high, middle)
    assert torch.allclose(z.double(), (c + low * d).clamp(0, 1), atol=1e-6)
    used = b.distance(z)
    assert float(used[2:].median()) == pytest.approx(0.3, abs=1e-6)  # the radius is used up


def test_l0_keeps_the_largest_elements() -> None:
    b = ball(Norm.L0, torch.tensor([0.0, 1.0, 2.0, 6.0]), num=4)
    z = b.project(b.centre + far(4))
    assert b.distance(z).tolist()[0] == 0
    assert bool((b.distance(z) <= b.radius).all())
    assert int((z[2] != b.centre[2]).sum()) == 2


def test_points_outside_are_brought_back_and_inside_left() -> None:
    b = ball(Norm.LINF, 0.1, limits=False)
    inside = b.centre + 0.05
    assert torch.equal(b.project(inside), inside)
    assert torch.allclose(b.project(b.centre + 5), b.centre + 0.1, atol=1e-7)


@pytest.mark.parametrize("radius", [-0.1, float("nan"), float("inf"), torch.zeros(3)])
def test_bad_radii(radius: Tensor | float) -> None:
    with pytest.raises(OptionError, match="a radius is"):
        ball(Norm.LINF, radius)


def test_l0_needs_limits_and_whole_numbers() -> None:
    with pytest.raises(OptionError, match="number of elements"):
        ball(Norm.L0, 1.5)
    with pytest.raises(OptionError, match="without limits"):
        ball(Norm.L0, 1.0, limits=False)


def test_rows_outside_the_limits_are_refused() -> None:
    with pytest.raises(InputError, match="outside the limits"):
        Ball.of(Norm.L2, torch.full((1, 2, 3), 1.1), 0.1, LIMITS)
