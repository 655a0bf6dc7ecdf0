"""Which values every expression of a program can take.

A compiled network holds one direction of its residual stream for every category, and
its perceptrons interpolate between the numbers that can occur, so both must be known
beforehand. They follow from the vocabulary and the length alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from patchclamp.core.errors import OptionError
from patchclamp.truth.rasp.language import (
    Aggregate,
    Constant,
    Expression,
    Indices,
    Linear,
    Map,
    Share,
    Tokens,
    Value,
    Zip,
    ordered,
)

MOST = 512
"""More values than this are refused: the network would no longer be small."""


def domains(
    program: Expression, vocab: Sequence[Value], length: int
) -> dict[Expression, tuple[Value, ...]]:
    """Values that can occur, without None; numbers in ascending order.

    Raises:
        OptionError: there are more than `MOST`, or categories and numbers are confused.
    """
    found: dict[Expression, tuple[Value, ...]] = {}
    for expression in ordered(program):
        values = _values(expression, found, vocab, length)
        if len(values) > MOST:
            raise OptionError(
                f"a {type(expression).__name__} of the program has too many values",
                got=str(len(values)),
                expected=f"at most {MOST}",
                hint="shorten the sequence or take fewer tokens",
            )
        found[expression] = values
    return found


def _values(
    expression: Expression,
    found: Mapping[Expression, tuple[Value, ...]],
    vocab: Sequence[Value],
    length: int,
) -> tuple[Value, ...]:
    match expression:
        case Tokens():
            return tuple(vocab)
        case Indices():
            return tuple(range(length))
        case Constant():
            return (expression.value,)
        case Map():
            missing: tuple[Value, ...] = () if expression.source.numerical else (None,)
            return _distinct(
                (expression.apply(x) for x in (*found[expression.source], *missing)),
                expression.numerical,
            )
        case Zip():
            categories(expression.first, expression.second)
            pairs = (
                expression.apply(x, y)
                for x in found[expression.first]
                for y in found[expression.second]
            )
            return _distinct(pairs, expression.numerical)
        case Linear():
            a, b = expression.weights
            first, second = (numbers(found[x]) for x in expression.inputs())
            return _distinct((a * x + b * y for x in first for y in second), True)
        case Share():
            categories(*expression.inputs())
            return _distinct((Fraction(1, 1 + n) for n in range(length + 1)), True)
        case Aggregate():
            categories(*expression.selector.inputs())
            values = found[expression.values]
            return _means(numbers(values), length) if expression.numerical else values
    raise OptionError("this is not an expression", got=type(expression).__name__)


def numbers(values: Iterable[Value]) -> list[Fraction]:
    """Values of a numerical expression.

    Raises:
        OptionError: they are categories.
    """
    found = list(values)
    numerical = [x for x in found if isinstance(x, Fraction)]
    if len(numerical) < len(found):
        raise OptionError(
            "a program uses categories where it needs numbers",
            got=str(found),
            hint="Map(source, function, to_number=True)",
        )
    return numerical


def categories(*expressions: Expression) -> None:
    """Refuse numbers where a program needs categories."""
    for expression in expressions:
        if expression.numerical:
            raise OptionError(
                "a program uses numbers where it needs categories",
                got=type(expression).__name__,
                hint="Map(source, function) of a number is a category",
            )


def _distinct(values: Iterable[Value], numerical: bool) -> tuple[Value, ...]:
    distinct = [x for x in dict.fromkeys(values) if x is not None]
    return tuple(sorted(numbers(distinct))) if numerical else tuple(distinct)


def _means(values: list[Fraction], length: int) -> tuple[Value, ...]:
    """Means of up to `length` of the values, and 0 for none of them."""
    means, sums = {Fraction()}, {Fraction()}
    for count in range(1, length + 1):
        sums = {total + value for total in sums for value in values}
        if len(sums) > MOST:
            break  # the caller refuses it
        means |= {total / count for total in sums}
    return tuple(sorted(means | sums if len(sums) > MOST else means))
