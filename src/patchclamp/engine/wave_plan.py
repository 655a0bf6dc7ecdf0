"""What a wavefront will run: which operators, for which rows, on values from where.

A plan is made once for a set of edited sites and an output, and serves any number of
variants. `Scope` says what has to be computed; `compile_plan` turns it into steps whose
arguments are fetched from the running batch, filled up from the baseline where the batch
lacks variants or rows. Only the first edited row is left open, so that one plan serves
all positions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from patchclamp.core.errors import EngineError
from patchclamp.engine.ir import Graph, Kind, Node
from patchclamp.engine.wave_rows import Axes, Layout, Rows, is_causal, operator_for
from patchclamp.engine.wave_rules import Rule
from patchclamp.engine.wave_values import (
    Fetch,
    Filled,
    FromBase,
    FromSlot,
    Mask,
    Size,
    State,
    Take,
)
from patchclamp.model.inputs import BATCH

_WIDEST = 8
"""Bytes of an element whose type is not known."""


@dataclass
class Scope:
    """Everything downstream of an edit and upstream of the output.

    Attributes:
        sites: the edited values in the order of the forward pass.
        output: the wanted value.
        one: only one row of it is wanted.
        reach: for every node, how many of the sites its batch goes up to (0: baseline only).
        order: what is computed, and the sites, in the order of the forward pass.
        needed: what is computed.
    """

    sites: list[Node]
    output: Node
    one: bool
    reach: dict[Node, int]
    order: list[Node]
    needed: set[Node]


def find_scope(
    graph: Graph, layout: Layout, sites: Sequence[Node], output: Node, *, one: bool
) -> Scope:
    """Trace the edits forward and the output back.

    Raises:
        EngineError: a value in between no longer tells the examples of the batch apart.
    """
    index = {node: i for i, node in enumerate(sites)}
    reach: dict[Node, int] = {}
    for node in graph.nodes:
        before = max((reach[x] for x in layout.inputs(node)), default=0)
        before = 0 if layout.is_size(node) else before  # known whatever the edits are
        reach[node] = index[node] + 1 if node in index else before
    needed: set[Node] = set()
    stack = [output] if reach[output] else []
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += [x for x in layout.sources(node) if reach[x]]
    for node in needed:
        parts = layout.parts(node)
        if not parts or any(axes.batch is None for axes in parts.values()):
            raise EngineError(
                f"'{node.address or node.operation}' lies between an edit and the output and has "
                "no batch axis, so variants cannot be told apart in it",
                hint="use engine='hooks', which runs one forward pass per edit",
            )
    order = [n for n in graph.nodes if n in needed or n in index]
    return Scope(list(sites), output, one, reach, order, needed)


def is_alias(node: Node) -> bool:
    """Whether a node hands its argument (or one part of it) on as it is."""
    return node.kind is Kind.TAG or node.target is operator.getitem


def _edited(scope: Scope, layout: Layout, node: Node) -> list[Node]:
    """What a node reads that an edit reaches; nothing where the node itself is not computed."""
    if node not in scope.needed:
        return []
    return [x for x in layout.sources(node) if scope.reach[x]]


def mixing(
    scope: Scope, layout: Layout, rules: Mapping[Node, Rule]
) -> Iterator[tuple[Node, list[Node]]]:
    """Operators that mix rows, and the values with rows that edits reach in them."""
    for node in scope.order:
        edited = _edited(scope, layout, node)
        mixes = bool(edited) and not is_alias(node) and rules[node].mixes
        if mixes and all(layout.has_rows(x) for x in edited):
            yield node, edited


def find_rows(
    scope: Scope,
    layout: Layout,
    rules: Mapping[Node, Rule],
    blocked: Collection[Node],
    *,
    packed: bool = False,
) -> tuple[dict[Node, Take], frozenset[Node]]:
    """Which rows of every value are computed, and the values whose rows before the edit stay.

    Args:
        blocked: operators that change rows before the first edited one.
        packed: variants differ in their first edited row.
    """
    kept: set[Node] = set()
    for node in scope.order:
        edited = _edited(scope, layout, node)
        if layout.has_rows(node) and node not in blocked and all(x in kept for x in edited):
            kept.add(node)
    single = _single(scope, layout, rules)
    take: dict[Node, Take] = {}
    sites = set(scope.sites)
    for node in scope.order:
        edited = _edited(scope, layout, node)
        site = node in sites
        if edited and (node.target is operator.getitem or (node.kind is Kind.TAG and not site)):
            take[node] = take[edited[0]]
            continue
        whole = not layout.has_rows(node) or (
            bool(edited) and not is_alias(node) and rules[node].sliced is None
        )
        take[node] = (
            Take.ALL
            if whole
            else Take.ONE
            if node in single
            else Take.ALL
            if node not in kept
            else Take.PACKED
            if packed and _packs(node, edited, layout, rules)
            else Take.FROM
        )
    return take, frozenset(kept)


def _packs(node: Node, edited: Sequence[Node], layout: Layout, rules: Mapping[Node, Rule]) -> bool:
    if not edited or is_alias(node):  # an edited site
        axes = layout.parts(node)[None]
        return axes.merged or (axes.batch is not None and (node.shape or ())[axes.batch] == BATCH)
    return rules[node].packs


def _single(scope: Scope, layout: Layout, rules: Mapping[Node, Rule]) -> set[Node]:
    """Values of which everyone reads one row only."""
    single = set(scope.order) if scope.one else set()
    for node in reversed(scope.order):
        if node not in scope.needed:
            continue
        for n, x in enumerate(layout.sources(node)):
            if scope.reach[x] and x in single:
                rule = None if is_alias(node) else rules[node].sliced
                sliced = is_alias(node) or (rule is not None and rule[n])
                if not (node in single and sliced and layout.has_rows(node)):
                    single.discard(x)
    return single


# ---- steps ------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Step:
    """One operator, one edited site, or both.

    Attributes:
        node: what is computed.
        target, args, kwargs: what is called; arguments hold `Fetch` leaves.
        slot: where the result goes.
        reach: how many sites the batch goes up to when it is computed.
        separable: variants may share one call.
        site: number of the site that is appended after it, or None.
        frees: slots that nothing reads any more.
    """

    node: Node
    target: Callable[..., object] | None
    args: Sequence[object]
    kwargs: Mapping[str, object]
    slot: int
    reach: int
    take: Take
    separable: bool = True
    site: int | None = None
    frees: tuple[int, ...] = ()

    def compute(self, state: State) -> object:
        """The value for the variants that there are; None before the first."""
        total = state.counts[self.reach]
        if self.target is None or total == 0:
            return None
        if self.separable or total == 1:
            return self.target(*_filled(self.args, state), **self._keywords(state, None))
        made = [
            self.target(*_filled_one(self.args, state, k), **self._keywords(state, k))
            for k in range(total)
        ]
        return _joined(made, state.layout.parts(self.node))

    def _keywords(self, state: State, k: int | None) -> dict[str, object]:
        if not self.kwargs:
            return {}
        values = list(self.kwargs.values())
        made = _filled(values, state) if k is None else _filled_one(values, state, k)
        return dict(zip(self.kwargs, made, strict=True))


def _filled(args: Sequence[object], state: State) -> list[object]:
    return [
        x.get(state) if isinstance(x, Fetch) else (_filled(x, state) if x.__class__ is list else x)
        for x in args
    ]


def _filled_one(args: Sequence[object], state: State, k: int) -> list[object]:
    return [
        x.of_variant(state, k)
        if isinstance(x, Fetch)
        else (_filled_one(x, state, k) if x.__class__ is list else x)
        for x in args
    ]


def _joined(made: Sequence[object], parts: Mapping[int | None, Axes]) -> object:
    """Results of single variants as one batch."""
    if None in parts:
        batch = parts[None].batch
        assert batch is not None
        return torch.cat([x for x in made if isinstance(x, torch.Tensor)], batch)
    joined: dict[int | None, torch.Tensor] = {}
    for i, axes in parts.items():
        assert axes.batch is not None
        joined[i] = torch.cat([x[i] for x in made], axes.batch)  # type: ignore[index]  # tuples
    return joined


@dataclass
class Plan:
    """Steps that a wavefront runs.

    Attributes:
        scope: what they compute.
        steps: in order.
        output: where the output comes from.
        num_slots: values that are told apart.
        keeps_output: rows of the output before the first edited one are the baseline's.
    """

    scope: Scope
    take: dict[Node, Take]
    steps: list[Step]
    output: Filled
    num_slots: int
    keeps_output: bool
    _bytes: dict[tuple[Rows, ...], int] = field(default_factory=dict, repr=False)

    def bytes_per_variant(self, layout: Layout, rows: tuple[Rows, ...]) -> int:
        """Memory that one variant takes at most, if it is there from the first step on.

        Views count as copies, and every operator is granted as much again as its result for
        what it holds while it works, so that this errs on the large side.
        """
        if rows not in self._bytes:
            self._bytes[rows] = self._peak(layout, rows)
        return self._bytes[rows]

    def _peak(self, layout: Layout, rows: tuple[Rows, ...]) -> int:
        def size(node: Node, take: Take) -> int:
            width = node.dtype.itemsize if node.dtype is not None else _WIDEST
            return layout.numel(node, 1, rows[take].size) * width

        live: dict[int, int] = {}
        peak = 0
        for step in self.steps:
            made = size(step.node, step.take)
            copies = sum(size(f.node, f.want) for f in _fetches(step) if isinstance(f, Filled))
            peak = max(peak, sum(live.values()) + copies + 2 * made)
            live[step.slot] = made
            for slot in step.frees:
                live.pop(slot, None)
        return peak + 2 * size(self.output.node, self.output.want)


def _fetches(step: Step) -> Iterator[Fetch]:
    """Everything that a step looks up."""
    stack: list[object] = [*step.args, *step.kwargs.values()]
    while stack:
        x = stack.pop()
        if isinstance(x, list):
            stack += x
        elif isinstance(x, Fetch):
            yield x


def compile_plan(
    scope: Scope,
    layout: Layout,
    rules: Mapping[Node, Rule],
    rows: tuple[dict[Node, Take], frozenset[Node]],
) -> Plan:
    """Steps for a scope. They hold no values, and serve every baseline of the same sizes."""
    return _Compiler(scope, layout, rules, rows[0]).plan(rows[1])


class _Compiler:
    def __init__(
        self,
        scope: Scope,
        layout: Layout,
        rules: Mapping[Node, Rule],
        take: dict[Node, Take],
    ) -> None:
        self.scope, self.layout, self.rules, self.take = scope, layout, rules, take
        self.slots: dict[Node, int] = {}
        self.num_slots = 0
        self.used: dict[int, int] = {}
        self.index = {node: i for i, node in enumerate(scope.sites)}

    def plan(self, kept: frozenset[Node]) -> Plan:
        steps: list[Step] = []
        for node in self.scope.order:
            step = self._step(node)
            if step is not None:
                steps.append(step)
                self.used[step.slot] = len(steps) - 1
                for fetch in _fetches(step):
                    if isinstance(fetch, (FromSlot, Filled)) and fetch.slot is not None:
                        self.used[fetch.slot] = len(steps) - 1
        wanted = Take.ONE if self.scope.one else Take.ALL
        output = self._filled(self.scope.output, wanted, len(self.scope.sites))
        if output.slot is not None:
            self.used[output.slot] = len(steps)
        frees: dict[int, list[int]] = {}
        for slot, last in self.used.items():
            frees.setdefault(last, []).append(slot)
        for i, step in enumerate(steps):
            step.frees = tuple(frees.get(i, ()))
        keeps = self.scope.output in kept or self.scope.output not in self.scope.needed
        return Plan(self.scope, self.take, steps, output, self.num_slots, keeps)

    def _step(self, node: Node) -> Step | None:
        site = self.index.get(node)
        live = node in self.scope.needed
        edited = [x for x in self.layout.sources(node) if self.scope.reach[x]] if live else []
        if node.kind is Kind.TAG and edited and site is None:
            self.slots[node] = self.slots[edited[0]]
            return None
        take = self.take[node]
        reach = max((self.scope.reach[x] for x in edited), default=0)
        target: Callable[..., object] | None = None
        args: Sequence[object] = ()
        kwargs: Mapping[str, object] = {}
        separable = True
        if edited and node.kind is Kind.TAG:
            target, args = _same, [self._filled(edited[0], take, reach)]
        elif edited and node.target is operator.getitem:
            item = int(str(node.args[1]))
            args = [FromSlot(self.slots[edited[0]], reach, self.layout.parts(node)[None], item)]
            target = _same
        elif edited:
            target, args, kwargs = self._call(node, take, reach)
            separable = self.rules[node].separable
        self.slots[node] = self.num_slots
        self.num_slots += 1
        return Step(
            node=node,
            target=target,
            args=args,
            kwargs=kwargs,
            slot=self.slots[node],
            reach=reach,
            take=take,
            separable=separable,
            site=site,
        )

    def _call(
        self, node: Node, take: Take, reach: int
    ) -> tuple[Callable[..., object], Sequence[object], Mapping[str, object]]:
        part = take is not Take.ALL and is_causal(node)
        target, args, kwargs = operator_for(node, Mask(take) if part else None)
        sliced = self.rules[node].sliced
        wants = {
            x: take if sliced is not None and sliced[n] else Take.ALL
            for n, x in enumerate(self.layout.sources(node))
        }

        def leaf(x: object) -> object:
            if isinstance(x, (list, tuple)):
                return [leaf(i) for i in x]
            if not isinstance(x, Node):
                return x
            if x.kind is Kind.CONST:
                return FromBase(x)
            if self.layout.is_size(x):
                return Size(x, take, reach)
            return self._argument(x, wants[x], reach)

        return target, [leaf(x) for x in args], {k: leaf(x) for k, x in kwargs.items()}

    def _argument(self, x: Node, want: Take, reach: int) -> object:
        if x.shape is None:
            return FromBase(x)  # a number that was read off a value that no edit reaches
        filled = self._filled(x, want, reach)
        if filled.slot is not None and filled.held_reach == reach and filled.held is filled.want:
            return FromSlot(filled.slot, reach, filled.axes)
        if filled.slot is None and filled.axes.batch is None and want is Take.ALL:
            return FromBase(x)
        return filled

    def _filled(self, x: Node, want: Take, reach: int) -> Filled:
        axes = self.layout.parts(x)[None]
        live = x in self.slots
        return Filled(
            node=x,
            slot=self.slots[x] if live else None,
            axes=axes,
            held=self.take[x] if live and axes.row is not None else want,
            want=want,
            held_reach=self.scope.reach[x] if live else 0,
            reach=reach,
        )


def _same(x: object) -> object:
    return x
