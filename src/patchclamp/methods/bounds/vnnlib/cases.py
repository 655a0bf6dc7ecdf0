"""From exact inequalities to boxes and rows of float64, every rounding outward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from patchclamp.core.errors import PropertyError
from patchclamp.methods.bounds.property import Case, Numbers, Property
from patchclamp.methods.bounds.vnnlib.grammar import (
    TOO_LONG,
    Query,
    is_too_long,
)
from patchclamp.methods.bounds.vnnlib.linear import Conjunction, Inequality

MAX_NUMBERS = 1 << 27
"""Numbers in the boxes and rows of all cases: 1 GiB of float64."""


def build(query: Query) -> Property:
    """The property that a query states.

    Raises: PropertyError if an input has no bounds, if no input is left in any case, or if
        there are more cases or numbers than the memory should be asked for.
    """
    common: Conjunction = []
    factors = []
    for factor in query.factors:
        if len(factor) == 1:
            common += factor[0]
        else:
            factors.append(factor)
    if is_too_long(factors):
        raise query.tokens.failure(TOO_LONG, hint="divide the property into several files")
    base = _Box.of(query, common)
    outputs = [part for part in common if not part.inputs]
    maker = _Maker(query, base, outputs)
    cases = [
        case
        for choice in itertools.product(*factors)
        if (case := maker.case(list(itertools.chain.from_iterable(choice)))) is not None
    ]
    if not cases and base.clash is not None:
        raise base.empty(query, base.clash)
    if not cases:
        raise query.tokens.failure("no input is left: every alternative contradicts itself")
    return Property(cases=tuple(cases), num_inputs=query.num_inputs, num_outputs=query.num_outputs)


@dataclass
class _Bounds:
    """Exact bounds of some inputs, each with the token that it comes from."""

    lower: dict[int, tuple[Fraction, int]] = field(default_factory=dict)
    upper: dict[int, tuple[Fraction, int]] = field(default_factory=dict)

    def add(self, inequality: Inequality) -> None:
        """Take in an inequality on one input."""
        ((index, weight),) = inequality.terms
        bound = inequality.constant
        if weight != -1:  # `>=` a number, half of a big file, needs no arithmetic
            bound = -bound if weight == 1 else -bound / weight
        if weight > 0:
            known = self.upper.get(index)
            if known is None or bound < known[0]:
                self.upper[index] = (bound, inequality.at)
        else:
            known = self.lower.get(index)
            if known is None or bound > known[0]:
                self.lower[index] = (bound, inequality.at)


@dataclass
class _Box:
    """What all cases share: bounds, as fractions and as float64; inequalities on inputs.

    Attributes:
        clash: an input whose bounds contradict each other.
    """

    bounds: _Bounds
    lower: Numbers
    upper: Numbers
    rows: list[Inequality]
    clash: int | None

    @classmethod
    def of(cls, query: Query, common: Conjunction) -> _Box:
        bounds, rows = _sorted_out(part for part in common if part.inputs)
        lower = np.full(query.num_inputs, -math.inf)
        upper = np.full(query.num_inputs, math.inf)
        _put(query, bounds, lower, upper)
        clash = next(_clashes(bounds.lower, bounds.upper), None)
        return cls(bounds, lower, upper, rows, clash)

    def empty(self, query: Query, index: int) -> PropertyError:
        """The error for bounds of an input that contradict each other."""
        lower, upper = self.bounds.lower[index], self.bounds.upper[index]
        places = sorted((lower[1], upper[1]))
        line, column = query.tokens.place(places[0])
        return query.tokens.error(
            places[1],
            f"no input is left: {query.input_name(index)} >= {rounded_down(lower[0])} and "
            f"<= {rounded_down(upper[0])}",
            hint=f"the other bound is at line {line}, column {column}",
        )


class _Maker:
    """Makes the cases; those that add no bounds share one box in memory."""

    def __init__(self, query: Query, base: _Box, outputs: list[Inequality]) -> None:
        self._query, self._base, self._outputs = query, base, outputs
        self._numbers = 0
        self._no_rows = (np.zeros((0, query.num_inputs)), np.zeros(0))

    def case(self, parts: Conjunction) -> Case | None:
        """One disjunct together with what holds in all; None if no input meets its bounds."""
        base, query = self._base, self._query
        own, rows = _sorted_out(part for part in parts if part.inputs)
        if base.clash is not None or _contradicts(own, base.bounds):
            return None
        lower, upper = base.lower, base.upper
        if own.lower or own.upper:
            lower, upper = lower.copy(), upper.copy()
            _put(query, own, lower, upper)
        elif self._numbers:
            self._numbers -= 2 * query.num_inputs
        outputs = self._outputs + [part for part in parts if not part.inputs]
        input_rows = base.rows + rows
        self._numbers += 2 * query.num_inputs + len(outputs) * query.num_outputs
        self._numbers += len(input_rows) * query.num_inputs
        if self._numbers > MAX_NUMBERS:
            raise query.tokens.failure(
                f"the cases of the property have more than {MAX_NUMBERS:,} numbers",
                hint="divide the property into several files",
            )
        self._require_bounds(lower, upper)
        inputs = (
            _rows(query, input_rows, query.num_inputs, (lower, upper))
            if input_rows
            else self._no_rows
        )
        offsets = _rows(query, outputs, query.num_outputs, None)
        return Case(
            lower=lower,
            upper=upper,
            rows=offsets[0],
            offsets=offsets[1],
            input_rows=inputs[0],
            input_offsets=inputs[1],
        )

    def _require_bounds(self, lower: Numbers, upper: Numbers) -> None:
        for side, bounds in (("lower", lower), ("upper", upper)):
            missing = np.flatnonzero(np.isinf(bounds))
            if len(missing):
                name = self._query.input_name(int(missing[0]))
                raise self._query.tokens.failure(
                    f"{name} has no {side} bound in some case: a box of inputs must be finite",
                    hint=f"{len(missing)} of {len(bounds)} inputs have none",
                )


def _sorted_out(parts: Iterable[Inequality]) -> tuple[_Bounds, list[Inequality]]:
    """Bounds of single inputs, and inequalities on several."""
    bounds, rows = _Bounds(), []
    for part in parts:
        if len(part.terms) == 1:
            bounds.add(part)
        else:
            rows.append(part)
    return bounds, rows


def _clashes(
    lower: Mapping[int, tuple[Fraction, int]], upper: Mapping[int, tuple[Fraction, int]]
) -> Iterator[int]:
    """Inputs with a lower bound above their upper bound, exactly."""
    return (i for i, (bound, _) in lower.items() if i in upper and bound > upper[i][0])


def _contradicts(own: _Bounds, base: _Bounds) -> bool:
    pairs = ((own.lower, own.upper), (own.lower, base.upper), (base.lower, own.upper))
    for lower, upper in pairs:
        # Walk the side that is this disjunct's own: the base may have thousands.
        if lower is base.lower:
            if any(i in lower and lower[i][0] > bound for i, (bound, _) in upper.items()):
                return True
        elif next(_clashes(lower, upper), None) is not None:
            return True
    return False


def _put(query: Query, bounds: _Bounds, lower: Numbers, upper: Numbers) -> None:
    """Tighten a box in place by bounds, rounded outward."""
    for index, (bound, at) in bounds.lower.items():
        lower[index] = max(lower[index], _finite(query, rounded_down(bound), at))
    for index, (bound, at) in bounds.upper.items():
        upper[index] = min(upper[index], _finite(query, -rounded_down(-bound), at))


def _finite(query: Query, value: float, at: int) -> float:
    if math.isinf(value):
        raise query.tokens.error(at, "a bound that float64 cannot hold")
    return value


def rounded_down(value: Fraction) -> float:
    """The largest float64 that is not above; -inf below them all."""
    try:
        nearest = value.numerator / value.denominator  # Python rounds this correctly
    except OverflowError:
        return -math.inf if value < 0 else np.finfo(np.float64).max.item()
    above, below = nearest.as_integer_ratio()
    if above * value.denominator > value.numerator * below:
        return math.nextafter(nearest, -math.inf)
    return nearest


def _rows(
    query: Query,
    parts: list[Inequality],
    num: int,
    box: tuple[Numbers, Numbers] | None,
) -> tuple[Numbers, Numbers]:
    """Rows and offsets that hold wherever the inequalities do (in the box, if there is one).

    An inequality is first multiplied by a positive number that makes its weights exact in
    float64. Where there is none, the rounding of the weights moves the offset by as much as
    it can come to in the box; without a box that is not known and the inequality refused.
    """
    rows, offsets = np.zeros((len(parts), num)), np.zeros(len(parts))
    for number, part in enumerate(parts):
        factor = _exact_factor(part)
        constant = part.constant * factor
        for index, weight in part.terms:
            exact = weight * factor
            rows[number, index] = held = _nearest(query, exact, part.at)
            error = abs(Fraction(held) - exact)
            if error and box is None:
                raise query.tokens.error(
                    part.at,
                    "the weights of an inequality on outputs have no common scale at which "
                    "float64 holds them exactly",
                    got=str(float(weight)),
                    hint="write them with at most 15 digits",
                )
            if error and box is not None:
                constant -= error * max(abs(Fraction(side[index].item())) for side in box)
        offsets[number] = _finite(query, rounded_down(constant), part.at)
    return rows, offsets


def _nearest(query: Query, value: Fraction, at: int) -> float:
    try:
        return value.numerator / value.denominator
    except OverflowError:
        raise query.tokens.error(at, "a weight that float64 cannot hold") from None


def _exact_factor(part: Inequality) -> Fraction:
    """A positive number near 1 that makes all weights float64 numbers, if there is one."""
    if len(part.terms) == 1:
        return 1 / abs(part.terms[0][1])
    weights = [weight for _, weight in part.terms]
    common = math.lcm(*(weight.denominator for weight in weights))
    if common & (common - 1) == 0:
        return Fraction(1)  # powers of two divide exactly
    shared = math.gcd(*(weight.numerator * (common // weight.denominator) for weight in weights))
    factor = Fraction(common, shared)
    power = factor.numerator.bit_length() - factor.denominator.bit_length()
    return factor / Fraction(2) ** power
