"""From a program to the weights of a transformer that computes it.

Every expression owns directions of the residual stream: one per category, or one for
a number. `embed` writes the tokens, `position` the indices and the mark of the place
that belongs to the machine (BOS). Then

- an `Aggregate` or `Share` is one attention head. Its scores are `sharpness` for every
  condition that a key meets; BOS scores half a condition less than all of them, and is
  therefore looked at exactly where nothing is selected. Where the latest or earliest
  place is asked for, places break the tie by half a `sharpness` each, and a condition
  weighs more than all of them. For a `Share`, BOS scores as much as a selected place,
  and its mark is read;
- a `Map`, `Zip` or `Linear` is a group of hidden units in the perceptron of one block:
  a lookup for categories, a piecewise linear function through the numbers that occur.

A head goes into the first block after its inputs are there, a perceptron into the same
or the next, as many side by side as there are. At BOS every expression is zero.

How sharp: an unselected place gets exp(-sharpness / 2) of the weight of a selected one,
6e-6 for the value used here. That keeps numbers right to 1e-4, and leaves a gradient
through the softmax; it is small at the places themselves, and large halfway between two
inputs. Sources: Weiss et al. 2021; Lindner et al. 2023 (compiled transformers).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.truth.rasp.domains import categories, domains, numbers
from patchclamp.truth.rasp.language import (
    Aggregate,
    Constant,
    Expression,
    Indices,
    Linear,
    Map,
    Match,
    Prefer,
    Share,
    Tokens,
    Value,
    Zip,
    indices,
    ordered,
    tokens,
)
from patchclamp.truth.rasp.transformer import PlantedConfig, PlantedTransformer

SHARPNESS = 24.0
"""Difference of scores between meeting a condition and not meeting it."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A network and how its inputs and outputs are read.

    Attributes:
        module: the network, in evaluation mode.
        program: what it computes.
        vocab: tokens, in the order of their ids; the id after them is BOS.
        length: longest sequence, without BOS.
        causal: whether a place sees only earlier ones.
        classes: categories of the output in the order of the logits; empty for a number.
    """

    module: PlantedTransformer
    program: Expression
    vocab: tuple[Value, ...]
    length: int
    causal: bool
    classes: tuple[Value, ...]

    def encode(self, sequences: Sequence[Sequence[Value]]) -> Tensor:
        """Ids (sequence, 1 + length) of sequences of one length, BOS first.

        Raises:
            OptionError: a token is not in the vocabulary, or the lengths are wrong.
        """
        ids = {token: i for i, token in enumerate(self.vocab)}
        unknown = [x for sequence in sequences for x in sequence if x not in ids]
        if unknown:
            raise OptionError(
                f"no token {unknown[0]!r}", expected=f"one of {', '.join(map(str, self.vocab))}"
            )
        lengths = {len(sequence) for sequence in sequences}
        if len(lengths) != 1 or not 1 <= max(lengths) <= self.length:
            raise OptionError(
                "sequences must be of one length",
                got=str(sorted(lengths)),
                expected=f"1 to {self.length} tokens",
            )
        return torch.tensor([[len(ids), *(ids[x] for x in sequence)] for sequence in sequences])

    def decode(self, logits: Tensor) -> list[list[Value]]:
        """Values at every place after BOS: a category, None, or a float for a number."""
        rows = logits.detach()[:, 1:]
        if not self.classes:
            return [[float(x) for x in row] for row in rows[..., 0]]
        best, place = rows.max(-1)
        return [
            [self.classes[int(p)] if float(b) > 0.5 else None for b, p in zip(*row, strict=True)]
            for row in zip(best, place, strict=True)
        ]


@dataclass(frozen=True)
class Space:
    """The directions that an expression owns."""

    start: int
    size: int

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.start + index


@dataclass
class HeadPlan:
    """Weights of one head: rows over the stream for queries, keys and values."""

    queries: list[dict[int, float]] = field(default_factory=list)
    keys: list[dict[int, float]] = field(default_factory=list)
    always: list[float] = field(default_factory=list)
    values: list[int] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)

    def add(self, query: dict[int, float], key: dict[int, float], always: float = 0.0) -> None:
        """One more dimension in which queries (with the bias `always`) meet keys."""
        self.queries.append(query)
        self.keys.append(key)
        self.always.append(always)


@dataclass
class UnitPlan:
    """Hidden units of one perceptron: what each reads, its bias, what it writes."""

    units: list[tuple[dict[int, float], float, dict[int, float]]] = field(default_factory=list)

    def add(self, reads: dict[int, float], bias: float, writes: Mapping[int, float]) -> None:
        """One more unit, unless it would write nothing."""
        kept = {d: w for d, w in writes.items() if w}
        if kept:
            self.units.append((reads, bias, kept))


def compile_program(
    program: Expression,
    *,
    vocab: Sequence[Value],
    length: int,
    causal: bool = False,
    sharpness: float = SHARPNESS,
) -> Compiled:
    """The network that computes a program on sequences of up to `length` tokens.

    Raises:
        OptionError: the program mixes up categories and numbers, has too many values, or
            is an input or a constant, so that there is nothing to compile.
    """
    if isinstance(program, Tokens | Indices | Constant):
        raise OptionError("this program computes nothing", hint="Map(tokens, lambda x: x)")
    lowered = _Lowering(program, tuple(vocab), length, causal, sharpness)
    classes = () if program.numerical else lowered.values[program]
    return Compiled(
        module=lowered.build(max(1, len(classes))),
        program=program,
        vocab=tuple(vocab),
        length=length,
        causal=causal,
        classes=classes,
    )


class _Lowering:
    """One compilation: values, directions, steps and plans of every expression."""

    def __init__(
        self,
        program: Expression,
        vocab: tuple[Value, ...],
        length: int,
        causal: bool,
        sharpness: float,
    ) -> None:
        self.program, self.vocab, self.length = program, vocab, length
        self.causal, self.sharpness = causal, sharpness
        self.values = {tokens: vocab, indices: tuple(range(length))}
        self.values |= domains(program, vocab, length)
        self.spaces: dict[Expression, Space] = {}
        end = 0
        for expression in dict.fromkeys([tokens, indices, *ordered(program)]):
            if isinstance(expression, Constant):
                continue
            size = 1 if expression.numerical else len(self.values[expression])
            self.spaces[expression] = Space(end, size)
            end += size
        self.bos, self.width = end, end + 1
        self.heads: dict[int, list[HeadPlan]] = {}
        self.units: dict[int, UnitPlan] = {}
        self._schedule()

    def _schedule(self) -> None:
        """Attention of block n is step 2n, its perceptron 2n + 1; inputs are there at -1."""
        step: dict[Expression, int] = {}
        for expression in ordered(self.program):
            _constants_are_queries(expression)
            ready = max((step[x] for x in expression.inputs()), default=-1)
            if isinstance(expression, Tokens | Indices | Constant):
                step[expression] = -1
            elif isinstance(expression, Aggregate | Share):
                step[expression] = 2 * (ready // 2 + 1)
                self.heads.setdefault(step[expression] // 2, []).append(self._head(expression))
            else:
                step[expression] = 2 * ((ready + 1) // 2) + 1
                self._mlp(expression, self.units.setdefault(step[expression] // 2, UnitPlan()))

    # ---- heads -----------------------------------------------------------------

    def _head(self, expression: Aggregate | Share) -> HeadPlan:
        plan, selector = HeadPlan(), expression.selector
        ranked = selector.prefer is not Prefer.ALL
        if ranked and isinstance(expression, Share):
            raise OptionError(
                "the latest or earliest place is one place", hint="take the width of all of them"
            )
        weight = (self.length + 1) / 2 if ranked else 1.0
        everything = weight * len(selector.matches)
        # What every query asks for: BOS, the places in order, and constants.
        always = {self.bos: everything if isinstance(expression, Share) else everything - 0.5}
        if ranked:
            backwards = selector.prefer is Prefer.EARLIEST
            for i in range(self.length):
                rank = self.length - 1 - i if backwards else i
                always[self.spaces[indices][i]] = rank / 2
        for match in selector.matches:
            if not isinstance(match.queries, Constant):
                self._condition(plan, match, weight)
                continue
            for k, value in enumerate(self.values[match.keys]):
                if match.predicate.holds(value, match.queries.value):
                    place = self.spaces[match.keys][k]
                    always[place] = always.get(place, 0.0) + weight
        plan.add({}, {d: w for d, w in always.items() if w}, 1.0)
        if not self.causal and all(isinstance(m.queries, Constant) for m in selector.matches):
            # Nothing depends on the query, so BOS itself would look around, and not be zero.
            plan.add({self.bos: 2.0 * self.length}, {self.bos: 1.0})
        if isinstance(expression, Share):
            plan.values = [self.bos]
        else:
            space = self.spaces[expression.values]
            plan.values = [space[i] for i in range(space.size)]
        plan.writes = [self.spaces[expression][i] for i in range(len(plan.values))]
        return plan

    def _condition(self, plan: HeadPlan, match: Match, weight: float) -> None:
        """A table of which key meets which query, through the smaller of the two spaces."""
        key, query = self.spaces[match.keys], self.spaces[match.queries]
        table = [
            [match.predicate.holds(k, q) for k in self.values[match.keys]]
            for q in self.values[match.queries]
        ]
        if key.size <= query.size:
            for k in range(key.size):
                asked = {query[q]: weight for q in range(query.size) if table[q][k]}
                plan.add(asked, {key[k]: 1.0} if asked else {})
        else:
            for q in range(query.size):
                met = {key[k]: weight for k in range(key.size) if table[q][k]}
                plan.add({query[q]: 1.0} if met else {}, met)

    # ---- perceptrons -----------------------------------------------------------

    def _mlp(self, expression: Expression, plan: UnitPlan) -> None:
        match expression:
            case Map() if expression.source.numerical:
                self._interpolate(expression, plan)
            case Map():
                self._lookup(expression, plan)
            case Zip():
                self._product(expression, plan)
            case Linear():
                self._combine(expression, plan)
            case _:
                raise OptionError("this is not an expression", got=type(expression).__name__)

    def _code(self, expression: Expression, value: Value) -> dict[int, float]:
        """How a value is written."""
        space = self.spaces[expression]
        if value is None:
            return {}
        if expression.numerical:
            return {space[0]: float(numbers([value])[0])}
        return {space[self.values[expression].index(value)]: 1.0}

    def _lookup(self, expression: Map, plan: UnitPlan) -> None:
        source = self.spaces[expression.source]
        for i, value in enumerate(self.values[expression.source]):
            plan.add({source[i]: 1.0}, 0.0, self._code(expression, expression.apply(value)))
        if expression.default is not None:
            present = {source[i]: -1.0 for i in range(source.size)}
            missing = self._code(expression, expression.apply(None))
            plan.add({**present, self.bos: -1.0}, 1.0, missing)

    def _product(self, expression: Zip, plan: UnitPlan) -> None:
        """One unit for every pair of categories: 1 where both are there, off otherwise."""
        categories(expression.first, expression.second)
        first, second = self.spaces[expression.first], self.spaces[expression.second]
        for i, x in enumerate(self.values[expression.first]):
            for j, y in enumerate(self.values[expression.second]):
                reads = {first[i]: 2.0}
                reads[second[j]] = reads.get(second[j], 0.0) + 2.0
                plan.add(reads, -3.0, self._code(expression, expression.apply(x, y)))

    def _interpolate(self, expression: Map, plan: UnitPlan) -> None:
        """The piecewise linear function through all numbers that occur.

        The first piece goes on to the left, so that no number lies where a lone kink
        would hide the slope. All units are off at BOS.
        """
        points = numbers(self.values[expression.source])
        codes = [self._code(expression, expression.apply(p)) for p in points]
        source = self.spaces[expression.source][0]
        off = float(max(points[-1], Fraction()) - points[0]) + 2.0
        slopes = [
            _mixed(
                (codes[i], -1.0), (codes[i + 1], 1.0), scale=1 / float(points[i + 1] - points[i])
            )
            for i in range(len(points) - 1)
        ]
        if not slopes:
            plan.add({self.bos: -1.0}, 1.0, codes[0])
            return
        plan.add({self.bos: -1.0}, 1.0, _mixed((codes[0], 1.0), (slopes[0], -1.0)))
        plan.add({source: 1.0, self.bos: -off}, 1.0 - float(points[0]), slopes[0])
        for i in range(1, len(slopes)):
            change = _mixed((slopes[i], 1.0), (slopes[i - 1], -1.0))
            plan.add({source: 1.0, self.bos: -off}, -float(points[i]), change)

    def _combine(self, expression: Linear, plan: UnitPlan) -> None:
        """One unit that is shifted up so far that it never rectifies, except at BOS."""
        reads: dict[int, float] = {}
        for source, weight in zip(expression.inputs(), expression.weights, strict=True):
            place = self.spaces[source][0]
            reads[place] = reads.get(place, 0.0) + float(weight)
        found = numbers(self.values[expression])
        up = 1.0 - float(min(found[0], Fraction()))
        off = up + float(max(found[-1], Fraction())) + 1.0
        write = self.spaces[expression][0]
        plan.add({**reads, self.bos: -off}, up, {write: 1.0})
        plan.add({self.bos: -1.0}, 1.0, {write: -up})

    # ---- weights ---------------------------------------------------------------

    def build(self, num_classes: int) -> PlantedTransformer:
        """The network with all plans written into its weights."""
        heads = [plan for plans in self.heads.values() for plan in plans]
        config = PlantedConfig(
            vocab=len(self.vocab) + 1,
            context=self.length + 1,
            width=self.width,
            mlp_width=max([1, *(len(p.units) for p in self.units.values())]),
            num_layers=max([*self.heads, *self.units]) + 1,
            num_heads=max([1, *(len(plans) for plans in self.heads.values())]),
            head_dim=max([1, *(max(len(p.queries), len(p.values)) for p in heads)]),
            num_classes=num_classes,
            causal=self.causal,
        )
        module = PlantedTransformer(config)
        with torch.no_grad():
            for i in range(len(self.vocab)):
                module.embed.weight[i, self.spaces[tokens][i]] = 1.0
            module.position.weight[0, self.bos] = 1.0
            for i in range(self.length):
                module.position.weight[1 + i, self.spaces[indices][i]] = 1.0
            output = self.spaces[self.program]
            for i in range(num_classes):
                module.unembed.weight[i, output[i]] = 1.0
            for n, plans in self.heads.items():
                for head, plan in enumerate(plans):
                    self._write_head(module, n, head, plan)
            for n, units in self.units.items():
                _write_units(module, n, units)
        return module.eval()

    def _write_head(self, module: PlantedTransformer, n: int, head: int, plan: HeadPlan) -> None:
        attn, size = module.layer(n).attn, module.config.head_dim
        scale = math.sqrt(self.sharpness * math.sqrt(size))  # attention divides by sqrt(size)
        first = head * size
        rows = zip(plan.queries, plan.keys, plan.always, strict=True)
        for i, (query, key, always) in enumerate(rows, start=first):
            for d, w in query.items():
                attn.q_proj.weight[i, d] = scale * w
            for d, w in key.items():
                attn.k_proj.weight[i, d] = scale * w
            attn.q_proj.bias[i] = scale * always
        for i, (read, write) in enumerate(zip(plan.values, plan.writes, strict=True), start=first):
            attn.v_proj.weight[i, read] = 1.0
            attn.o_proj.weight[write, i] = 1.0


def _constants_are_queries(expression: Expression) -> None:
    """Refuse constants elsewhere: no direction of the stream holds them."""
    allowed: set[Expression] = set()
    if isinstance(expression, Aggregate | Share):
        allowed = {m.queries for m in expression.selector.matches}
        allowed -= {m.keys for m in expression.selector.matches}
    if isinstance(expression, Aggregate):
        allowed.discard(expression.values)
    if any(isinstance(x, Constant) and x not in allowed for x in expression.inputs()):
        raise OptionError(
            f"a {type(expression).__name__} reads a constant",
            expected="constants only as the queries of a selector",
            hint="write the constant into the function",
        )


def _write_units(module: PlantedTransformer, n: int, plan: UnitPlan) -> None:
    mlp = module.layer(n).mlp
    for i, (reads, bias, writes) in enumerate(plan.units):
        for d, w in reads.items():
            mlp.up.weight[i, d] = w
        mlp.up.bias[i] = bias
        for d, w in writes.items():
            mlp.down.weight[d, i] = w


def _mixed(*parts: tuple[Mapping[int, float], float], scale: float = 1.0) -> dict[int, float]:
    """A weighted sum of codes."""
    total: dict[int, float] = {}
    for code, weight in parts:
        for d, w in code.items():
            total[d] = total.get(d, 0.0) + scale * weight * w
    return total
