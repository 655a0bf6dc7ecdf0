"""Perceptrons, convolutional and recurrent networks whose circuits are planted by hand.

Each *kind* is a plan of named units that compute something on purpose; a seed draws
widths, places, gains and weights of the decoys around them (see `planting`). Edges are
unit to unit, or channel to channel, named by the operator that made the writer:

    :input[2]->fc0[5]    conv0[1]->conv1[3]    cell@2[4]->cell@3[0]    conv1[3]->head[1]

One output unit, or class, is the plan's; the metric reads it. The other classes
read everything at random, so that an edge into them is possible and not true.

Perceptrons (inputs `:input`, layers `fc0`, `fc1`, ..., `head`):
    chain       a sum of two numbers, carried through four layers
    majority    at least two of three bits
    select      one bit says which of two numbers is shown
    largest     the larger of two numbers
    parity      of three bits, the first two before the third
Convolutional networks (`conv0`, `conv1`, pooling, `head`), on drawings of one rectangle:
    corner      an edge that looks up and one that looks left meet in one place
    upright     the lengths of upright less those of level edges, from every cell of a map
    opponent    where one colour is without the other
Recurrent networks (`first`, then `cell` once a step, `head`), unrolled:
    latch       whether a bit was ever on
    toggle      whether it was on an odd number of times
    coincidence how often two bits were on together
    delay       a number handed from unit to unit, with no input after the first step
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from patchclamp.core.circuit import Node
from patchclamp.core.errors import OptionError, nearest
from patchclamp.truth.planted_circuit import Family, PlantedCircuit
from patchclamp.truth.planting import (
    GAINS,
    Layer,
    Space,
    Stage,
    Unit,
    feed_forward,
    generator_of,
    lay_out,
    write,
)
from patchclamp.truth.wiring import (
    INPUT,
    OutputUnit,
    Wire,
    Wired,
    nodes,
)

TOLERANCE = 1e-4
"""Patching what is no part of the circuit moves a metric by rounding at most."""

ANSWER = "answer"
"""The output unit that plans compute."""

NUM_STEPS = 4
NUM_FEATURES = 3
SIDE = 8


# ---- perceptrons ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MLPKind:
    """A perceptron's plan: `bits` are 0 or 1, `numbers` anywhere between 0.1 and 0.9."""

    description: str
    layers: tuple[Layer, ...]
    bits: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()


def kept(*names: str) -> dict[str, Unit]:
    """Units that hand on the unit of the same name, which is never below zero."""
    return {name: Unit({name: 1.0}) for name in names}


_MAJORITY_AT = {"a": 1.0, "b": 1.0, "c": 1.0}
MLPS: dict[str, MLPKind] = {
    "chain": MLPKind(
        description="a sum of two numbers, carried through four layers",
        layers=(
            kept("a", "b"),
            {"sum": Unit({"a": 1.0, "b": 0.5}, 0.2)},
            kept("sum"),
            {ANSWER: Unit({"sum": 1.0})},
        ),
        numbers=("a", "b"),
    ),
    "majority": MLPKind(
        description="at least two of three bits",
        layers=(
            {"above": Unit(_MAJORITY_AT, -1.25), "beyond": Unit(_MAJORITY_AT, -1.75)},
            {ANSWER: Unit({"above": 2.0, "beyond": -2.0})},
        ),
        bits=("a", "b", "c"),
    ),
    "select": MLPKind(
        description="one bit says which of two numbers is shown",
        layers=(
            kept("which", "a", "b"),
            {
                "first": Unit({"a": 1.0, "which": 1.0}, -1.0),
                "other": Unit({"b": 1.0, "which": -1.0}),
            },
            {ANSWER: Unit({"first": 1.0, "other": 1.0})},
        ),
        bits=("which",),
        numbers=("a", "b"),
    ),
    "largest": MLPKind(
        description="the larger of two numbers",
        layers=(
            kept("a", "b"),
            {**kept("a"), "more": Unit({"b": 1.0, "a": -1.0})},
            {ANSWER: Unit({"a": 1.0, "more": 1.0})},
        ),
        numbers=("a", "b"),
    ),
    "parity": MLPKind(
        description="parity of three bits, the first two before the third",
        layers=(
            {
                "none": Unit({"a": -1.0, "b": -1.0}, 0.5),
                "both": Unit({"a": 1.0, "b": 1.0}, -1.5),
                **kept("c"),
            },
            {
                "neither": Unit({"none": 2.0, "both": 2.0, "c": -1.0}, -0.5),
                "all": Unit({"none": -2.0, "both": -2.0, "c": 1.0}, -0.5),
            },
            {ANSWER: Unit({"neither": -2.0, "all": -2.0}, 1.0)},
        ),
        bits=("a", "b", "c"),
    ),
}


def wire_mlp(name: str, seed: int = 0, num_pairs: int = 32) -> Wired:
    """The perceptron of this kind."""
    kind = _of(MLPS, name)
    generator = generator_of(name, seed)
    names = [*kind.bits, *kind.numbers]
    inputs = lay_out(names, generator, dead_ends=int(torch.randint(2, 4, (), generator=generator)))
    stages = {
        f"fc{n}": Stage(units=layer, after=((f"act{n}", nn.ReLU),))
        for n, layer in enumerate(kind.layers[:-1])
    }
    module, wires, out = feed_forward(
        {**stages, "head": Stage(units=kind.layers[-1])}, inputs, generator
    )

    def draw() -> Tensor:
        x = 0.1 + 0.8 * torch.rand(num_pairs, inputs.size, generator=generator)
        for bit in kind.bits:
            x[:, inputs.places[bit]] = x[:, inputs.places[bit]].gt(0.5).float()
        return x

    clean, corrupt = draw(), draw()
    return answering(
        f"{name}/{seed}",
        Family.MLP,
        module,
        wires,
        (clean, corrupt),
        (inputs, out),
        kind.description,
    )


# ---- convolutional networks -------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CNNKind:
    """A convolutional network's plan; `channels` are drawn on."""

    description: str
    stages: Mapping[str, Stage]
    channels: tuple[str, ...]


def _grid(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows)


_UP = _grid((-1, -1, -1), (1, 1, 1), (0, 0, 0)) / 3
"""Largest where the row above is empty and this one is not."""
_LEFT = _UP.T.contiguous()
_HERE = _grid((0, 0, 0), (0, 1, 0), (0, 0, 0))
_MEAN = torch.full((3, 3), 1 / 9)
_FLAT = ("flatten", nn.Flatten)
_CELLS = 9
"""Cells of a 6 x 6 map after pooling by two."""

CNNS: dict[str, CNNKind] = {
    "corner": CNNKind(
        description="an edge that looks up and one that looks left meet in one place",
        stages={
            "conv0": Stage(
                units={"up": Unit({"ink": _UP}, -0.1), "left": Unit({"ink": _LEFT}, -0.1)},
                kernel=3,
                after=(("act0", nn.ReLU),),
            ),
            "conv1": Stage(
                units={"corner": Unit({"up": _HERE, "left": _HERE}, -0.95)},
                kernel=3,
                after=(("act1", nn.ReLU), ("pool", lambda: nn.AdaptiveMaxPool2d(1)), _FLAT),
            ),
            "head": Stage(units={ANSWER: Unit({"corner": 3.0})}),
        },
        channels=("ink",),
    ),
    "upright": CNNKind(
        description="the lengths of upright less those of level edges, from every cell of a map",
        stages={
            "conv0": Stage(
                units={"up": Unit({"ink": _UP}, -0.1), "left": Unit({"ink": _LEFT}, -0.1)},
                kernel=3,
                after=(("act0", nn.ReLU), ("pool", lambda: nn.MaxPool2d(2)), _FLAT),
            ),
            "head": Stage(units={ANSWER: Unit({"left": 1.0, "up": -1.0})}, cells=_CELLS),
        },
        channels=("ink",),
    ),
    "opponent": CNNKind(
        description="where one colour is without the other",
        stages={
            "conv0": Stage(
                units={"alone": Unit({"red": _HERE, "green": -_HERE}, -0.1)},
                kernel=3,
                after=(("act0", nn.ReLU),),
            ),
            "conv1": Stage(
                units={"smooth": Unit({"alone": _MEAN})},
                kernel=3,
                after=(("act1", nn.ReLU), ("pool", lambda: nn.AdaptiveAvgPool2d(1)), _FLAT),
            ),
            "head": Stage(units={ANSWER: Unit({"smooth": 4.0})}),
        },
        channels=("red", "green"),
    ),
}


def drawings(num: int, num_channels: int, generator: torch.Generator) -> Tensor:
    """One filled rectangle on every channel: (num, channel, SIDE, SIDE), 0 or 1.

    It may touch the border, so that some drawings have no upper or no left edge.
    """
    places = torch.arange(SIDE)
    masks = []
    for _ in range(2):  # rows, then columns
        ends = torch.randint(0, SIDE + 1, (num, num_channels, 2), generator=generator)
        first, last = ends.amin(-1, keepdim=True), ends.amax(-1, keepdim=True)
        masks.append((places >= first) & (places < last))
    return (masks[0][..., :, None] & masks[1][..., None, :]).float()


def wire_cnn(name: str, seed: int = 0, num_pairs: int = 24) -> Wired:
    """The convolutional network of this kind."""
    kind = _of(CNNS, name)
    generator = generator_of(name, seed)
    inputs = lay_out(kind.channels, generator, dead_ends=1)
    module, wires, out = feed_forward(kind.stages, inputs, generator)
    clean, corrupt = (drawings(num_pairs, inputs.size, generator) for _ in range(2))
    return answering(
        f"{name}/{seed}",
        Family.CNN,
        module,
        wires,
        (clean, corrupt),
        (inputs, out),
        kind.description,
    )


# ---- recurrent networks -----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RecurrentKind:
    """A recurrent network's plan.

    Attributes:
        bits: features of every step.
        first: state units after the first step, from the features.
        cell: state units from the features and the state before.
        answer: the output, from the last state.
        driven: the cell reads features; if not, only the first step has any.
    """

    description: str
    bits: tuple[str, ...]
    first: Layer
    cell: Layer
    answer: Unit
    driven: bool = True


_STEPS = {"q1": -0.25, "q2": -0.75, "q3": -1.25, "q4": -1.75}
_EVER = {"q1": 2.0, "q2": -2.0}
_ODD = {"q1": 2.0, "q2": -2.0, "q3": -2.0, "q4": 2.0}
RECURRENT: dict[str, RecurrentKind] = {
    "latch": RecurrentKind(
        description="whether a bit was ever on",
        bits=("x",),
        first={q: Unit({"x": 1.0}, _STEPS[q]) for q in _EVER},
        cell={q: Unit({"x": 1.0, **_EVER}, _STEPS[q]) for q in _EVER},
        answer=Unit(_EVER),
    ),
    "toggle": RecurrentKind(
        description="whether a bit was on an odd number of times",
        bits=("x",),
        first={q: Unit({"x": 1.0} if q in _EVER else {}, _STEPS[q]) for q in _ODD},
        cell={q: Unit({"x": 1.0, **_ODD}, _STEPS[q]) for q in _ODD},
        answer=Unit(_ODD),
    ),
    "coincidence": RecurrentKind(
        description="how often two bits were on together",
        bits=("x", "y"),
        first={"now": Unit({"x": 1.0, "y": 1.0}, -1.5), "sum": Unit({}, 0.0)},
        cell={
            "now": Unit({"x": 1.0, "y": 1.0}, -1.5),
            "sum": Unit({"sum": 1.0, "now": 2.0}),
        },
        answer=Unit({"sum": 1.0, "now": 2.0}),
    ),
    "delay": RecurrentKind(
        description="a number handed from unit to unit, with no input after the first step",
        bits=("x", "y"),
        first={"at0": Unit({"x": 1.0, "y": 0.5}), **{f"at{n}": Unit({}) for n in (1, 2, 3)}},
        cell={
            "at0": Unit({}),
            **{f"at{n}": Unit({f"at{n - 1}": 1.0}) for n in range(1, NUM_STEPS)},
        },
        answer=Unit({f"at{NUM_STEPS - 1}": 1.0}),
        driven=False,
    ),
}


class Recurrent(nn.Module):
    """A rectified recurrent network, unrolled for a fixed number of steps.

    Shapes: (row, unit), where step t reads units t * num_features onwards (all
    features of step 0 only, where it is not driven); output (row, class).
    """

    def __init__(self, num_features: int, width: int, num_classes: int, driven: bool) -> None:
        super().__init__()
        self.num_features, self.driven = num_features, driven
        self.first = nn.Linear(num_features, width)
        self.cell = nn.Linear(width + num_features * driven, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.relu(self.first(x[:, : self.num_features]))
        for step in range(1, NUM_STEPS):
            start = step * self.num_features
            seen = [x[:, start : start + self.num_features]] if self.driven else []
            state = torch.relu(self.cell(torch.cat([*seen, state], 1)))
        output: Tensor = self.head(state)
        return output


def wire_recurrent(name: str, seed: int = 0, num_pairs: int = 32) -> Wired:
    """The recurrent network of this kind."""
    kind = _of(RECURRENT, name)
    generator = generator_of(name, seed)
    extra = int(torch.randint(2, 5, (), generator=generator))
    inputs = lay_out(kind.bits, generator, dead_ends=NUM_FEATURES - len(kind.bits))
    state = lay_out([*kind.first], generator, dead_ends=extra, silent=1, gains=GAINS)
    out = lay_out([ANSWER], generator, dead_ends=1)
    module = Recurrent(inputs.size, state.size, out.size, kind.driven).eval()
    reads = [inputs, state] if kind.driven else [state]
    first = write(module.first, kind.first, [inputs], state, generator)
    cell = write(module.cell, kind.cell, reads, state, generator)
    head = write(module.head, {ANSWER: kind.answer}, [state], out, generator)
    wires = [_step("first", "first", 0, nodes(INPUT, inputs.size), state.size, first)]
    for call in range(NUM_STEPS - 1):
        seen = nodes(INPUT, inputs.size, start=(call + 1) * inputs.size) if kind.driven else ()
        writers = (*seen, *wires[-1].outputs)
        wires.append(_step("cell", f"cell@{call}", call, writers, state.size, cell))
    wires.append(_step("head", "head", 0, wires[-1].outputs, out.size, head))
    num_inputs = inputs.size * (NUM_STEPS if kind.driven else 1)
    chance = 0.5 if kind.driven and name != "latch" else 0.3

    def draw() -> Tensor:
        x = torch.rand(num_pairs, num_inputs, generator=generator)
        return x.lt(chance).float() if kind.driven else x

    clean, corrupt = draw(), draw()
    return answering(
        f"{name}/{seed}",
        Family.RECURRENT,
        module,
        wires,
        (clean, corrupt),
        (inputs, out),
        kind.description,
    )


def _step(
    module: str,
    address: str,
    call: int,
    writers: tuple[Node, ...],
    num_outputs: int,
    true: frozenset[tuple[int, int]],
) -> Wire:
    return Wire(
        module=module,
        call=call,
        address=address,
        writers=writers,
        num_outputs=num_outputs,
        true=true,
    )


# ---- all of them ------------------------------------------------------------------


def answering(
    name: str,
    family: Family,
    module: nn.Module,
    wires: Sequence[Wire],
    pairs: tuple[Tensor, Tensor],
    spaces: tuple[Space, Space],
    description: str,
) -> Wired:
    """A network whose metric is its `ANSWER`; `spaces` are those of its input and output."""
    unit = spaces[1].places[ANSWER]
    return Wired(
        name=name,
        family=family,
        module=module,
        wires=tuple(wires),
        clean=pairs[0],
        corrupt=pairs[1],
        metric=OutputUnit(unit=unit, name=description),
        inputs=spaces[0].places,
        ends=(wires[-1].outputs[unit],),
        tolerance=TOLERANCE,
        description=description,
    )


KINDS: dict[str, Callable[[str, int], Wired]] = {
    **dict.fromkeys(MLPS, wire_mlp),
    **dict.fromkeys(CNNS, wire_cnn),
    **dict.fromkeys(RECURRENT, wire_recurrent),
}
"""How each kind is built, by its name."""


def wired(name: str, seed: int = 0) -> Wired:
    """The network of the kind `name`; see the module docstring.

    Raises:
        OptionError: there is no such kind.
    """
    return _of(KINDS, name)(name, seed)


def plant_layers(name: str, seed: int = 0) -> PlantedCircuit:
    """The planted circuit of the kind `name`, with its active edges.

    Raises:
        OptionError: there is no such kind.
    """
    return wired(name, seed).planted()


_T = TypeVar("_T")


def _of(kinds: Mapping[str, _T], name: str) -> _T:
    if name not in kinds:
        raise OptionError(f"no planted network '{name}'", nearest=nearest(name, kinds))
    return kinds[name]
