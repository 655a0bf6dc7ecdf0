"""Functions of one argument: accuracy that the allowance rests on, refusals, closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch

from patchclamp.core.errors import BoundError, OptionError
from patchclamp.rules.base import Interval, Lines, Nonlinear
from patchclamp.rules.convex import (
    ELU,
    EvenPower,
    Exp,
    Log,
    OddPower,
    Reciprocal,
    Rsqrt,
    Softplus,
    Sqrt,
    Square,
    power,
)
from patchclamp.rules.domain import ULPS
from patchclamp.rules.gelu import Gelu, GeluTanh, HardSwish, Mish, SiLU
from patchclamp.rules.leaky import Clamp, LeakyReLU
from patchclamp.rules.products import Mul
from patchclamp.rules.s_shaped import Atan, Erf, Sigmoid, Tanh
from patchclamp.rules.sine import Cos, Sin
from patchclamp.rules.smooth import Smooth, Unary

EXACT: list[tuple[Unary, Callable[[mpmath.mpf], mpmath.mpf]]] = [
    (Sigmoid(()), lambda x: 1 / (1 + mpmath.exp(-x))),
    (Tanh(()), mpmath.tanh),
    (Atan(()), mpmath.atan),
    (Erf(()), mpmath.erf),
    (Gelu(()), lambda x: x * mpmath.ncdf(x)),
    (SiLU(()), lambda x: x / (1 + mpmath.exp(-x))),
    (Mish(()), lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x)))),
    (
        GeluTanh(()),
        lambda x: x * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + x**3 * 0.044715))) / 2,
    ),
    (Sin(()), mpmath.sin),
    (Cos(()), mpmath.cos),
    (Exp(()), mpmath.exp),
    (Softplus(()), lambda x: mpmath.log1p(mpmath.exp(x))),
]


@pytest.mark.parametrize(("rule", "function"), EXACT, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_are_within_a_few_eps(
    rule: Unary, function: Callable[[mpmath.mpf], mpmath.mpf], dtype: torch.dtype
) -> None:
    """The allowance for rounding is several times what torch's functions are off by."""
    info = torch.finfo(dtype)
    x = torch.cat((torch.randn(40) * 3, torch.randn(20) * 0.1, torch.randn(10) * 12)).to(dtype)
    allowed = ULPS / 2 * info.eps
    with mpmath.workdps(40):
        for point, value in zip(x.tolist(), rule.value(x).tolist(), strict=True):
            true = function(mpmath.mpf(point))
            size = abs(true) + getattr(rule, "size", 0.0)
            assert abs(true - value) <= allowed * size + info.tiny


@pytest.mark.parametrize(("rule", "function"), EXACT[:8], ids=lambda r: type(r).__name__)
def test_lines_hold_in_forty_digits(
    rule: Smooth, function: Callable[[mpmath.mpf], mpmath.mpf]
) -> None:
    """In float64, against arithmetic that loses nothing."""
    lower = torch.randn(12, dtype=torch.float64) * 2
    upper = lower + torch.exp(torch.randn(12, dtype=torch.float64) * 3 - 2)
    lines = rule.relax((Interval(lower, upper),))
    assert lines.below is not None
    with mpmath.workdps(40):
        for i in range(12):
            a, b = mpmath.mpf(float(lower[i])), mpmath.mpf(float(upper[i]))
            low, low_at = float(lines.below_slope[i]), float(lines.below[i])
            high, high_at = float(lines.above_slope[i]), float(lines.above[i])
            for k in range(17):
                x = a + (b - a) * k / 16
                y = function(x)
                assert low * x + low_at <= y <= high * x + high_at


def test_inflections_and_minima_are_where_the_classes_say() -> None:
    """From second and first differences of the exact functions."""
    with mpmath.workdps(40):
        for rule, function in EXACT[4:8]:
            assert isinstance(rule, Smooth)
            (piece,) = rule.convex
            for place in piece:
                before, after = (
                    mpmath.diff(function, mpmath.mpf(place) + step, 2) for step in (-1e-9, 1e-9)
                )
                assert before * after < 0
            assert rule.turning is not None
            assert abs(mpmath.diff(function, mpmath.mpf(rule.turning))) < 1e-14
            steepest = [mpmath.diff(function, mpmath.mpf(place)) for place in piece]
            assert rule.steepest[0] <= steepest[0]
            assert steepest[1] <= rule.steepest[1]


def test_a_straddling_sigmoid_touches_at_the_end_and_at_the_tangent_point() -> None:
    """The published construction: from (u, f(u)) down to where the line is a tangent."""
    lower, upper = (torch.tensor([x], dtype=torch.float64) for x in (-3.0, 4.0))
    lines = Sigmoid((1,)).relax((Interval(lower[None], upper[None]),))
    low, high = -3.0, 0.0
    for _ in range(80):
        p = (low + high) / 2
        slope = float(torch.sigmoid(torch.tensor(p)) * torch.sigmoid(torch.tensor(-p)))
        at_end = 1 / (1 + math.exp(-p)) + slope * (4 - p)
        low, high = (low, p) if at_end > 1 / (1 + math.exp(-4)) else (p, high)
    assert float(lines.below_slope) == pytest.approx(
        math.exp(-low) / (1 + math.exp(-low)) ** 2, rel=1e-3
    )
    assert lines.below is not None
    assert float(lines.below_slope * 4 + lines.below) == pytest.approx(
        1 / (1 + math.exp(-4)), abs=1e-5
    )


def test_lines_of_a_point_meet_the_value() -> None:
    x = torch.linspace(-5, 5, 21, dtype=torch.float64)[:, None]
    for rule in (Sigmoid((1,)), Tanh((1,)), Gelu((1,)), Sin((1,)), Exp((1,)), LeakyReLU((1,))):
        lines = rule.relax((Interval(x, x),))
        assert isinstance(lines, Lines)
        assert lines.below is not None
        below = (lines.below_slope * x[:, None] + lines.below)[:, 0]
        above = (lines.above_slope * x[:, None] + lines.above)[:, 0]
        y = rule.forward(x)
        assert bool((below <= y).all())
        assert bool((y <= above).all())
        assert bool((above - below < 1e-12 * (1 + y.abs() * 10)).all())


def test_a_square_knows_more_than_a_product_of_a_value_with_itself() -> None:
    box = Interval(torch.tensor([[-1.0]]), torch.tensor([[1.0]]))
    assert float(Square((1,)).interval(box).lower) == 0
    assert float(Mul((1,)).interval(box, box).lower) < -0.9


@pytest.mark.parametrize(
    ("rule", "ends"),
    [
        (Log((2,)), (0.0, 1.0)),
        (Log((2,)), (-1.0, 1.0)),
        (Sqrt((2,)), (-0.1, 1.0)),
        (Rsqrt((2,)), (0.0, 1.0)),
        (Reciprocal((2,)), (-1.0, 1.0)),
        (Reciprocal((2,)), (0.0, 1.0)),
        (power((2,), -2), (-1.0, 1.0)),
        (Exp((2,)), (0.0, 1000.0)),
        (Square((2,)), (0.0, 1e30)),
        (Log((2,)), (math.nan, 1.0)),
        (Sigmoid((2,)), (math.nan, 1.0)),
        (Tanh((2,)), (-math.inf, math.nan)),
        (LeakyReLU((2,)), (-math.inf, 1.0)),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Nonlinear) else str(x),
)
def test_intervals_outside_the_domain_are_refused(
    rule: Nonlinear, ends: tuple[float, float]
) -> None:
    """By the operator's name, with the box and element of the batch that is bad."""
    lower, upper = torch.full((3, 2), 0.5), torch.full((3, 2), 0.75)
    rule.relax((Interval(lower, upper),))
    lower[1, 1], upper[1, 1] = ends
    for ask in (
        lambda: rule.interval(Interval(lower, upper)),
        lambda: rule.relax((Interval(lower, upper),)),
    ):
        with pytest.raises(BoundError, match=r"of box 1 \(1 of 3 boxes") as raised:
            ask()
        assert type(rule).__name__ in str(raised.value)
        assert "element (1,)" in str(raised.value)


def test_powers_are_told_apart() -> None:
    assert isinstance(power((1,), 2), Square)
    assert isinstance(power((1,), -1), Reciprocal)
    assert isinstance(power((1,), 6), EvenPower)
    assert isinstance(power((1,), 7), OddPower)
    for exponent in (0, 1):
        with pytest.raises(OptionError, match="power"):
            power((1,), exponent)


def test_options_without_a_rule_are_refused() -> None:
    with pytest.raises(OptionError, match="ELU"):
        ELU((1,), alpha=2.0)
    with pytest.raises(OptionError, match="softplus"):
        Softplus((1,), beta=0.0)
    with pytest.raises(OptionError, match="clamp"):
        Clamp((1,), 2.0, 1.0)


def test_operators_agree_with_torch() -> None:
    x = torch.randn(50, 4, dtype=torch.float64) * 4
    functional = torch.nn.functional
    for rule, y in (
        (Gelu((4,)), functional.gelu(x)),
        (GeluTanh((4,)), functional.gelu(x, approximate="tanh")),
        (SiLU((4,)), functional.silu(x)),
        (Mish((4,)), functional.mish(x)),
        (HardSwish((4,)), functional.hardswish(x)),
        (ELU((4,)), functional.elu(x)),
        (ELU((4,), 0.5, 0.5), functional.celu(x, 0.5)),
        (Softplus((4,), 2.0, 4.0), functional.softplus(x, 2.0, 4.0)),
        (Clamp((4,), 0.0, 6.0), functional.relu6(x)),
        (LeakyReLU((4,), 0.2), functional.leaky_relu(x, 0.2)),
    ):
        torch.testing.assert_close(rule.forward(x), y)
