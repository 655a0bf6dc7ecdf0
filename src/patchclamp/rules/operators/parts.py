"""Part of a value replaced: by edits, by something perturbed, by a scattered write."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from patchclamp.rules.layout import Reshape, joined, moved
from patchclamp.rules.operators.builder import Builder, Operand, shape_of
from patchclamp.rules.value import Value


def taken(b: Builder, x: Operand, index: Tensor) -> Operand:
    """The elements with these flat numbers, in the shape of `index`."""
    if isinstance(x, Value):
        return b.add(moved(x.shape, lambda t: t.flatten()[index]), x)
    return b.constant(x).flatten()[index]


def replaced(b: Builder, x: Operand, index: Tensor, new: Operand) -> Operand:
    """x with its elements `index` (flat numbers, each at most once) replaced by `new`."""
    shape, flat = shape_of(x), index.flatten()
    size = math.prod(shape)
    rest = torch.ones(size, dtype=torch.bool)
    rest[flat] = False
    others = rest.nonzero().flatten()

    def write(parts: Sequence[Tensor]) -> Tensor:
        made = torch.empty(size, dtype=parts[0].dtype)
        made[flat] = parts[0].flatten()
        made[others] = parts[1].flatten()
        return made.reshape(shape)

    if not isinstance(x, Value) and not isinstance(new, Value):
        return write([b.constant(new).expand(index.shape), b.constant(x).flatten()[others]])
    if isinstance(new, Value) and torch.equal(flat, torch.arange(size)):
        return new if new.shape == shape else b.add(Reshape(new.shape, shape), new)
    if not isinstance(new, Value) and len(others) == 0:
        return write([b.constant(new).expand(index.shape), torch.empty(0, dtype=b.dtype)])
    kept = taken(b, x, others)
    parts = [p if isinstance(p, Value) else b.constant(p) for p in (new, kept)]
    if not isinstance(new, Value):
        parts[0] = b.constant(new).expand(index.shape)
    rule = joined([p.shape if isinstance(p, Value) else p for p in parts], write, b.dtype)
    return b.add(rule, *(p for p in parts if isinstance(p, Value)))


def rewritten(
    b: Builder, x: Operand, index: Tensor, change: Callable[[Operand], Operand]
) -> Operand:
    """x with its elements `index` replaced by what `change` makes of them."""
    return replaced(b, x, index, change(taken(b, x, index)))
