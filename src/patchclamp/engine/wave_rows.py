"""Which part of an operator a wavefront may leave out: rules found by trying, on the baseline.

Two questions are asked of every operator, with the baseline's own values slightly
changed. Does it treat the variants in its batch apart from each other? And can some of
its rows (positions) be computed from the same rows of its arguments, with which
arguments sliced and which in full (queries are sliced, keys and values are not)? An
operator that mixes positions is asked a third one for every cut that is used: do rows
before the cut stay the same when rows from the cut on change? Operators of the same kind
on values of the same shape share their answers, because layers repeat; those that mix
positions share the first two only.

Rows are positions along an axis of symbolic size "length"; `batch*length` in one axis
(a flattened sequence) counts too.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import sympy
import torch

from patchclamp.core.errors import EngineError
from patchclamp.engine.attention import attention_scores, fused_options
from patchclamp.engine.ir import Graph, Kind, Node
from patchclamp.model.inputs import BATCH, LENGTH

_ATEN = torch.ops.aten
_SWAPPED: dict[object, Callable[..., object]] = {
    _ATEN.view.default: torch.reshape,
    _ATEN._unsafe_view.default: torch.reshape,
}
"""`view` becomes `reshape`: rows that were put together lie differently in memory."""
_TRY = (RuntimeError, IndexError, ValueError, TypeError)
"""What an operator may raise when it is handed part of its arguments."""
_MAX_ROW_SOURCES = 5
"""More arguments with rows than this are not searched for a rule (2^n trials)."""


class Rows(NamedTuple):
    """Positions `start` to `stop`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Axes(NamedTuple):
    """Where a value has its batch and its rows; `merged` if one axis holds both."""

    batch: int | None
    row: int | None
    merged: bool = False


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


class Layout:
    """Symbolic shapes of a graph, for any number of variants and rows.

    Attributes:
        num_examples: examples in the baseline's batch.
        length: positions; 0 for a network without an axis of varying length.
    """

    def __init__(self, graph: Graph, symbols: Mapping[str, int]) -> None:
        self._symbols = dict(symbols)
        if BATCH not in symbols:
            raise EngineError(
                "the graph was captured with a fixed batch, so variants cannot be put into it",
                hint="open the network with two or more example inputs, or use engine='hooks'",
            )
        self.num_examples, self.length = symbols[BATCH], symbols.get(LENGTH, 0)
        self._axes: dict[Node, dict[int | None, Axes]] = {}
        self._sizes: dict[tuple[str, int, int], int] = {}
        items: dict[Node, list[Node]] = {}
        for node in graph.nodes:
            if node.target is operator.getitem and isinstance(node.args[0], Node):
                items.setdefault(node.args[0], []).append(node)
        self._items = items
        self._counts: set[Node] = set()
        self._inputs = {
            node: tuple(dict.fromkeys(leaf_nodes((node.args, *node.kwargs.values()))))
            for node in graph.nodes
        }
        for node in graph.nodes:  # in order, so that what a size is made from comes first
            inputs = self._inputs[node]
            made = inputs and all(i in self._counts for i in inputs)
            scalar = node.kind is Kind.OP and node.shape is None
            if scalar and (node.target is _ATEN.sym_size.int or made):
                self._counts.add(node)
        self._sources = {
            node: [x for x in read if x.kind is not Kind.CONST and x not in self._counts]
            for node, read in self._inputs.items()
        }

    @property
    def all(self) -> Rows:
        """Every position."""
        return Rows(0, self.length)

    def inputs(self, node: Node) -> tuple[Node, ...]:
        """The nodes among the arguments, each once."""
        return self._inputs[node]

    def sources(self, node: Node) -> list[Node]:
        """The values among them, without constants and sizes."""
        return self._sources[node]

    def is_size(self, node: Node) -> bool:
        """Whether a node is a whole number made from sizes."""
        return node in self._counts

    def parts(self, node: Node) -> dict[int | None, Axes]:
        """Axes of a value, or of every used part of a value that holds several."""
        if node not in self._axes:
            found: dict[int | None, Axes] = {
                int(str(item.args[1])): _axes(item.shape)
                for item in self._items.get(node, ())
                if item.shape is not None
            }
            self._axes[node] = found if node.shape is None else {None: _axes(node.shape)}
        return self._axes[node]

    def has_rows(self, node: Node) -> bool:
        """Whether a value (every part of it) has a row axis."""
        parts = self.parts(node)
        return bool(parts) and self.length > 0 and all(a.row is not None for a in parts.values())

    def dim(self, size: int | str, batch: int, length: int) -> int:
        """A symbolic size for so many rows of the batch and so many positions."""
        if isinstance(size, int):
            return size
        if size in (BATCH, LENGTH):
            return batch if size == BATCH else length
        key = (size, batch, length)
        if key not in self._sizes:
            given = {**self._symbols, BATCH: batch, LENGTH: length}
            try:
                self._sizes[key] = int(sympy.sympify(size, locals=_symbols(given)).subs(given))
            except (TypeError, ValueError, sympy.SympifyError) as e:
                raise EngineError(
                    f"the size '{size}' inside the graph cannot be worked out: {e}",
                    hint="use engine='hooks'",
                ) from e
        return self._sizes[key]

    def size(self, node: Node, batch: int, length: int) -> int:
        """Value of a size node for so many rows of the batch and so many positions."""
        if node.target is _ATEN.sym_size.int:
            source, axis = node.args[:2]
            assert isinstance(source, Node)
            assert isinstance(axis, int)
            shape = source.shape or ()
            return self.dim(shape[axis], batch, length)
        args = filled(node.args, lambda x: self.size(x, batch, length))
        assert node.target is not None
        return int(str(node.target(*args)))

    def numel(self, node: Node, num_variants: int, length: int) -> int:
        """Elements of a value (all its used parts) with so many variants and positions."""
        batch = num_variants * self.num_examples
        shapes = [node.shape] if node.shape is not None else []
        shapes += [i.shape for i in self._items.get(node, ()) if i.shape is not None]
        total = 0
        for shape in shapes:
            count = 1
            for size in shape:
                count *= self.dim(size, batch, length)
            total += count
        return total


def leaf_nodes(x: object) -> Iterator[Node]:
    """The nodes in nested arguments."""
    if isinstance(x, Node):
        yield x
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from leaf_nodes(item)


def filled(args: Iterable[object], value: Callable[[Node], object]) -> list[object]:
    """Arguments with their nodes replaced; many times faster than a general tree."""
    return [
        value(x) if isinstance(x, Node) else filled(x, value) if isinstance(x, (list, tuple)) else x
        for x in args
    ]


def _symbols(given: Mapping[str, int]) -> dict[str, sympy.Symbol]:
    return {name: sympy.Symbol(name) for name in given}


def _axes(shape: Sequence[int | str]) -> Axes:
    batch = next((i for i, d in enumerate(shape) if re.search(rf"\b{BATCH}\b", str(d))), None)
    row = next((i for i, d in enumerate(shape) if d == LENGTH), None)
    if row is None and batch is not None and shape[batch] == f"{BATCH}*{LENGTH}":
        return Axes(batch, batch, merged=True)
    return Axes(batch, row)


# ---- rows and variants of one value -------------------------------------------


def narrow_rows(x: torch.Tensor, axes: Axes, have: Rows, want: Rows) -> torch.Tensor:
    """The wanted rows of a value that holds the rows `have`."""
    if axes.row is None or have == want:
        return x
    if axes.merged:
        apart: torch.Tensor = x.unflatten(axes.row, (-1, have.size))
        part: torch.Tensor = apart.narrow(axes.row + 1, want.start - have.start, want.size)
        return part.flatten(axes.row, axes.row + 1)
    return x.narrow(axes.row, want.start - have.start, want.size)


def touched_rows(moved: torch.Tensor, axes: Axes, rows: Rows) -> torch.Tensor:
    """Which rows of which examples hold anything true: (example, row)."""
    assert axes.row is not None
    if axes.merged:
        apart = moved.movedim(axes.row, 0).unflatten(0, (-1, rows.size))
    else:
        assert axes.batch is not None
        apart = moved.movedim((axes.batch, axes.row), (0, 1))
    return apart.flatten(2).any(2) if apart.ndim > 2 else apart


def join_rows(
    before: torch.Tensor, x: torch.Tensor, axes: Axes, sizes: Sequence[int]
) -> torch.Tensor:
    """Rows put in front of others."""
    assert axes.row is not None
    if axes.merged:
        apart = [p.unflatten(axes.row, (-1, n)) for p, n in zip((before, x), sizes, strict=True)]
        return torch.cat(apart, axes.row + 1).flatten(axes.row, axes.row + 1)
    return torch.cat([before, x], axes.row)


def repeated(base: torch.Tensor, axes: Axes, num_variants: int, num_examples: int) -> torch.Tensor:
    """The baseline's value for so many variants: without a copy where one row serves all."""
    if axes.batch is None:
        return base
    if base.shape[axes.batch] == 1:
        num_variants *= num_examples
        return base.expand([num_variants if i == axes.batch else -1 for i in range(base.ndim)])
    if num_variants == 1:
        return base
    return base.repeat([num_variants if i == axes.batch else 1 for i in range(base.ndim)])


def variant(x: torch.Tensor, axes: Axes, k: int, num_variants: int) -> torch.Tensor:
    """Variant k of a value that holds so many."""
    if axes.batch is None:
        return x
    size = x.shape[axes.batch] // num_variants
    return x.narrow(axes.batch, k * size, size)


# ---- running one operator ------------------------------------------------------


def is_causal(node: Node) -> bool:
    """Whether an operator is attention that makes its own causal mask."""
    if node.target is _ATEN.scaled_dot_product_attention.default:
        mask, causal, _, _ = fused_options(node)
        return causal and mask is None
    return node.target is attention_scores and bool(node.args[3])


def operator_for(
    node: Node, allowed: object | None
) -> tuple[Callable[..., object], tuple[object, ...], dict[str, object]]:
    """What is called for an operator, and its arguments, which are still nodes.

    Args:
        allowed: for causal attention with fewer queries than keys, what takes the place of
            its own mask, which would be aligned to the first key; see `causal_mask`.
    """
    assert node.target is not None
    if allowed is None or not is_causal(node):
        return _SWAPPED.get(node.target, node.target), node.args, node.kwargs
    if node.target is attention_scores:
        q, k, mask, _, scale, grouped = node.args
        return _causal_scores, (q, k, mask, scale, grouped, allowed), {}
    _, _, scale, grouped = fused_options(node)
    options = {"attn_mask": allowed, "scale": scale, "enable_gqa": grouped}
    return node.target, node.args[:3], options


def is_fused(node: Node) -> bool:
    """Whether an operator is attention, in which a mask alone says what sees what."""
    return node.target in (_ATEN.scaled_dot_product_attention.default, attention_scores)


def causal_mask(rows: Rows, length: int, device: torch.device) -> torch.Tensor:
    """Which keys these rows of queries may see: bool (query, key)."""
    keys = torch.arange(length, device=device)
    return keys <= keys[rows.start : rows.stop, None]


def _causal_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    grouped: bool,
    allowed: torch.Tensor,
) -> torch.Tensor:
    scores = attention_scores(q, k, mask, False, scale, grouped)
    return scores.masked_fill(~allowed, -torch.inf)


Values = Mapping[Node, object]


def execute(
    node: Node, values: Values, layout: Layout, num_variants: int, rows: Rows, device: torch.device
) -> object:
    """One operator on these argument values, for so many variants and these rows."""
    part = rows != layout.all and is_causal(node)
    allowed = causal_mask(rows, layout.length, device) if part else None
    target, args, kwargs = operator_for(node, allowed)
    return _called(target, args, kwargs, values, layout, num_variants * layout.num_examples, rows)


def execute_packed(node: Node, values: Values, layout: Layout, num_rows: int) -> object:
    """One operator on packed rows."""
    target, args, kwargs = operator_for(node, None)
    return _called(target, args, kwargs, values, layout, 1, Rows(0, num_rows))


def _called(
    target: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    values: Values,
    layout: Layout,
    batch: int,
    rows: Rows,
) -> object:
    def value(x: Node) -> object:
        return layout.size(x, batch, rows.size) if layout.is_size(x) else values[x]

    given = filled(args, value)
    return target(*given, **dict(zip(kwargs, filled(kwargs.values(), value), strict=True)))


# ---- asking an operator ---------------------------------------------------------


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
    flat = x.movedim((axes.batch, axes.row), (0, 1)).flatten(0, 1)
    return flat.unsqueeze(0).movedim((0, 1), (axes.batch, axes.row))


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
