"""Recurrent layers unrolled over time: every step is linear layers, gates and products.

Sequences are (length, batch, unit) inside, or (batch, length, unit) with `batch_first`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from patchclamp.rules.layout import moved
from patchclamp.rules.operators.arithmetic import add, mul, sub
from patchclamp.rules.operators.builder import Build, Builder, Operand, shape_of
from patchclamp.rules.operators.matrices import linear
from patchclamp.rules.operators.moving import concatenated, stacked
from patchclamp.rules.relu import ReLU
from patchclamp.rules.s_shaped import Sigmoid, Tanh
from patchclamp.rules.value import Value

State = tuple[Operand, ...]
"""Hidden state; for an LSTM hidden and cell state."""

Weights = tuple[Operand, Operand, "Operand | None", "Operand | None"]
"""Of the input, of the hidden state, and their biases."""

Cell = Callable[[Builder, Operand, State, Weights], State]
"""One step."""


def _tensor(b: Builder, x: Operand) -> Tensor:
    if isinstance(x, Value):
        raise b.refuse("a mixture of perturbed and constant states")
    return b.constant(x)


def _act(b: Builder, kind: type[Sigmoid | Tanh | ReLU], x: Operand) -> Operand:
    if isinstance(x, Value):
        return b.add(kind(x.shape), x)
    return kind(shape_of(x)).forward(_tensor(b, x)[None])[0]


def _product(b: Builder, x: Operand, y: Operand) -> Operand:
    if isinstance(x, Value) or isinstance(y, Value):
        return mul(b, x, y)
    return _tensor(b, x) * _tensor(b, y)


def _sum(b: Builder, x: Operand, y: Operand) -> Operand:
    if isinstance(x, Value) or isinstance(y, Value):
        return add(b, x, y)
    return _tensor(b, x) + _tensor(b, y)


def _layer(b: Builder, x: Operand, weight: Operand, bias: Operand | None) -> Operand:
    if any(isinstance(c, Value) for c in (x, weight, bias)):
        if isinstance(x, Value) or isinstance(weight, Value):
            return linear(b, x, weight, bias)
        fixed = torch.nn.functional.linear(_tensor(b, x), _tensor(b, weight))
        return add(b, fixed, bias) if bias is not None else fixed
    return torch.nn.functional.linear(
        _tensor(b, x), _tensor(b, weight), None if bias is None else _tensor(b, bias)
    )


def _moved(b: Builder, x: Operand, function: Callable[[Tensor], Tensor]) -> Operand:
    return b.add(moved(x.shape, function), x) if isinstance(x, Value) else function(_tensor(b, x))


def _gates(b: Builder, x: Operand, num: int) -> list[Operand]:
    width = shape_of(x)[-1] // num
    return [_moved(b, x, lambda t, i=i: t.narrow(-1, i * width, width)) for i in range(num)]  # type: ignore[misc]  # i is bound here


def _lstm(b: Builder, x: Operand, state: State, weights: Weights) -> State:
    h, c = state
    total = _sum(b, _layer(b, x, weights[0], weights[2]), _layer(b, h, weights[1], weights[3]))
    i, f, g, o = _gates(b, total, 4)
    gated = _product(b, _act(b, Sigmoid, i), _act(b, Tanh, g))
    c = _sum(b, _product(b, _act(b, Sigmoid, f), c), gated)
    return _product(b, _act(b, Sigmoid, o), _act(b, Tanh, c)), c


def _gru(b: Builder, x: Operand, state: State, weights: Weights) -> State:
    (h,) = state
    from_x = _gates(b, _layer(b, x, weights[0], weights[2]), 3)
    from_h = _gates(b, _layer(b, h, weights[1], weights[3]), 3)
    r = _act(b, Sigmoid, _sum(b, from_x[0], from_h[0]))
    z = _act(b, Sigmoid, _sum(b, from_x[1], from_h[1]))
    n = _act(b, Tanh, _sum(b, from_x[2], _product(b, r, from_h[2])))
    if isinstance(h, Value) or isinstance(n, Value):
        away: Operand = sub(b, h, n)
    else:
        away = _tensor(b, h) - _tensor(b, n)
    return (_sum(b, n, _product(b, z, away)),)


def _plain(kind: type[Tanh | ReLU]) -> Cell:
    def step(b: Builder, x: Operand, state: State, weights: Weights) -> State:
        from_x = _layer(b, x, weights[0], weights[2])
        return (_act(b, kind, _sum(b, from_x, _layer(b, state[0], weights[1], weights[3]))),)

    return step


def _unrolled(
    b: Builder,
    cell: Cell,
    steps: Sequence[Operand],
    states: list[tuple[Operand, ...]],
    weights: Sequence[Weights],
    both_ways: bool,
) -> tuple[list[Operand], list[State]]:
    """Layer by layer, each forwards and perhaps backwards: outputs by step, last states."""
    last: list[State] = []
    ways = 2 if both_ways else 1
    for layer in range(len(weights) // ways):
        made: list[list[Operand]] = []
        for way in range(ways):
            state = states[layer * ways + way]
            order = range(len(steps)) if way == 0 else range(len(steps) - 1, -1, -1)
            outputs: list[Operand] = [0.0] * len(steps)
            for t in order:
                state = cell(b, steps[t], state, weights[layer * ways + way])
                outputs[t] = state[0]
            last.append(state)
            made.append(outputs)
        steps = made[0] if ways == 1 else [_joined(b, pair) for pair in zip(*made, strict=True)]
    return list(steps), last


def _joined(b: Builder, parts: Sequence[Operand]) -> Operand:
    if any(isinstance(p, Value) for p in parts):
        return concatenated(b, list(parts), -1)
    return torch.cat([_tensor(b, p) for p in parts], -1)


def _stacked(b: Builder, parts: Sequence[Operand], axis: int) -> Operand:
    if any(isinstance(p, Value) for p in parts):
        return stacked(b, list(parts), axis)
    return torch.stack([_tensor(b, p) for p in parts], axis)


def layered(cell: Cell, num_states: int) -> Build:
    """The builder of a recurrent layer: (x, states, weights, has_biases, ...)."""

    def build(
        b: Builder,
        x: Operand,
        given: Operand | Sequence[Operand],
        weights: Sequence[Operand],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> list[Operand]:
        """Unrolled over time: linear layers, gates and products."""
        per_layer = 4 if has_biases else 2
        num = num_layers * (2 if bidirectional else 1)
        if (train and dropout) or len(weights) != per_layer * num:
            raise b.refuse("a recurrent layer with dropout or with a projection")
        sets: list[Weights] = []
        for i in range(num):
            own = [*weights[i * per_layer : (i + 1) * per_layer], None, None]
            sets.append((own[0], own[1], own[2], own[3]))  # type: ignore[arg-type]  # weights come first
        first = [given] if isinstance(given, (Value, Tensor)) else list(given)  # type: ignore[arg-type]  # several states
        states = [
            tuple(_moved(b, s, lambda t, i=i: t.select(0, i)) for s in first[:num_states])  # type: ignore[misc]  # i is bound here
            for i in range(num)
        ]
        axis = len(shape_of(x)) - 2 if batch_first else 0
        steps = [
            _moved(b, x, lambda t, i=i: t.select(axis, i))  # type: ignore[misc]  # i is bound here
            for i in range(shape_of(x)[axis])
        ]
        outputs, last = _unrolled(b, cell, steps, states, sets, bidirectional)
        ends = [_stacked(b, [s[k] for s in last], 0) for k in range(num_states)]
        return [_stacked(b, outputs, axis), *ends]

    return build


def single(cell: Cell, num_states: int) -> Build:
    """The builder of one step: (x, states, weights of the input, of the state, biases)."""

    def build(
        b: Builder,
        x: Operand,
        given: Operand | Sequence[Operand],
        of_input: Operand,
        of_state: Operand,
        bias_input: Operand | None = None,
        bias_state: Operand | None = None,
    ) -> Operand | list[Operand]:
        """One step of a recurrent layer."""
        state = (given,) if isinstance(given, (Value, Tensor)) else tuple(given)  # type: ignore[arg-type]  # several states
        made = cell(b, x, state, (of_input, of_state, bias_input, bias_state))
        return made[0] if num_states == 1 else list(made)

    return build


aten = torch.ops.aten

RECURRENT: dict[object, Build] = {
    aten.lstm.input: layered(_lstm, 2),
    aten.gru.input: layered(_gru, 1),
    aten.rnn_tanh.input: layered(_plain(Tanh), 1),
    aten.rnn_relu.input: layered(_plain(ReLU), 1),
    aten.lstm_cell.default: single(_lstm, 2),
    aten.gru_cell.default: single(_gru, 1),
    aten.rnn_tanh_cell.default: single(_plain(Tanh), 1),
    aten.rnn_relu_cell.default: single(_plain(ReLU), 1),
}
