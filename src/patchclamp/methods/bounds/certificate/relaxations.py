"""Lines below and above an elementwise function on an interval, and its values there.

Each line holds over the reals, as a statement about the float64 slope and intercept that
are returned: the slope may be anything, and the intercept is moved until the line holds.

Shapes: arguments and results (B, n), B boxes of n elements.
Source: Zhang et al. 2018 (CROWN), for which lines to choose; the proofs are in the docstrings.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from patchclamp.methods.bounds.certificate.network import Elementwise, Function, apply
from patchclamp.methods.bounds.certificate.rounding import LIBRARY, Numbers, down, up

_HALVINGS = 24
"""Steps of the search for a tangent; its result need not be exact."""


class Lines(NamedTuple):
    """lower_slope * x + lower_intercept <= f(x) <= upper_slope * x + upper_intercept."""

    lower_slope: Numbers
    lower_intercept: Numbers
    upper_slope: Numbers
    upper_intercept: Numbers


def interval(step: Elementwise, lower: Numbers, upper: Numbers) -> tuple[Numbers, Numbers]:
    """Bounds of f on [lower, upper].

    All functions increase, so that the ends decide. A product is rounded once, which one
    float outwards covers; exp and tanh are moved by twice what the library may be off.
    """
    low, high = apply(step, lower), apply(step, upper)
    if step.function is Function.RELU:
        return low, high
    if step.function is Function.LEAKY_RELU:
        return np.where(lower < 0, down(low), low), np.where(upper < 0, up(high), high)
    floor = -1.0 if step.function is Function.TANH else 0.0
    low = low - 4.0 * LIBRARY * np.abs(low) - 1e-300
    high = high + 4.0 * LIBRARY * np.abs(high) + 1e-300
    return np.maximum(low, floor), np.minimum(high, 1.0)


def lines(step: Elementwise, lower: Numbers, upper: Numbers) -> Lines:
    """Lines below and above f on [lower, upper]."""
    if step.function in (Function.RELU, Function.LEAKY_RELU):
        return _rectifier(step.slope, lower, upper)
    centre = 0.0 if step.function is Function.TANH else 1.0
    slope, intercept = _above(step.function, lower, upper)
    # f(x) = centre - f(-x): a line above f on the mirrored interval is one below f here.
    lower_slope, mirrored = _above(step.function, -upper, -lower)
    return Lines(lower_slope, down(centre - mirrored), slope, intercept)


def _rectifier(slope: float, lower: Numbers, upper: Numbers) -> Lines:
    """max(slope * x, x) with slope in [0, 1].

    Below, any line through 0 with a slope from [slope, 1] holds, without rounding. Above,
    the function is convex, so that a line holds if it does at both ends: the intercept is
    the larger of f(end) - s * end, each operation rounded upwards.
    """
    positive, negative = lower >= 0, upper <= 0
    crossing = ~(positive | negative)
    low, high = np.where(crossing, lower, -1.0), np.where(crossing, upper, 1.0)
    value = slope * low
    chord = (high - value) / (high - low)
    at_low = up((up(value) if slope else value) - down(chord * low))
    at_high = up(high - down(chord * high))
    intercept = np.where(crossing, np.maximum(at_low, at_high), 0.0)
    stable = np.where(positive, 1.0, slope)
    below = np.where(upper > -lower, 1.0, slope)
    return Lines(
        np.where(crossing, below, stable),
        np.zeros_like(lower),
        np.where(crossing, chord, stable),
        intercept,
    )


def _derivative(function: Function, value: Numbers) -> Numbers:
    """f' from f."""
    if function is Function.TANH:
        return np.asarray((1.0 - value) * (1.0 + value), np.float64)
    return np.asarray(value * (1.0 - value), np.float64)


def _above(function: Function, lower: Numbers, upper: Numbers) -> tuple[Numbers, Numbers]:
    """A line above an S-shaped f (convex below 0, concave above) on [lower, upper].

    For any slope k let g(x) = f(x) - k x. Below 0, g is convex, so that it is largest at an
    end; above 0, g is concave, so that it lies below its own tangent at any point p, which
    is largest at an end as well. The intercept is the largest of these four numbers, plus
    more than the errors of f and f' (at most 2 LIBRARY, both being at most 1) and of the
    rounding of a dozen operations on numbers of size 1, |k x| and |f'(p)| |x - p|.
    """
    step = Elementwise(function=function, source=0, size=lower.shape[-1])

    def value(x: Numbers) -> Numbers:
        return apply(step, x)

    slope, touch = _choose(function, lower, upper)
    start = np.maximum(lower, 0.0)
    point = np.clip(touch, start, np.maximum(upper, start))
    at_low, at_end = value(lower) - slope * lower, value(np.minimum(upper, 0.0))
    at_end = at_end - slope * np.minimum(upper, 0.0)
    f = value(point)
    own = _derivative(function, f) - slope
    base = f - slope * point
    tangent = base + np.maximum(own * (start - point), own * (upper - point))
    convex = np.where(lower < 0, np.maximum(at_low, at_end), -np.inf)
    concave = np.where(upper > 0, tangent, -np.inf)
    # Neither side when the interval is the point 0 alone.
    best = np.where((lower < 0) | (upper > 0), np.maximum(convex, concave), at_end)
    size = 1.0 + (1.0 + np.abs(slope)) * (np.maximum(np.abs(lower), np.abs(upper)))
    return slope, up(best + 16.0 * LIBRARY * size)


def _choose(function: Function, lower: Numbers, upper: Numbers) -> tuple[Numbers, Numbers]:
    """A slope for the line above, and the point above 0 where it touches. Any answer is sound."""
    step = Elementwise(function=function, source=0, size=lower.shape[-1])
    low, high = apply(step, lower), apply(step, upper)
    width = upper - lower
    wide = width > 1e-6
    at_upper = _derivative(function, high)
    chord = np.where(wide, (high - low) / np.where(wide, width, 1.0), at_upper)
    middle = np.maximum(0.5 * (lower + upper), 0.0)
    # Tangent through (lower, f(lower)): too steep at `near`, shallow enough at `far`.
    near, far = np.zeros_like(lower), np.maximum(upper, 0.0)
    for _ in range(_HALVINGS):
        point = 0.5 * (near + far)
        f = apply(step, point)
        holds = _derivative(function, f) * (lower - point) + f >= low
        near, far = np.where(holds, near, point), np.where(holds, point, far)
    use_chord = (upper <= 0) | ((lower < 0) & (at_upper >= chord))
    # Of all lines above, the one with the smallest area touches at the middle if it may.
    touch = np.where(lower >= 0, middle, np.maximum(far, middle))
    tangent = _derivative(function, apply(step, touch))
    return np.where(use_chord, chord, tangent), np.where(use_chord, np.maximum(upper, 0.0), touch)
