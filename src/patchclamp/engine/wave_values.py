"""Where the arguments of a wavefront's operators come from: the batch, filled from the baseline.

The running batch may hold fewer variants than an operator is asked for, because later
sites had not been edited yet, and fewer rows, because rows before an edit keep the
baseline's values. Each `Fetch` completes one argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from patchclamp.engine.ir import Kind, Node
from patchclamp.engine.wave_packing import Packing, join_packed
from patchclamp.engine.wave_rows import (
    Axes,
    Layout,
    Rows,
    causal_mask,
    join_rows,
    narrow_rows,
    repeated,
    variant,
)
from patchclamp.model.inputs import BATCH


class Take(IntEnum):
    """Rows of a value that are computed: all, those from the first edited one, or one.

    PACKED: of every variant those from its own first edited one; see engine/wave_packing.py.
    """

    ALL = 0
    FROM = 1
    ONE = 2
    PACKED = 3


@dataclass
class State:
    """One run of a plan.

    Attributes:
        slots: values of the running batch.
        counts: variants of the sites so far, summed up; starts with 0.
        rows: what each `Take` stands for in this run (PACKED: what it lies within).
        values: the baseline's values and the constants.
        packing: where the rows of each variant lie; None where nothing is packed.
    """

    slots: list[object]
    rows: tuple[Rows, ...]
    layout: Layout
    values: Mapping[Node, object]
    device: torch.device
    packing: Packing | None = None
    counts: list[int] = field(default_factory=lambda: [0])
    masks: dict[Rows, torch.Tensor] = field(default_factory=dict)


class Fetch:
    """An argument that is looked up when a step runs."""

    __slots__ = ()

    def get(self, state: State) -> object:
        raise NotImplementedError

    def of_variant(self, state: State, k: int) -> object:
        """The argument for variant k alone."""
        raise NotImplementedError


class FromSlot(Fetch):
    """A value of the running batch, as it is; `item` picks a part."""

    __slots__ = ("axes", "item", "reach", "slot")

    def __init__(self, slot: int, reach: int, axes: Axes | None, item: int | None = None) -> None:
        self.slot, self.reach, self.axes, self.item = slot, reach, axes, item

    def get(self, state: State) -> object:
        value = state.slots[self.slot]
        return value if self.item is None else value[self.item]  # type: ignore[index]  # a tuple

    def of_variant(self, state: State, k: int) -> object:
        assert self.axes is not None
        value = self.get(state)
        assert isinstance(value, torch.Tensor)
        return variant(value, self.axes, k, state.counts[self.reach])


@dataclass(slots=True)
class Filled(Fetch):
    """A value of the running batch with variants and rows that it lacks from the baseline.

    Attributes:
        node: the value.
        slot: None where every variant takes the baseline's value.
        held, want: rows that are there, and that are asked for.
        held_reach, reach: how many sites the value goes up to, and how many are asked for.
    """

    node: Node
    slot: int | None
    axes: Axes
    held: Take
    want: Take
    held_reach: int
    reach: int

    def get(self, state: State) -> torch.Tensor:
        return self._made(state, state.counts[self.reach])

    def of_variant(self, state: State, k: int) -> object:
        total = state.counts[self.reach]
        return variant(self._made(state, total), self.axes, k, total)

    def _made(self, state: State, total: int) -> torch.Tensor:
        want, held = state.rows[self.want], state.rows[self.held]
        num = 0 if self.slot is None else state.counts[self.held_reach]
        if self.want is Take.PACKED or (num and self.held is Take.PACKED):
            return self._of_packing(state, num, total)
        if num == 0:
            return self._from_base(state, want, total)
        value = self._value(state)
        if want != held and want.start >= held.start:
            value, held = narrow_rows(value, self.axes, held, want), want
        if num < total and self.axes.batch is not None:
            rest = self._from_base(state, held, total - num)
            value = torch.cat([value, rest], self.axes.batch)
        if want != held:
            before = Rows(want.start, held.start)
            front = self._from_base(state, before, total)
            value = join_rows(front, value, self.axes, (before.size, held.size))
        return value

    def _of_packing(self, state: State, num: int, total: int) -> torch.Tensor:
        """A packed value, or a plain one from a packed one."""
        packing = state.packing
        base = state.values.get(self.node)  # there wherever something has to be filled up
        assert packing is not None
        assert base is None or isinstance(base, torch.Tensor)
        if num == 0 or self.axes.row is None:
            assert base is not None
            return packing.of_base(base, self.axes, 0, total)
        value = self._value(state)
        if self.held is not Take.PACKED:
            value = packing.packed(value, self.axes, state.rows[self.held], num)
        if num < total:
            assert base is not None
            rest = packing.of_base(base, self.axes, num, total)
            value = join_packed([value, rest], self.axes)
        if self.want is Take.PACKED:
            return value
        return packing.unpacked(value, base, self.axes, state.rows[self.want], total)

    def _value(self, state: State) -> torch.Tensor:
        assert self.slot is not None
        value = state.slots[self.slot]
        assert isinstance(value, torch.Tensor)
        return value

    def _from_base(self, state: State, rows: Rows, num: int) -> torch.Tensor:
        base = state.values[self.node]
        assert isinstance(base, torch.Tensor)
        part = narrow_rows(base, self.axes, state.layout.all, rows)
        return repeated(part, self.axes, num, state.layout.num_examples)


@dataclass(slots=True)
class FromBase(Fetch):
    """A constant, or a value that all variants share."""

    node: Node

    def get(self, state: State) -> object:
        return state.values[self.node]

    def of_variant(self, state: State, k: int) -> object:
        return state.values[self.node]


@dataclass(slots=True)
class Size(Fetch):
    """A size, for the present variants and rows."""

    node: Node
    take: Take
    reach: int

    def get(self, state: State) -> object:
        return self._size(state, state.counts[self.reach])

    def of_variant(self, state: State, k: int) -> object:
        return self._size(state, 1)

    def _size(self, state: State, num: int) -> int:
        layout = state.layout
        if self.take is Take.PACKED:
            assert state.packing is not None
            return layout.size(self.node, 1, state.packing.num_rows(num))
        return layout.size(self.node, num * layout.num_examples, state.rows[self.take].size)


@dataclass(slots=True)
class Mask(Fetch):
    """The causal mask of the rows that are computed."""

    take: Take

    def get(self, state: State) -> object:
        rows = state.rows[self.take]
        if rows not in state.masks:
            state.masks[rows] = causal_mask(rows, state.layout.length, state.device)
        return state.masks[rows]

    def of_variant(self, state: State, k: int) -> object:
        return self.get(state)


def collapsed(base: object, node: Node, layout: Layout) -> object:
    """One row of a value that is the same for all examples (masks, positions): no copies of it."""
    if not isinstance(base, torch.Tensor) or node.kind is Kind.CONST or node.shape is None:
        return base
    axes = layout.parts(node)[None]
    if axes.batch is None or base.shape[axes.batch] == 1 or node.shape[axes.batch] != BATCH:
        return base
    first = base.narrow(axes.batch, 0, 1)
    return first if bool((base == first).all()) else base
