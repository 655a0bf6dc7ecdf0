"""From a program to a planted circuit: the network, pairs of inputs, metric, true edges.

Half of the pairs are two inputs drawn apart, half differ in one token; where a program
asks for inputs of a special form, all are drawn apart. The outputs of a pair always
differ where the metric looks.

The metric is linear in the logits, so that its slope is nowhere zero: at every place
the logit of the clean output less that of the corrupt output, or less the mean of all
classes where the two agree; for a number the number itself, with the sign of clean less
corrupt. It is averaged over the places, or taken at the last.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.truth.planted_circuit import Family, PlantedCircuit
from patchclamp.truth.rasp.compiler import Compiled, compile_program
from patchclamp.truth.rasp.edges import edge_effects, structural_edges
from patchclamp.truth.rasp.language import Expression, Value, evaluate

TOLERANCE = 1e-3
"""What leaks through the softmax moves a metric by less, a part that matters by more."""

_TRIES = 2000

Draw = Callable[[random.Random, Sequence[Value], int], list[Value]]


def draw_any(source: random.Random, vocab: Sequence[Value], length: int) -> list[Value]:
    """Every token alike."""
    return source.choices(vocab, k=length)


def draw_distinct(source: random.Random, vocab: Sequence[Value], length: int) -> list[Value]:
    """No token twice."""
    return source.sample(list(vocab), length)


@dataclass(frozen=True, kw_only=True)
class Program:
    """A named program with the inputs that it is for.

    Attributes:
        description: one line.
        build: makes the expression.
        vocab, length: its tokens, and how many of them the inputs have.
        causal: a place sees only earlier ones.
        last: what counts is the output at the last place.
        draw: one random input.
    """

    name: str
    description: str
    build: Callable[[], Expression]
    vocab: tuple[Value, ...]
    length: int
    causal: bool
    last: bool
    draw: Draw

    def compile(self) -> Compiled:
        """The network."""
        return compile_program(
            self.build(), vocab=self.vocab, length=self.length, causal=self.causal
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputShift:
    """How far outputs are from the corrupt and towards the clean one; see the module.

    Attributes:
        direction: weights of the output: (pair, position, class), or (pair, class) where
            only `position` is read.
    """

    name: str
    direction: Tensor
    position: int | None = None

    def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
        direction = self.direction.to(output)[rows]
        return (output * direction).flatten(1).sum(1)


def plant(program: Program, *, seed: int = 0, num_pairs: int = 24) -> PlantedCircuit:
    """The planted circuit of a program.

    Raises:
        OptionError: no pairs with different outputs are found, or fewer than 2 are wanted.
    """
    if num_pairs < 2:
        raise OptionError("a circuit needs pairs of both kinds", got=str(num_pairs), expected="2")
    compiled = program.compile()
    pairs = _pairs(program, compiled, random.Random(f"{program.name}/{seed}"), num_pairs)
    clean, corrupt = ([pair[side] for pair in pairs] for side in (0, 1))
    metric = shift_metric(compiled, clean, corrupt, program.last)
    ids, others = compiled.encode(clean), compiled.encode(corrupt)
    structural = structural_edges(compiled.module)
    effects = edge_effects(compiled.module, ids, others, metric, structural)
    return PlantedCircuit(
        name=program.name,
        family=Family.TRANSFORMER,
        module=compiled.module,
        clean=ids,
        corrupt=others,
        metric=metric,
        structural=structural,
        active=frozenset(e for e, effect in effects.items() if effect > TOLERANCE),
        tolerance=TOLERANCE,
        description=program.description,
    )


def _pairs(
    program: Program, compiled: Compiled, source: random.Random, num: int
) -> list[tuple[list[Value], list[Value]]]:
    found: list[tuple[list[Value], list[Value]]] = []
    for _ in range(_TRIES):
        clean = program.draw(source, program.vocab, program.length)
        if program.draw is draw_any and len(found) % 2:
            corrupt, place = list(clean), source.randrange(program.length)
            corrupt[place] = source.choice([t for t in program.vocab if t != clean[place]])
        else:
            corrupt = program.draw(source, program.vocab, program.length)
        a, b = (evaluate(compiled.program, x, causal=program.causal) for x in (clean, corrupt))
        if (a[-1] != b[-1]) if program.last else (a != b):
            found.append((clean, corrupt))
        if len(found) == num:
            return found
    raise OptionError(
        f"'{program.name}' gives different outputs too seldom",
        got=f"{len(found)} pairs in {_TRIES} draws",
        expected=str(num),
    )


def shift_metric(
    compiled: Compiled,
    clean: Iterable[Sequence[Value]],
    corrupt: Iterable[Sequence[Value]],
    last: bool,
) -> OutputShift:
    """The metric for these pairs; see the module docstring."""
    pairs = zip(clean, corrupt, strict=True)
    rows = []
    for pair in pairs:
        a, b = (evaluate(compiled.program, x, causal=compiled.causal) for x in pair)
        rows.append([_direction(compiled.classes, x, y) for x, y in zip(a, b, strict=True)])
    direction = torch.tensor(rows, dtype=torch.float64)
    length = direction.shape[1]
    if last:
        return OutputShift(
            name="output shift at the last place", direction=direction[:, -1], position=length
        )
    bos = torch.zeros_like(direction[:, :1])
    return OutputShift(name="mean output shift", direction=torch.cat([bos, direction], 1) / length)


def _direction(classes: Sequence[Value], clean: Value, corrupt: Value) -> list[float]:
    if not classes:
        return [-1.0 if clean < corrupt else 1.0]  # type: ignore[operator]  # both are fractions
    if clean == corrupt:
        return [float(c == clean) - 1 / len(classes) for c in classes]
    return [float(c == clean) - float(c == corrupt) for c in classes]
