"""From the words of a property file to a disjunctive normal form over exact inequalities."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from patchclamp.core.errors import PropertyError
from patchclamp.methods.bounds.vnnlib.linear import Conjunction, Disjunction, Inequality, Sum
from patchclamp.methods.bounds.vnnlib.tokens import Tokens

MAX_CASES = 200_000
"""Disjuncts of the normal form; `and` of `or`s multiplies them."""

MAX_INEQUALITIES = 10_000_000
"""Inequalities in all disjuncts of one formula together."""

TOO_LONG = (
    f"a formula has more than {MAX_CASES:,} alternatives, or more than {MAX_INEQUALITIES:,} "
    "inequalities in them, when what 'and' joins is multiplied out"
)

MAX_DEPTH = 100
"""Parentheses within parentheses."""

MAX_EXPONENT = 400
"""Powers of ten beyond which nothing is a float64; their fractions would fill the memory."""

MAX_DIGITS = 1000

MAX_BITS = 20_000
"""Bits in the fractions of a product: many times those of one number."""

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE]([+-]?[0-9]+))?")
_VARIABLE = re.compile(r"([XY])_(0|[1-9][0-9]*)")
_INDEXED = re.compile(r"([^\s\[]+)\s*\[([\s0-9,]*)\]")
_VERSION = re.compile(r"<([0-9]+)\.([0-9]+)>")

_BEGINS_A_NUMBER = "+-.0123456789"
_ONE, _MINUS_ONE = Fraction(1), Fraction(-1)

NO_EFFECT = ("set-logic", "set-info", "set-option", "check-sat", "get-model")
"""Commands of SMT-LIB that change nothing of what is asserted."""

COMMANDS = ("declare-const", "declare-fun", "assert", "vnnlib-version", "declare-network")
FORMULAS = ("and", "or", "<=", ">=", "<", ">", "=", "==")
ARITHMETIC = ("+", "-", "*", "/")
REAL_TYPES = ("real", "float16", "float32", "float64")


@dataclass
class Query:
    """What a file says.

    Attributes:
        num_inputs, num_outputs: how many variables there are.
        factors: one disjunctive normal form for every assertion, all of which hold.
        tokens: for errors.
        names: of the input variables that the file mentions, for errors.
    """

    tokens: Tokens
    num_inputs: int = 0
    num_outputs: int = 0
    factors: list[Disjunction] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    def input_name(self, index: int) -> str:
        """As the file calls it, or by its number."""
        return self.names.get(index, f"input {index}")


def read(text: str, name: str) -> Query:
    """The query in a text. Raises: PropertyError with line and column."""
    return _Reader(Tokens(text, name)).query()


class _Reader:
    """Recursive descent; `_next` is the number of the token that is read next."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens, self._words, self._next = tokens, tokens.words, 0
        self._depth = 0
        self._scalars: dict[str, tuple[bool, int]] = {}
        self._tensors: dict[str, tuple[bool, tuple[int, ...]]] = {}
        self._numbers: dict[str, Fraction] = {}
        self._networks = 0
        self._query = Query(tokens)

    def query(self) -> Query:
        """All commands of the file."""
        while self._next < len(self._words):
            self._open("a command in parentheses")
            at = self._next
            command = self._take("a command")
            if command == "assert":
                self._closed_declarations(at)
                self._assertion()
            elif command in ("declare-const", "declare-fun"):
                self._declare(at, function=command == "declare-fun")
            elif command == "vnnlib-version":
                self._version()
            elif command == "declare-network":
                self._network(at)
            elif command in NO_EFFECT:
                while self._peek() not in (None, ")"):
                    self._take("a word")
            else:
                raise self._unknown(at, "command", COMMANDS)
            self._close()
        if not self._query.factors:
            raise self._tokens.failure("there is no (assert ...) in the file")
        self._query.names = {i: name for name, (x, i) in self._scalars.items() if x}
        return self._query

    # Declarations

    def _declare(self, at: int, *, function: bool) -> None:
        if self._query.factors or self._networks:
            raise self._tokens.error(at, "a declaration after the first assertion or network")
        name = self._take("the name of a variable")
        match = _VARIABLE.fullmatch(name)
        if match is None:
            raise self._tokens.error(
                at + 1, f"'{name}' is no input or output", expected="X_0, X_1, ... or Y_0, ..."
            )
        if name in self._scalars:
            raise self._tokens.error(at + 1, f"'{name}' is declared twice")
        if function:
            self._open("an empty list of arguments")
            self._close()
        self._real_type(self._take("the type Real"))
        self._scalars[name] = (match[1] == "X", int(match[2]))

    def _real_type(self, word: str) -> None:
        if word.lower() not in REAL_TYPES:
            raise self._tokens.error(
                self._next - 1, f"variables of type '{word}' are not read", expected="Real"
            )

    def _closed_declarations(self, at: int) -> None:
        """Before the first assertion: the variables are complete and are counted."""
        if self._query.factors or self._networks:
            return
        for letter, inputs in (("X", True), ("Y", False)):
            found = sorted(index for kind, index in self._scalars.values() if kind is inputs)
            gap = next((i for i, index in enumerate(found) if index != i), len(found))
            if gap < len(found) or not found:
                raise self._tokens.error(
                    at,
                    f"'{letter}_{gap}' is not declared",
                    got=f"{letter}_{found[-1]}" if found else f"no {letter}_...",
                    expected=f"{letter}_0, {letter}_1, ... without gaps, before assertions",
                )
            self._count(inputs, len(found))

    def _count(self, inputs: bool, num: int) -> None:
        if inputs:
            self._query.num_inputs = num
        else:
            self._query.num_outputs = num

    def _version(self) -> None:
        word = self._take("a version, such as <2.0>")
        match = _VERSION.fullmatch(word)
        if match is None or match[1] not in ("1", "2"):
            raise self._tokens.error(
                self._next - 1, "another version of VNN-LIB", got=word, expected="<1.0> or <2.0>"
            )

    def _network(self, at: int) -> None:
        """One `(declare-network N (declare-input ...) (declare-output ...))` of version 2.0."""
        if self._scalars or self._query.factors:
            raise self._tokens.error(at, "a network is declared after variables or assertions")
        if self._networks:
            raise self._tokens.error(at, "properties of several networks cannot be verified")
        self._networks += 1
        self._take("the name of the network")
        for command, inputs in (("declare-input", True), ("declare-output", False)):
            self._open(f"({command} ...)")
            found = self._take(command)
            if found != command:
                raise self._tokens.error(
                    self._next - 1,
                    f"'{found}' is not read in this place",
                    expected=f"{command}: one network with one input and one output",
                )
            self._tensor(inputs)
            self._close()

    def _tensor(self, inputs: bool) -> None:
        name = self._take("the name of a tensor")
        at = self._next
        match = _INDEXED.fullmatch(self._take("a type and a shape, such as Real [1,5]"))
        shape = None if match is None else _whole_numbers(match[2])
        if match is None or shape is None or 0 in shape:
            raise self._tokens.error(
                at, "no type and shape", got=self._words[at], expected="such as Real [1,5]"
            )
        self._real_type(match[1])
        if name in self._tensors:
            raise self._tokens.error(at - 1, f"'{name}' is declared twice")
        word = self._peek()
        if word is not None and word.startswith('"'):
            self._take("the name in the ONNX file")
        self._tensors[name] = (inputs, shape)
        self._count(inputs, math.prod(shape))

    # Formulas

    def _assertion(self) -> None:
        """A formula that holds; the parts of an outermost `and` are kept apart, unmultiplied."""
        if self._words[self._next : self._next + 2] != ["(", "and"]:
            self._query.factors.append(self._formula())
            return
        self._open("a formula in parentheses")
        at = self._next
        self._take("and")
        if self._peek() == ")":
            raise self._tokens.error(at, "'and' of nothing")
        while self._peek() not in (None, ")"):
            self._assertion()
        self._close()

    def _formula(self) -> Disjunction:
        self._open("a formula in parentheses")
        at = self._next
        word = self._take("a connective or comparison")
        if word == "and":
            found = self._conjunction(at)
        elif word == "or":
            found = self._several(at, self._formula)
            if len(found) > MAX_CASES:
                raise self._too_many(at)
        elif word in FORMULAS:
            found = self._comparison(at, word)
        else:
            raise self._unknown(at, "formula", FORMULAS)
        self._close()
        return found

    def _several(self, at: int, part: Callable[[], Disjunction]) -> Disjunction:
        """The disjuncts of at least one formula, up to the closing parenthesis."""
        found: Disjunction = []
        begin = self._next
        while self._peek() not in (None, ")"):
            found += part()
        if begin == self._next:
            raise self._tokens.error(at, f"'{self._words[at]}' of nothing")
        return found

    def _conjunction(self, at: int) -> Disjunction:
        """`and`: alternatives multiply; what has only one disjunct is joined to it first."""
        common: Conjunction = []
        factors: list[Disjunction] = []
        begin = self._next
        while self._peek() not in (None, ")"):
            part = self._formula()
            if len(part) == 1:
                common += part[0]
            else:
                factors.append(part)
        if begin == self._next:
            raise self._tokens.error(at, "'and' of nothing")
        if not all(factors):
            return []
        if is_too_long([[common], *factors]):
            raise self._too_many(at)
        found: Disjunction = [common]
        for factor in factors:
            found = [left + right for left in found for right in factor]
        return found

    def _too_many(self, at: int) -> PropertyError:
        return self._tokens.error(at, TOO_LONG, hint="divide the property into several files")

    def _comparison(self, at: int, word: str) -> Disjunction:
        bound = self._bound(at, word)
        if bound is not None:
            return [[bound]]
        left = self._expression()
        right = self._expression()
        if self._peek() != ")":
            raise self._tokens.error(self._next, f"'{word}' takes two expressions")
        if word in ("<=", "<"):
            return self._inequality(at, left, right)
        if word in (">=", ">"):
            return self._inequality(at, right, left)
        both = (self._inequality(at, left, right), self._inequality(at, right, left))
        return [a + b for a in both[0] for b in both[1]]

    def _bound(self, at: int, word: str) -> Inequality | None:
        """The common case, `<= variable number` or `>= ...`, which big files consist of."""
        if word not in ("<=", ">=") or self._words[self._next + 2 : self._next + 3] != [")"]:
            return None
        variable = self._scalars.get(self._words[self._next])
        if variable is None:
            return None
        word_of_number = self._words[self._next + 1]
        number = self._numbers.get(word_of_number)
        if number is None:
            if word_of_number[0] not in _BEGINS_A_NUMBER:
                return None
            number = self._number(self._next + 1, word_of_number)
            self._numbers[word_of_number] = number
        self._next += 2
        inputs, index = variable
        if word == "<=":
            return Inequality(((index, _ONE),), -number, inputs, at)
        return Inequality(((index, _MINUS_ONE),), number, inputs, at)

    def _inequality(self, at: int, less: Sum, more: Sum) -> Disjunction:
        """less <= more."""
        terms, constant = less.plus(more, Fraction(-1))
        if not terms:
            return [[]] if constant <= 0 else []
        kinds = {inputs for inputs, _ in terms}
        if len(kinds) > 1:
            raise self._tokens.error(
                at,
                "an inequality between inputs and outputs cannot be verified",
                expected="only inputs or only outputs in one inequality",
            )
        weights = tuple((index, weight) for (_, index), weight in terms.items())
        return [[Inequality(weights, constant, kinds.pop(), at)]]

    # Expressions

    def _expression(self) -> Sum:
        at = self._next
        word = self._take("an expression")
        if word != "(":
            return self._atom(at, word)
        self._deeper()
        operator = self._take("one of + - * /")
        if operator not in ARITHMETIC:
            raise self._unknown(at + 1, "operation", ARITHMETIC)
        parts: list[Sum] = []
        places: list[int] = []
        while self._peek() not in (None, ")"):
            places.append(self._next)
            parts.append(self._expression())
        if not parts:
            raise self._tokens.error(at + 1, f"'{operator}' of nothing")
        self._close()
        return self._operation(at + 1, operator, parts, places)

    def _operation(self, at: int, operator: str, parts: list[Sum], places: list[int]) -> Sum:
        first, *rest = parts
        if operator == "-" and not rest:
            return first.times(Fraction(-1))
        if operator == "/" and not rest:
            raise self._tokens.error(at, "'/' takes two expressions")
        if operator in "+-":
            sign = Fraction(1 if operator == "+" else -1)
            return first.plus_all(rest, sign)
        found = first
        for part, place in zip(rest, places[1:], strict=True):
            if operator == "/":
                if part.terms or part.constant == 0:
                    raise self._tokens.error(place, "division by a variable or by 0")
                found = found.times(1 / part.constant)
            elif part.terms and found.terms:
                raise self._tokens.error(place, "a product of variables is not linear")
            else:
                number, other = (part, found) if found.terms else (found, part)
                found = other.times(number.constant)
            if found.size() > MAX_BITS:
                raise self._tokens.error(place, "a product that float64 cannot hold")
        return found

    def _atom(self, at: int, word: str) -> Sum:
        number = self._numbers.get(word)
        if number is not None:
            return Sum({}, number)
        variable = self._scalars.get(word)
        if variable is None and word[0] in _BEGINS_A_NUMBER:
            number = self._numbers[word] = self._number(at, word)
            return Sum({}, number)
        if variable is None:
            variable = self._scalars[word] = self._element(at, word)
        return Sum({variable: Fraction(1)}, Fraction(0))

    def _number(self, at: int, word: str) -> Fraction:
        match = _NUMBER.fullmatch(word)
        if match is None:
            raise self._tokens.error(at, f"'{word}' is no number")
        if len(word) > MAX_DIGITS or (match[1] and abs(int(match[1])) > MAX_EXPONENT):
            raise self._tokens.error(
                at,
                "a number that float64 cannot hold, or of too many digits",
                got=word[:40],
                expected=f"exponents to {MAX_EXPONENT}, {MAX_DIGITS} digits",
            )
        return Fraction(word)

    def _element(self, at: int, word: str) -> tuple[bool, int]:
        """The variable that a word of version 2.0 names: X[0,3], or X for a tensor of shape []."""
        if word in (")", "(") or word.lower() in ("nan", "inf", "infinity"):
            raise self._tokens.error(at, "no number and no variable", got=f"'{word}'")
        match = _INDEXED.fullmatch(word)
        name, index = (word, "") if match is None else (match[1], match[2])
        if name not in self._tensors:
            known = [*self._tensors, *(n for n in self._scalars if n[1:2] == "_")]
            near = difflib.get_close_matches(word, known[:1000], n=1)
            raise self._tokens.error(
                at, f"'{word}' is not declared", nearest=near[0] if near else None
            )
        inputs, shape = self._tensors[name]
        place = _whole_numbers(index)
        if place == (0,) and not shape:
            place = ()  # as early files of version 2.0 have it
        if place is None or len(place) != len(shape) or any(map(int.__ge__, place, shape)):
            raise self._tokens.error(
                at, f"'{word}' is no element of '{name}'", expected=f"an index into {list(shape)}"
            )
        flat = 0
        for position, size in zip(place, shape, strict=True):
            flat = flat * size + position
        return inputs, flat

    # Words

    def _peek(self) -> str | None:
        return self._words[self._next] if self._next < len(self._words) else None

    def _take(self, expected: str) -> str:
        if self._next >= len(self._words):
            raise self._ended(expected)
        self._next += 1
        return self._words[self._next - 1]

    def _open(self, expected: str) -> None:
        word = self._take(expected)
        if word != "(":
            more = " after the last command" if self._depth == 0 else ""
            raise self._tokens.error(
                self._next - 1, f"'{word}' is not read{more}", expected=expected
            )
        self._deeper()

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._tokens.error(
                self._next - 1, f"parentheses within parentheses, more than {MAX_DEPTH} deep"
            )

    def _close(self) -> None:
        word = self._take("')'")
        if word != ")":
            raise self._tokens.error(self._next - 1, f"'{word}' is not read here", expected="')'")
        self._depth -= 1

    def _ended(self, expected: str) -> PropertyError:
        opened = self._tokens.unclosed()
        if opened is None:
            return self._tokens.error(len(self._words), "the file ends", expected=expected)
        return self._tokens.error(opened, "this parenthesis is not closed", expected=expected)

    def _unknown(self, at: int, kind: str, known: tuple[str, ...]) -> PropertyError:
        word = self._words[at] if at < len(self._words) else ""
        near = difflib.get_close_matches(word, known, n=1)
        return self._tokens.error(
            at,
            f"'{word}' is no {kind} that can be read",
            expected=", ".join(known),
            nearest=near[0] if near else None,
        )


def _whole_numbers(text: str) -> tuple[int, ...] | None:
    """Of `1, 5`; None if it is something else."""
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if not all(re.fullmatch("[0-9]{1,9}", word) for word in words):
        return None
    return tuple(int(word) for word in words)


def is_too_long(factors: Sequence[Disjunction]) -> bool:
    """Whether the product of disjunctions is beyond what is read; told without making it."""
    num_cases = math.prod(map(len, factors))
    length = sum(num_cases // len(factor) * sum(map(len, factor)) for factor in factors if factor)
    return num_cases > MAX_CASES or length > MAX_INEQUALITIES
