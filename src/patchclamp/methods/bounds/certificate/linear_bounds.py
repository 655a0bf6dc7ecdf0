"""Sound float64 bounds of all steps of a network over boxes, many boxes side by side.

Shapes (legend for this file)
    B   boxes
    R   rows: linear functions of a step that are bounded from below
    n   elements of a step

Every step has an interval, found in order: by interval arithmetic, and for arguments of
elementwise operators whose interval decides something also by backward linear relaxation
(CROWN). A row a . y of a step y is carried backwards until it is a row of the input. Where
the row is rounded on the way, say from a @ M to fl(a @ M), the row that is carried on is
the rounded one, taken as exact; the difference, times the largest the step's argument can
be, comes off the row's constant. All of these are a multiple of |a| that does not depend on
a: one vector of `noise` for each step and box.

Source: Zhang et al. 2018 (CROWN); Higham 2002, chapter 3, for the rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from patchclamp.methods.bounds.certificate.network import (
    Affine,
    Elementwise,
    Function,
    Input,
    Network,
)
from patchclamp.methods.bounds.certificate.relaxations import Lines, interval, lines
from patchclamp.methods.bounds.certificate.rounding import (
    LARGEST,
    SLACK,
    UNDERFLOW,
    Numbers,
    down,
    gamma,
    up,
)

TINY = 1e-300
"""Added to each noise, so that an underflow in its computation cannot make it too small."""

MOST_COEFFICIENTS = 4_000_000
"""Coefficients of the rows carried at once; bounds memory."""

RECTIFIERS = (Function.RELU, Function.LEAKY_RELU)


@dataclass(kw_only=True, eq=False)
class Bounds:
    """What is known of each step, on B boxes.

    Attributes:
        lower, upper, magnitude: of each step, (B, n); magnitude is the larger of |lower|, |upper|.
        noise: of each step, (B, n): what a row loses per unit of |a| when carried over the step.
        lines: of each elementwise step.
        empty: (B,) boxes that hold no input: an interval that is proved to be empty.
        unbounded: (B,) boxes with a value beyond `LARGEST`, about which nothing is said.
    """

    network: Network
    empty: NDArray[np.bool_]
    unbounded: NDArray[np.bool_]
    lower: list[Numbers] = field(default_factory=list)
    upper: list[Numbers] = field(default_factory=list)
    magnitude: list[Numbers] = field(default_factory=list)
    noise: list[Numbers] = field(default_factory=list)
    lines: dict[int, Lines] = field(default_factory=dict)

    @property
    def num_boxes(self) -> int:
        return len(self.empty)

    def append(self, lower: Numbers, upper: Numbers, noise: Numbers) -> None:
        """The next step, once its interval is final."""
        self.lower.append(lower)
        self.upper.append(upper)
        self.magnitude.append(np.maximum(np.abs(lower), np.abs(upper)))
        self.noise.append(noise)

    def settled(self, lower: Numbers, upper: Numbers) -> tuple[Numbers, Numbers]:
        """The interval, with boxes that are empty or unbounded noted and given some interval.

        Bounds are rounded outwards, so that lower > upper proves that no input has such a value.
        """
        bounded = (lower >= -LARGEST) & (upper <= LARGEST)
        self.unbounded |= ~bounded.all(axis=1)
        crossed = bounded & (lower > upper)
        self.empty |= crossed.any(axis=1)
        usable = bounded & ~crossed
        return np.where(usable, lower, 0.0), np.where(usable, upper, 0.0)


Slopes = Mapping[int, Numbers]
"""Lower slopes of rectifiers, by step: (B or 1, R, n)."""


def affine_interval(bounds: Bounds, step: Affine) -> tuple[Numbers, Numbers, Numbers]:
    """Lower and upper bounds by interval arithmetic, and the step's noise; each (B, n).

    With x = c + d, |d| <= r: M x + b lies within |M| r of M c + b. The products are off by
    gamma(length) relative to |M| |c| + |b|; the same number bounds what a row a loses, since
    |a| gamma (|M| |x| + |b|) covers fl(a @ M) and fl(a . b).
    """
    relative = gamma(step.length)
    noise = step.bias_error + relative * np.abs(step.bias)
    centre: Numbers = np.broadcast_to(step.bias, (bounds.num_boxes, step.size))
    spread = np.zeros(())
    for term in step.terms:
        lower, upper = bounds.lower[term.source], bounds.upper[term.source]
        middle = 0.5 * (lower + upper)
        radius = up(np.maximum(upper - middle, middle - lower))
        centre = centre + term.after(middle)
        spread = spread + term.absolute_after(radius)
        size = term.absolute_after(bounds.magnitude[term.source])
        noise = noise + (relative + 2.0 * term.relative) * size
    noise = np.broadcast_to(noise * SLACK + TINY, centre.shape)
    spread = up(up(spread * (1.0 + 2.0 * relative)) + noise)
    return down(centre - spread), up(centre + spread), noise


def elementwise_noise(bounds: Bounds, step: Elementwise, found: Lines) -> Numbers:
    """(B, n) what a row a loses per unit of |a|: its product with a slope is rounded once,
    its product with the intercepts is a sum of n numbers. Slopes given as hints are at most 1."""
    slope = np.maximum(np.maximum(np.abs(found.lower_slope), np.abs(found.upper_slope)), 1.0)
    size = np.maximum(np.abs(found.lower_intercept), np.abs(found.upper_intercept))
    noise = 2.0**-52 * slope * bounds.magnitude[step.source] + gamma(2 * step.size) * size
    return np.asarray(noise * SLACK + TINY, np.float64)


class Rows:
    """Rows carried backwards: coefficients (B, R, n) on some steps, and a constant (B, R).

    At any moment, constant + the sum of coefficients . values is a lower bound of the rows
    that were given.
    """

    def __init__(self, bounds: Bounds, constant: Numbers, slopes: Slopes | None = None) -> None:
        self.bounds = bounds
        self.constant = constant
        self.slopes = slopes or {}
        self.pending: dict[int, Numbers] = {}

    def add(self, step: int, coefficients: Numbers) -> None:
        """More coefficients on a step; a sum is rounded once. The array becomes the rows' own."""
        if step in self.pending:
            coefficients = self.pending[step] + coefficients
            noise = 2.0**-52 * SLACK * self.bounds.magnitude[step] + TINY
            self.lose(np.abs(coefficients), noise)
        self.pending[step] = coefficients

    def lose(self, size: Numbers, noise: Numbers) -> None:
        """constant - size . noise; the noise has room for this product's own rounding."""
        self.constant = down(self.constant - _dot(size, noise))

    def lowest(self) -> Numbers:
        """Lower bounds of the rows, (B, R); -inf where there is none."""
        for i in range(max(self.pending), -1, -1):
            coefficients = self.pending.pop(i, None)
            if coefficients is None:
                continue
            step = self.bounds.network.steps[i]
            if isinstance(step, Affine):
                self._over_affine(i, step, coefficients)
            elif isinstance(step, Elementwise):
                self._over_elementwise(i, step, coefficients)
            else:
                self._at_input(step, coefficients)
        result = self.constant - UNDERFLOW
        sound = np.isfinite(result) & ~self.bounds.unbounded[:, None]
        return np.where(sound, down(result), -np.inf)

    def _over_affine(self, i: int, step: Affine, a: Numbers) -> None:
        self.constant = down(self.constant + a @ step.bias)
        carried = [term.before(a) for term in step.terms]
        self.lose(np.abs(a, out=a), self.bounds.noise[i])
        for term, coefficients in zip(step.terms, carried, strict=True):
            self.add(term.source, coefficients)

    def _over_elementwise(self, i: int, step: Elementwise, a: Numbers) -> None:
        found, noise = self.bounds.lines[i], self.bounds.noise[i]
        positive, negative = np.maximum(a, 0.0), np.minimum(a, 0.0, out=a)
        below = found.lower_slope[:, None, :]
        if i in self.slopes and step.function in RECTIFIERS:
            lower, upper = self.bounds.lower[step.source], self.bounds.upper[step.source]
            crossing = ((lower < 0) & (upper > 0))[:, None, :]
            below = np.where(crossing, np.clip(self.slopes[i], step.slope, 1.0), below)
        self._take(
            positive,
            negative,
            down(found.lower_intercept - noise),
            up(found.upper_intercept + noise),
        )
        positive *= below
        negative *= found.upper_slope[:, None, :]
        positive += negative  # one of the two is 0
        self.add(step.source, positive)

    def _at_input(self, step: Input, a: Numbers) -> None:
        lower, upper = self.bounds.lower[0], self.bounds.upper[0]
        noise = gamma(2 * step.size) * SLACK * self.bounds.magnitude[0] + TINY
        positive = np.maximum(a, 0.0)
        self._take(positive, a - positive, down(lower - noise), up(upper + noise))

    def _take(self, positive: Numbers, negative: Numbers, low: Numbers, high: Numbers) -> None:
        """constant + positive . low + negative . high; low and high have room for the rounding."""
        self.constant = down(self.constant + _dot(positive, low))
        self.constant = down(self.constant + _dot(negative, high))


def _dot(a: Numbers, b: Numbers) -> Numbers:
    """(B, R, n) . (B, n) -> (B, R)."""
    return np.asarray(np.matmul(a, b[:, :, None])[:, :, 0], np.float64)


def refined(
    bounds: Bounds,
    number: int,
    lower: Numbers,
    upper: Numbers,
    noise: Numbers,
    wanted: NDArray[np.bool_],
    hints: Mapping[int, Numbers],
) -> tuple[Numbers, Numbers]:
    """The interval of the next affine step, where wanted cut by backward linear bounds.

    Args:
        number: of the affine step, whose sources are already in `bounds`.
        wanted: (B, n) elements; where boxes want different numbers some
            more are computed, and thrown away.
        hints: by elementwise step, (2, n of this step, n of that): lower slopes for the lower
            and the upper bounds.
    """
    step = bounds.network.steps[number]
    most = int(wanted.sum(axis=1).max(initial=0))
    if most == 0 or not isinstance(step, Affine):
        return lower, upper
    chosen = np.argsort(~wanted, axis=1, kind="stable")[:, :most]
    widest = max(other.size for other in bounds.network.steps[: number + 1])
    chunk = max(1, MOST_COEFFICIENTS // (2 * bounds.num_boxes * widest))
    lower, upper = lower.copy(), upper.copy()
    for start in range(0, most, chunk):
        index = chosen[:, start : start + chunk]
        bias, loss = step.bias[index], np.take_along_axis(noise, index, axis=1)
        constant = np.concatenate([down(bias - loss), down(-bias - loss)], axis=1)
        slopes = {
            i: np.concatenate([hint[0][index[0]], hint[1][index[0]]])[None]
            for i, hint in hints.items()
        }
        rows = Rows(bounds, constant, slopes)
        for term in step.terms:
            entries = term.rows(index)
            rows.add(term.source, np.concatenate([entries, -entries], axis=1))
        found = rows.lowest()
        low, high = found[:, : index.shape[1]], -found[:, index.shape[1] :]
        for values, better, best in ((lower, low, np.maximum), (upper, high, np.minimum)):
            known = np.take_along_axis(values, index, axis=1)
            # what a box did not ask for stays as it was: its bounds do not depend on others
            asked = np.take_along_axis(wanted, index, axis=1)
            np.put_along_axis(values, index, np.where(asked, best(known, better), known), axis=1)
    return lower, upper


def decides(step: Elementwise, lower: Numbers, upper: Numbers) -> NDArray[np.bool_]:
    """(B, n) arguments whose interval makes a difference to the step's lines."""
    if step.function in RECTIFIERS:
        return np.asarray((lower < 0) & (upper > 0))
    return np.asarray(upper > lower)


def elementwise_interval(
    bounds: Bounds, number: int, step: Elementwise
) -> tuple[Numbers, Numbers, Numbers]:
    """Lower and upper bounds of an elementwise step and its noise, (B, n); keeps its lines."""
    lower, upper = bounds.lower[step.source], bounds.upper[step.source]
    bounds.lines[number] = lines(step, lower, upper)
    noise = elementwise_noise(bounds, step, bounds.lines[number])
    return *interval(step, lower, upper), noise
