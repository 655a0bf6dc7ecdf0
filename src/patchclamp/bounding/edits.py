"""Edits of a network that is bounded: values rewritten where an edit acts.

An edit that fixes units (zero, patch, clamp to a value, mean of given activations) makes them
constants; one that shifts, scales or limits them is a rule of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from patchclamp.bounding.lowering import Rewrite
from patchclamp.core.edit_kinds import Clamp, Mean, Patch, Scale, Steer, Zero
from patchclamp.core.edits import Chosen, Edit, Frame, Index, choose
from patchclamp.core.errors import EditError
from patchclamp.core.sites import Tap
from patchclamp.model.inputs import BATCH
from patchclamp.rules.operators.builder import Builder, Operand, scaled, shape_of
from patchclamp.rules.operators.nonlinear import clamp
from patchclamp.rules.operators.parts import rewritten
from patchclamp.rules.value import Value


def part(
    tap: Tap, shape: tuple[int, ...], where: Mapping[str, Index]
) -> tuple[Tensor, Frame, Chosen]:
    """Flat numbers of the elements of a raw value that are meant, and how an edit sees them."""
    numbers = tap.view.read(torch.arange(math.prod(shape)).reshape(shape))
    frame = Frame(label=tap.label, axes=tap.axes)
    chosen = choose(numbers, frame, where)
    return chosen.of(numbers), frame, chosen


def editing(edit: Edit, tap: Tap) -> Rewrite:
    """What an edit does to a value of the lowered network.

    Raises:
        EditError: a kind of edit that has no rule, or whose result depends on the whole batch.
    """
    change = _changes(edit)

    def rewrite(b: Builder, x: Operand) -> Operand:
        index, frame, chosen = part(tap, shape_of(x), edit.where)
        return rewritten(b, x, index, lambda p: change(b, p, frame, chosen))

    return rewrite


_VALUES = {Patch: "values", Clamp: "value", Steer: "direction", Scale: "factor"}


def of_example(edit: Edit, tap: Tap, number: int, total: int) -> Edit:
    """The edit of one example, where what it puts has a row for each of them; else itself."""
    name = _VALUES.get(type(edit))
    given = None if name is None else getattr(edit, name)
    if given is None or total == 1 or hasattr(given, "dims") or isinstance(given, (int, float)):
        return edit
    tensor = torch.as_tensor(given)
    if tensor.ndim != len(tap.axes) or BATCH not in tap.axes:
        return edit
    at = tap.axes.index(BATCH)
    if tensor.shape[at] != total:
        return edit
    return dataclasses.replace(edit, **{str(name): tensor.narrow(at, number, 1)})  # type: ignore[arg-type]  # one of the edit's own fields


_Change = Callable[[Builder, Operand, Frame, Chosen], Operand]


def _changes(edit: Edit) -> _Change:
    given = (Zero, Patch) if not isinstance(edit, Mean) else (Mean,) * (edit.values is not None)
    if isinstance(edit, given) or (isinstance(edit, Clamp) and edit.value is not None):
        return lambda b, x, *at: _made(edit, torch.zeros, b, x, *at)
    if isinstance(edit, Clamp):
        return lambda b, x, *at: _limited(b, x, edit.low, edit.high)
    if isinstance(edit, Steer):
        return lambda b, x, *at: _moved(b, x, None, _made(edit, torch.zeros, b, x, *at))
    if isinstance(edit, Scale):
        return lambda b, x, *at: _moved(b, x, _made(edit, torch.ones, b, x, *at), None)
    raise EditError(
        f"the edit '{edit.kind}' on '{edit.site}' cannot be bounded",
        expected="zero, patch, clamp, steer, scale, or a mean of given values",
        hint="patch the values that it would put there",
    )


def _made(
    edit: Edit,
    start: Callable[..., Tensor],
    b: Builder,
    x: Operand,
    frame: Frame,
    chosen: Chosen,
) -> Tensor:
    """What the edit makes of zeros or ones, which says what it puts, adds or multiplies by."""
    shape = shape_of(x)
    return edit.new(start(shape, dtype=b.dtype), frame, chosen).to(b.dtype).expand(shape)


def _limited(b: Builder, x: Operand, low: float | None, high: float | None) -> Operand:
    return clamp(b, x, low, high) if isinstance(x, Value) else b.constant(x).clamp(low, high)


def _moved(b: Builder, x: Operand, factor: Tensor | None, shift: Tensor | None) -> Operand:
    if isinstance(x, Value):
        return scaled(b, x, factor, shift)
    moved = b.constant(x) if factor is None else b.constant(x) * factor
    return moved if shift is None else moved + shift
