"""A small language of functions from sequences to sequences, and what they mean.

A program is an expression. `tokens` and `indices` are given; `Map` and `Zip` change
values place by place; a selector says, for every place (the query), which places (the
keys) it looks at, and `Aggregate` takes the mean over them. That is the language of
RASP, in the typed form that makes it compile exactly:

- a *categorical* expression has one of finitely many values at every place, or None
  where a selector selected nothing. All the values that are aggregated at one place
  must be alike;
- a *numerical* expression has a number at every place, 0 where nothing was selected.
  Numbers are fractions, so that the meaning of a program is exact.

Two things go beyond RASP: a selector may ask for several conditions at once, and it may
keep only the latest or the earliest of the places that meet them.

`evaluate` is the meaning; `compiler` builds a network that has the same. Every sequence
begins with a place that belongs to the machine (BOS): programs do not see it, and
indices count from the first place after it.

Sources: Weiss et al. 2021 (RASP); Lindner et al. 2023 (compiling it).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import TypeAlias

from patchclamp.core.errors import OptionError

Value: TypeAlias = Hashable
"""A category, a `Fraction` for a number, or None for no value."""


class Predicate(StrEnum):
    """What a key has to be to the query."""

    EQ = "=="
    NE = "!="
    LT = "<"
    LE = "<="
    GT = ">"
    GE = ">="

    def holds(self, key: Value, query: Value) -> bool:
        """Whether `key <predicate> query`; never for None.

        Raises:
            OptionError: values without an order are compared.
        """
        if key is None or query is None:
            return False
        if self is Predicate.EQ:
            return key == query
        if self is Predicate.NE:
            return key != query
        try:
            less = bool(key < query)  # type: ignore[operator]  # checked by Python right here
        except TypeError:
            raise OptionError(f"{key!r} and {query!r} have no order", got=str(self)) from None
        return {
            Predicate.LT: less,
            Predicate.LE: less or key == query,
            Predicate.GT: not less and key != query,
            Predicate.GE: not less,
        }[self]


class Prefer(StrEnum):
    """Which of the selected places is kept."""

    ALL = "all"
    LATEST = "latest"
    EARLIEST = "earliest"


@dataclass(frozen=True, eq=False)
class Expression:
    """A value at every place. Two expressions are the same only if they are one object."""

    @property
    def numerical(self) -> bool:
        """Numbers, rather than categories."""
        return False

    def inputs(self) -> tuple[Expression, ...]:
        """What it is computed from."""
        return ()


@dataclass(frozen=True, eq=False)
class Tokens(Expression):
    """The input."""


@dataclass(frozen=True, eq=False)
class Indices(Expression):
    """0, 1, 2, ... from the first place that programs see."""


tokens = Tokens()
indices = Indices()


@dataclass(frozen=True, eq=False)
class Constant(Expression):
    """The same category at every place. Only selectors can ask for it, as their query."""

    value: Value


@dataclass(frozen=True, eq=False)
class Map(Expression):
    """`function` of one value, place by place.

    Attributes:
        to_number: the result is a number.
        default: what a place without a value gets; None leaves it without.
    """

    source: Expression
    function: Callable[..., Value]
    to_number: bool = False
    default: Value = None

    @property
    def numerical(self) -> bool:
        return self.to_number

    def inputs(self) -> tuple[Expression, ...]:
        return (self.source,)

    def apply(self, value: Value) -> Value:
        """The result at a place; a number as a `Fraction`."""
        if value is None:
            result = self.default
        else:
            result = self.function(value)
        return _number(result) if self.to_number else result


@dataclass(frozen=True, eq=False)
class Zip(Expression):
    """`function` of two categories, place by place; None where either is missing."""

    first: Expression
    second: Expression
    function: Callable[..., Value]
    to_number: bool = False

    @property
    def numerical(self) -> bool:
        return self.to_number

    def inputs(self) -> tuple[Expression, ...]:
        return (self.first, self.second)

    def apply(self, first: Value, second: Value) -> Value:
        """The result at a place; a number as a `Fraction`."""
        missing = first is None or second is None
        result = None if missing else self.function(first, second)
        return _number(result) if self.to_number else result


@dataclass(frozen=True, eq=False)
class Linear(Expression):
    """`weights[0] * first + weights[1] * second` of two numbers, place by place."""

    first: Expression
    second: Expression
    weights: tuple[Fraction, Fraction]

    @property
    def numerical(self) -> bool:
        return True

    def inputs(self) -> tuple[Expression, ...]:
        return (self.first, self.second)


@dataclass(frozen=True, eq=False)
class Match:
    """One condition of a selector: `key <predicate> query`."""

    keys: Expression
    queries: Expression
    predicate: Predicate


@dataclass(frozen=True, eq=False)
class Selector:
    """The places that meet every condition (all places where there is none)."""

    matches: tuple[Match, ...] = ()
    prefer: Prefer = Prefer.ALL

    def inputs(self) -> tuple[Expression, ...]:
        """What the conditions compare."""
        return tuple(x for m in self.matches for x in (m.keys, m.queries))


@dataclass(frozen=True, eq=False)
class Aggregate(Expression):
    """The mean of numbers, or the common category, over the selected places."""

    selector: Selector
    values: Expression

    @property
    def numerical(self) -> bool:
        return self.values.numerical

    def inputs(self) -> tuple[Expression, ...]:
        return (*self.selector.inputs(), self.values)


@dataclass(frozen=True, eq=False)
class Share(Expression):
    """1 / (1 + how many places are selected): what attention gives to a place that is
    always selected as well. `width` turns it into the number."""

    selector: Selector

    @property
    def numerical(self) -> bool:
        return True

    def inputs(self) -> tuple[Expression, ...]:
        return self.selector.inputs()


EVERYWHERE = Selector()


def select(
    keys: Expression,
    queries: Expression,
    predicate: Predicate = Predicate.EQ,
    prefer: Prefer = Prefer.ALL,
) -> Selector:
    """The places whose key is to the query as the predicate says."""
    return Selector((Match(keys, queries, predicate),), prefer)


def both(first: Selector, second: Selector, prefer: Prefer = Prefer.ALL) -> Selector:
    """The places that both selectors select."""
    return Selector((*first.matches, *second.matches), prefer)


def width(selector: Selector) -> Map:
    """How many places are selected, as a category."""
    return Map(Share(selector), lambda share: int(1 / share) - 1)


def ordered(program: Expression) -> list[Expression]:
    """Every expression of the program once, inputs first."""
    seen: dict[Expression, None] = {}

    def visit(expression: Expression) -> None:
        if expression not in seen:
            for source in expression.inputs():
                visit(source)
            seen[expression] = None

    visit(program)
    return list(seen)


def evaluate(program: Expression, inputs: Sequence[Value], *, causal: bool = False) -> list[Value]:
    """What the program gives at every place; `causal` hides later places from selectors.

    Raises:
        OptionError: different categories are aggregated at one place.
    """
    found: dict[Expression, list[Value]] = {}
    for expression in ordered(program):
        found[expression] = _evaluated(expression, inputs, found, causal)
    return found[program]


def _evaluated(
    expression: Expression,
    inputs: Sequence[Value],
    found: dict[Expression, list[Value]],
    causal: bool,
) -> list[Value]:
    places = range(len(inputs))
    match expression:
        case Tokens():
            return list(inputs)
        case Indices():
            return list(places)
        case Constant():
            return [expression.value for _ in places]
        case Map():
            return [expression.apply(x) for x in found[expression.source]]
        case Zip():
            pairs = zip(found[expression.first], found[expression.second], strict=True)
            return [expression.apply(x, y) for x, y in pairs]
        case Linear():
            a, b = expression.weights
            return [
                a * _number(x) + b * _number(y)
                for x, y in zip(found[expression.first], found[expression.second], strict=True)
            ]
        case Share():
            chosen = [_selected(expression.selector, q, len(inputs), found, causal) for q in places]
            return [Fraction(1, 1 + len(keys)) for keys in chosen]
        case Aggregate():
            chosen = [_selected(expression.selector, q, len(inputs), found, causal) for q in places]
            values = found[expression.values]
            mean = _mean if expression.numerical else _common
            return [mean([values[k] for k in keys]) for keys in chosen]
    raise OptionError("this is not an expression", got=type(expression).__name__)


def _selected(
    selector: Selector, query: int, length: int, found: dict[Expression, list[Value]], causal: bool
) -> list[int]:
    places = [
        key
        for key in range(query + 1 if causal else length)
        if all(
            m.predicate.holds(found[m.keys][key], found[m.queries][query]) for m in selector.matches
        )
    ]
    match selector.prefer:
        case Prefer.LATEST:
            return places[-1:]
        case Prefer.EARLIEST:
            return places[:1]
    return places


def _mean(values: list[Value]) -> Value:
    return sum((_number(v) for v in values), Fraction()) / max(1, len(values))


def _common(values: list[Value]) -> Value:
    distinct = list(dict.fromkeys(values))
    if len(distinct) > 1:
        raise OptionError(
            "a program aggregates different categories at one place",
            got=str(distinct),
            hint="select one place, or aggregate numbers",
        )
    return distinct[0] if distinct else None


def _number(value: Value) -> Fraction:
    """A number exactly; no value counts as 0."""
    if value is None:
        return Fraction()
    if isinstance(value, bool | int | Fraction):
        return Fraction(value)
    raise OptionError("a number of a program must be a whole number or a fraction", got=repr(value))
