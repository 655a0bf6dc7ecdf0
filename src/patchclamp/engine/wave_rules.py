"""Which part of an operator a wavefront may leave out: rules found by trying, on the baseline.

Two questions are asked of every operator, with the baseline's own values slightly
changed. Does it treat the variants in its batch apart from each other? And can some of
its rows (positions) be computed from the same rows of its arguments, with which
arguments sliced and which in full (queries are sliced, keys and values are not)? An
operator that mixes positions is asked a third one for every cut that is used: do rows
before the cut stay the same when rows from the cut on change? Operators of the same kind
on values of the same shape share their answers, because layers repeat; those that mix
positions share the first two only, and fused attention with one mask all three.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from patchclamp.engine.ir import Kind, Node
from patchclamp.engine.wave_packing import flat_rows, spread_rows
from patchclamp.engine.wave_rows import (
    Axes,
    Layout,
    Rows,
    Values,
    execute,
    execute_packed,
    join_rows,
    narrow_rows,
    variant,
)
from patchclamp.model.inputs import BATCH

_TRY = (RuntimeError, IndexError, ValueError, TypeError)
"""What an operator may raise when it is handed part of its arguments."""
_MAX_ROW_SOURCES = 5
"""More arguments with rows than this are not searched for a rule (2^n trials)."""


@dataclass(frozen=True)
class Rule:
    """How an operator may be run.

    Attributes:
        separable: several variants in one batch give what each gives alone.
        sliced: for each source, whether its rows are cut to those asked for; None where the
            operator has to compute every row.
        mixes: rows may depend on other rows, so that every cut has to be checked.
        packs: rows of all variants may lie in one row axis (engine/wave_packing.py).
    """

    separable: bool
    sliced: tuple[bool, ...] | None
    mixes: bool
    packs: bool = False


def signature(node: Node, layout: Layout) -> Hashable:
    """Equal for operators that may share a rule.

    Values of whole numbers and masks are told apart by identity: an index decides what an
    operator does. Floating values and weights only scale.
    """
    order = {x: n for n, x in enumerate(layout.inputs(node))}

    def describe(x: object) -> Hashable:
        if isinstance(x, (list, tuple)):
            return tuple(describe(i) for i in x)
        if not isinstance(x, Node):
            return repr(x)
        if x.dtype is not None and x.dtype.is_floating_point:
            return x.kind is Kind.CONST, order[x], x.shape, x.dtype
        return order[x], id(x)

    return node.target, describe(node.args), *node.kwargs, describe(tuple(node.kwargs.values()))


def find_rule(node: Node, values: Values, layout: Layout, device: torch.device) -> Rule:
    """Try the operator on parts of its arguments; see the module docstring."""
    read = layout.sources(node)
    noisy = {**values, **{x: _scaled(values[x], n) for n, x in enumerate(read)}}
    whole = _parts_of(execute(node, noisy, layout, 1, layout.all, device), node, layout)
    separable = _is_separable(node, values, noisy, whole, layout, device)
    sliced, local = None, False
    rowed = [x for x in read if layout.has_rows(x)]
    if layout.has_rows(node) and layout.length > 1 and 0 < len(rowed) <= _MAX_ROW_SOURCES:
        for chosen in _choices(len(rowed)):
            cut = {x for x, on in zip(rowed, chosen, strict=True) if on}
            if _rows_agree(node, noisy, cut, whole, layout, device):
                sliced, local = tuple(x in cut for x in read), len(cut) == len(rowed)
                break
    packs = separable and local and _packs(node, values, noisy, layout, device)
    return Rule(separable, sliced, mixes=layout.has_rows(node) and not local, packs=packs)


def _choices(num: int) -> Iterator[tuple[bool, ...]]:
    """Which sources are sliced, most of them first, at least one."""
    every = itertools.product((True, False), repeat=num)
    return iter(sorted((c for c in every if any(c)), key=lambda c: -sum(c)))


def stays_causal(
    node: Node,
    values: Values,
    layout: Layout,
    edited: Collection[Node],
    cut: int,
    device: torch.device,
) -> bool:
    """Whether rows before the cut keep their value when rows of `edited` from it on change."""
    before = Rows(0, cut)
    changed: dict[Node, object] = {}
    for n, x in enumerate(edited):
        value = values[x]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return False  # whole numbers cannot be varied a little, so nothing is known
        axes = layout.parts(x)[None]
        keep = narrow_rows(value, axes, layout.all, before)
        scaled = _tensor(_scaled(value, n))
        after = narrow_rows(scaled, axes, layout.all, Rows(cut, layout.length))
        changed[x] = join_rows(keep, after, axes, (cut, layout.length - cut))
    plain = _parts_of(execute(node, values, layout, 1, layout.all, device), node, layout)
    moved = {**values, **changed}
    made = _parts_of(execute(node, moved, layout, 1, layout.all, device), node, layout)
    return all(
        _agree(
            narrow_rows(made[i], axes, layout.all, before),
            narrow_rows(plain[i], axes, layout.all, before),
            rounding=10,
        )
        for i, axes in layout.parts(node).items()
    )


def _scaled(value: object, seed: int) -> object:
    """A floating value with every entry scaled by its own factor, so that masks stay masks."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    generator = torch.Generator().manual_seed(seed)
    factor = torch.rand(value.shape, generator=generator).mul_(0.5).add_(0.75)
    return value * factor.to(value)


def _parts_of(made: object, node: Node, layout: Layout) -> dict[int | None, torch.Tensor]:
    return {i: _tensor(made if i is None else made[i]) for i in layout.parts(node)}  # type: ignore[index]  # a tuple of tensors


def _tensor(x: object) -> torch.Tensor:
    assert isinstance(x, torch.Tensor)
    return x


def _is_separable(
    node: Node,
    values: Values,
    noisy: Values,
    whole: Mapping[int | None, torch.Tensor],
    layout: Layout,
    device: torch.device,
) -> bool:
    doubled: dict[Node, object] = dict(values)
    for x in layout.sources(node):
        if x.shape is None or layout.parts(x)[None].batch is None:
            doubled[x] = noisy[x]
            continue
        axis = layout.parts(x)[None].batch
        assert axis is not None
        doubled[x] = torch.cat([_tensor(noisy[x]), _tensor(values[x])], axis)
    single = {**values, **{x: noisy[x] for x in doubled if layout_free(x, layout)}}
    try:
        both = _parts_of(execute(node, doubled, layout, 2, layout.all, device), node, layout)
        plain = _parts_of(execute(node, single, layout, 1, layout.all, device), node, layout)
    except _TRY:
        return False
    for i, axes in layout.parts(node).items():
        if axes.batch is None:
            return False
        if both[i].shape[axes.batch] != 2 * whole[i].shape[axes.batch]:
            return False
        pair = (variant(both[i], axes, k, 2) for k in (0, 1))
        if not all(_agree(a, b[i]) for a, b in zip(pair, (whole, plain), strict=True)):
            return False
    return True


def _packs(node: Node, values: Values, noisy: Values, layout: Layout, device: torch.device) -> bool:
    """Whether the rows of two batches, one after the other in a batch of one, give the same."""
    given: dict[Node, object] = dict(values)
    for x in layout.sources(node):
        axes = layout.parts(x).get(None)
        if axes is None or not _is_plain(x.shape, axes):
            return False
        if axes.row is None:
            given[x] = noisy[x]  # shared by all variants
        else:
            pair = [_one_row_axis(_tensor(v[x]), axes) for v in (noisy, values)]
            if axes.batch is None:  # every example of both batches shares these rows
                pair = [_tensor(noisy[x])] * (2 * layout.num_examples)
            given[x] = torch.cat(pair, axes.row)
    shapes = [node.shape] if node.shape is not None else []
    if any(not _is_plain(s, a) for s, a in zip(shapes, layout.parts(node).values(), strict=False)):
        return False
    num_rows = 2 * layout.num_examples * layout.length
    plain = {**values, **{x: noisy[x] for x in layout.sources(node) if layout_free(x, layout)}}
    try:
        made = _parts_of(execute_packed(node, given, layout, num_rows), node, layout)
        parts = [
            _parts_of(execute(node, v, layout, 1, layout.all, device), node, layout)
            for v in (noisy, plain)
        ]
    except _TRY:
        return False
    return all(
        axes.batch is not None
        and axes.row is not None
        and _agree(made[i], torch.cat([_one_row_axis(p[i], axes) for p in parts], axes.row))
        for i, axes in layout.parts(node).items()
    )


def _is_plain(shape: Sequence[int | str] | None, axes: Axes) -> bool:
    """Whether every example is one entry of the batch axis; values without rows must be shared."""
    if shape is None or axes.row is None:
        return shape is not None and axes.batch is None
    return axes.merged or axes.batch is None or shape[axes.batch] == BATCH


def _one_row_axis(x: torch.Tensor, axes: Axes) -> torch.Tensor:
    """A value with its examples one after the other along the row axis of a batch of one."""
    assert axes.row is not None
    if axes.merged or axes.batch is None:
        return x
    return spread_rows(flat_rows(x, axes), axes)


def layout_free(node: Node, layout: Layout) -> bool:
    """Whether a value has no batch axis, so that all variants share it."""
    return node.shape is not None and layout.parts(node)[None].batch is None


def _rows_agree(
    node: Node,
    values: Values,
    cut: set[Node],
    whole: Mapping[int | None, torch.Tensor],
    layout: Layout,
    device: torch.device,
) -> bool:
    """Whether three pieces of the rows, each computed by itself, are the whole."""
    length = layout.length
    ends = sorted({0, 1, max(1, length // 2), length})
    for start, stop in itertools.pairwise(ends):
        rows = Rows(start, stop)
        given = dict(values)
        for x in cut:
            given[x] = _narrowed(values[x], layout.parts(x), layout.all, rows)
        try:
            made = _parts_of(execute(node, given, layout, 1, rows, device), node, layout)
        except _TRY:
            return False
        for i, axes in layout.parts(node).items():
            if not _agree(made[i], narrow_rows(whole[i], axes, layout.all, rows)):
                return False
    return True


def _narrowed(value: object, parts: Mapping[int | None, Axes], have: Rows, want: Rows) -> object:
    if isinstance(value, torch.Tensor):
        return narrow_rows(value, parts[None], have, want)
    assert isinstance(value, (tuple, list))
    return [narrow_rows(x, parts[i], have, want) if i in parts else x for i, x in enumerate(value)]


def _agree(got: torch.Tensor, expected: torch.Tensor, *, rounding: float = 1000) -> bool:
    """Equal up to so many roundings of the largest value (never more than 3%)."""
    if got.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    finite = expected[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    near = min(0.03, rounding * torch.finfo(expected.dtype).eps) * scale
    return bool(torch.isclose(got, expected, rtol=0.0, atol=near, equal_nan=True).all())
