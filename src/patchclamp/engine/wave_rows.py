"""Shapes, rows and operators of a wavefront: where a value has its batch and its positions.

Rows are positions along an axis of symbolic size "length"; `batch*length` in one axis
(a flattened sequence) counts too.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    rows_of: torch.Tensor = apart.flatten(2).any(2) if apart.ndim > 2 else apart
    return rows_of


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
