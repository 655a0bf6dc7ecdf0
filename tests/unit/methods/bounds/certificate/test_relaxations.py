"""Lines and values of elementwise functions, against points of the function computed exactly."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from patchclamp.methods.bounds.certificate.network import Elementwise, Function
from patchclamp.methods.bounds.certificate.relaxations import Lines, interval, lines
from patchclamp.methods.bounds.certificate.rounding import down, gamma, up

STEPS = [
    Elementwise(function=Function.RELU, source=0, size=1),
    Elementwise(function=Function.LEAKY_RELU, source=0, size=1, slope=float(np.float32(0.1))),
    Elementwise(function=Function.SIGMOID, source=0, size=1),
    Elementwise(function=Function.TANH, source=0, size=1),
]


def exact(step: Elementwise, x: float) -> Fraction:
    """The function at a float: exactly, or in 60 digits."""
    if step.function in (Function.RELU, Function.LEAKY_RELU):
        return Fraction(x) if x > 0 else Fraction(step.slope) * Fraction(x)
    with localcontext(prec=60):
        if step.function is Function.SIGMOID:
            return Fraction(1 / (1 + (-Decimal(x)).exp()))
        square = (2 * Decimal(x)).exp()
        return Fraction((square - 1) / (square + 1))


def intervals() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(0)
    centre = rng.normal(size=60) * 10.0 ** rng.integers(-6, 3, 60)
    radius = np.abs(rng.normal(size=60)) * 10.0 ** rng.integers(-12, 2, 60)
    special = [(0.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (-1e-320, 1e-320), (-50.0, 3.0), (-3.0, 50.0)]
    special += [(-800.0, 800.0), (2.0, 2.0), (-2.0, -2.0), (-1e90, 1e90), (1e-9, 1e-9)]
    lower = np.concatenate([centre - radius, [a for a, _ in special]])
    upper = np.concatenate([centre + radius, [b for _, b in special]])
    return lower, upper


@pytest.mark.parametrize("step", STEPS, ids=lambda s: str(s.function))
def test_lines_and_values_enclose_the_function(step: Elementwise) -> None:
    """At the ends, in between, and near where the lines touch."""
    lower, upper = intervals()
    found: Lines = lines(step, lower[None], upper[None])
    low, high = interval(step, lower[None], upper[None])
    for i, (a, b) in enumerate(zip(lower, upper, strict=True)):
        points = np.clip(np.linspace(a, b, 23), a, b)
        points = points[np.abs(points) < 1e4]
        parts = [Fraction(float(part[0, i])) for part in found]
        for x in points.tolist():
            y = exact(step, x)
            assert Fraction(float(low[0, i])) <= y <= Fraction(float(high[0, i]))
            assert parts[0] * Fraction(x) + parts[1] <= y
            assert parts[2] * Fraction(x) + parts[3] >= y


@pytest.mark.parametrize("step", STEPS, ids=lambda s: str(s.function))
def test_lines_are_tight(step: Elementwise) -> None:
    """On a narrow interval they leave almost nothing, on a wide one no more than the box."""
    lower, upper = np.array([[0.5, -1.0, -4.0, -0.5]]), np.array([[0.5, -0.999, 1.0, 5.0]])
    found = lines(step, lower, upper)
    ends = np.stack([lower, upper])
    gap = (
        found.upper_slope * ends
        + found.upper_intercept
        - found.lower_slope * ends
        - found.lower_intercept
    )
    low, high = interval(step, lower, upper)
    assert gap[:, 0, 0].max() < 1e-12
    assert gap[:, 0, 1].max() < 1e-6
    assert (gap.min(axis=0) <= high - low + 1e-9).all()
    middle = ends.mean(axis=0)
    inside = found.upper_slope * middle + found.upper_intercept - found.lower_slope * middle
    assert ((inside - found.lower_intercept) < 1.01 * (high - low) + 1e-12).all()


def test_upper_line_of_relu_touches_both_ends() -> None:
    found = lines(STEPS[0], np.array([[-1.0]]), np.array([[3.0]]))
    assert found.upper_slope[0, 0] == 0.75
    assert 0.75 <= found.upper_intercept[0, 0] < 0.75 + 1e-14
    assert found.lower_slope[0, 0] == 1.0  # 3 > 1: the steeper line leaves the smaller triangle


def test_a_line_without_outward_rounding_would_be_wrong() -> None:
    """The naive line of Relu lies below the function at some end, ours never does."""
    rng = np.random.default_rng(0)
    lower, upper = -np.abs(rng.normal(size=200)), np.abs(rng.normal(size=200))
    slope = upper / (upper - lower)
    naive, found = -slope * lower, lines(STEPS[0], lower[None], upper[None])
    wrong = 0
    for i in range(200):
        for x, y in ((lower[i], 0.0), (upper[i], upper[i])):
            point = Fraction(float(x)), Fraction(float(y))
            wrong += Fraction(slope[i]) * point[0] + Fraction(naive[i]) < point[1]
            ours = Fraction(float(found.upper_slope[0, i])) * point[0]
            assert ours + Fraction(float(found.upper_intercept[0, i])) >= point[1]
    assert wrong > 20


def test_rounding() -> None:
    x = np.array([1.0, -1.0, 0.0])
    assert (down(x) < x).all()
    assert (up(x) > x).all()
    n, unit = 1000, 2.0**-53
    assert gamma(n) > 2 * n * unit / (1 - n * unit)
