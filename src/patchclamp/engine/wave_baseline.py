"""The baseline of a wavefront: one plain pass that keeps what the edited passes will need.

On its way it asks every operator for its rules (engine/wave_rows.py). A second call of the
same sizes, such as the one that values are patched from, can run beside it: what both
share is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.ir import Graph, Kind, Node
from patchclamp.engine.wave_packing import flat_rows, spread_rows, unspread_rows
from patchclamp.engine.wave_plan import Plan, Scope, is_alias
from patchclamp.engine.wave_rows import Layout, execute, execute_packed
from patchclamp.engine.wave_rules import Rule, find_rule, signature
from patchclamp.engine.wave_values import collapsed
from patchclamp.model.inputs import Call

_PRODUCTS = frozenset({"linear", "addmm", "mm", "matmul"})
"""Operators for which it pays to leave out rows that are known."""


@dataclass
class Known:
    """What holds for every baseline of the same sizes: shapes, rules, plans; no values."""

    layout: Layout
    rules: dict[Node, Rule] = field(default_factory=dict)
    kinds: dict[object, Rule] = field(default_factory=dict)
    scopes: dict[object, Scope] = field(default_factory=dict)
    plans: dict[object, Plan] = field(default_factory=dict)
    required: dict[object, set[Node]] = field(default_factory=dict)


@dataclass
class Baseline:
    """Values of one call.

    Attributes:
        values: of nodes that edited passes fill up from.
        filling: the same, with one row for all examples where they are alike.
    """

    engine: GraphEngine
    graph: Graph
    known: Known
    call: Call
    values: dict[Node, object] = field(default_factory=dict)
    filling: dict[Node, object] = field(default_factory=dict)
    _other: Call | None = None
    _recorded: Sequence[Node] = ()
    _found: dict[Node, object] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """Sizes of the call."""
        return self.known.layout

    def __post_init__(self) -> None:
        self.device = self.call.tensors()[0].device

    def value(self, node: Node) -> torch.Tensor:
        """The value of one node, which is kept."""
        if node not in self.values:
            self._learn([], {node})
        value = self.values[node]
        assert isinstance(value, torch.Tensor)
        return value

    def beside(self, other: Call, recorded: Sequence[Node]) -> None:
        """Run another call with the next pass, and record these nodes of it."""
        self._other, self._recorded, self._found = other, recorded, {}

    def found(self) -> dict[Node, torch.Tensor]:
        """What was recorded of the other call; runs it if no pass has."""
        if self._other is not None:
            self._learn([], set())
        found = {n: v for n, v in self._found.items() if isinstance(v, torch.Tensor)}
        self._recorded, self._found = (), {}
        return found

    def _requires(self, node: Node, x: Node, scope: Scope) -> bool:
        """Whether the baseline's value of an argument is needed to run this node."""
        if x.kind is Kind.CONST:
            return True
        if self.layout.is_size(x):
            return False
        reach = max(scope.reach[i] for i in self.layout.inputs(node))
        if scope.reach[x] < reach:
            return True
        rule = self.known.rules.get(node)
        if rule is None or not self.layout.has_rows(x):
            return False
        place = self.layout.sources(node).index(x)
        if sum(scope.reach[i] > 0 for i in self.layout.sources(node)) > 1:
            return True  # one of them may hold all rows, where rows were mixed on its way
        return rule.mixes or (rule.sliced is not None and not rule.sliced[place])

    def _required(self, scope: Scope) -> set[Node]:
        found = {*scope.sites, scope.output}
        for node in scope.order:
            if node in scope.needed and any(scope.reach[x] for x in self.layout.sources(node)):
                found |= {x for x in self.layout.inputs(node) if self._requires(node, x, scope)}
        return found

    def prepare(self, key: object, scope: Scope) -> None:
        """Rules of all operators and values of the baseline that a scope needs."""
        required = self.known.required.get(key)
        if required is None:
            asked = [
                n
                for n in scope.order
                if n.kind is Kind.OP
                and n in scope.needed
                and any(scope.reach[x] for x in self.layout.sources(n))
            ]
            self._learn(asked, {*scope.sites, scope.output}, scope)
            self.known.required[key] = self._required(scope)
        elif not required <= self.values.keys():
            self._learn([], required)

    def _learn(self, asked: Sequence[Node], wanted: set[Node], scope: Scope | None = None) -> None:
        """Run the baseline once; find the rules of operators, keep the values that are needed."""
        layout = self.layout
        other, recorded = self._other, set(self._recorded)
        self._other = None
        order = self._upstream([*asked, *wanted, *recorded])
        last = {x: n for n in order for x in layout.inputs(n)}
        finding = set(asked)
        env: dict[Node, object] = {}
        beside: dict[Node, object] = {}
        for node in order:
            if layout.is_size(node):
                continue
            read = {x: env[x] for x in layout.inputs(node) if x in env}
            if node in finding:
                self._ask(node, read)
            if other is None:
                env[node] = self._made(node, read, self.call)
            else:
                given = {x: beside[x] for x in layout.inputs(node) if x in beside}
                env[node], beside[node] = self._both(node, read, given, other)
                if node in recorded:
                    self._found[node] = beside[node]
            if scope is not None and (node in finding or node in scope.needed):
                for x in layout.inputs(node):
                    if self._requires(node, x, scope):
                        self._keep(x, env[x])
            if node in wanted:
                self._keep(node, env[node])
            for x in layout.inputs(node):
                if last[x] is node:
                    env.pop(x, None)
                    beside.pop(x, None)

    def _upstream(self, wanted: Sequence[Node]) -> list[Node]:
        upstream: set[Node] = set()
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node not in upstream:
                upstream.add(node)
                stack += self.layout.inputs(node)
        return [n for n in self.graph.nodes if n in upstream]

    def _made(self, node: Node, read: Mapping[Node, object], call: Call) -> object:
        if node.kind is Kind.INPUT:
            return call.tensors()[node.number]
        if node.kind is Kind.CONST:
            return self.engine.constant(node)
        if node.kind is Kind.TAG:
            return read[self.layout.inputs(node)[0]]
        return execute(node, read, self.layout, 1, self.layout.all, self.device)

    def _both(
        self, node: Node, read: Mapping[Node, object], given: Mapping[Node, object], other: Call
    ) -> tuple[object, object]:
        """A value of the baseline and of the other call; large products in one for both.

        Rows in which the other call has the baseline's input are not computed again. So they
        stay the same bit for bit, whatever order a product of another size sums in.
        """
        sources = self.layout.sources(node)
        if node.kind is Kind.OP and all(given[x] is read[x] for x in sources):
            made = self._made(node, read, self.call)
            return made, made
        rule = self.known.rules.get(node)
        if rule is None or not rule.packs or node.operation not in _PRODUCTS or len(sources) != 1:
            return self._made(node, read, self.call), self._made(node, given, other)
        (x,) = sources
        old, new = read[x], given[x]
        assert isinstance(old, torch.Tensor)
        assert isinstance(new, torch.Tensor)
        source, axes = self.layout.parts(x)[None], self.layout.parts(node)[None]
        mine, rows = flat_rows(old, source), flat_rows(new, source)
        places = (rows != mine).flatten(1).any(1).nonzero()[:, 0]
        both = spread_rows(torch.cat([mine, rows[places]]), source)
        done = execute_packed(node, {**read, x: both}, self.layout, len(mine) + len(places))
        assert isinstance(done, torch.Tensor)
        flat = flat_rows(done, axes)
        made = flat[: len(mine)]
        beside = made.index_copy(0, places, flat[len(mine) :])
        length = self.layout.length
        return unspread_rows(made, axes, length), unspread_rows(beside, axes, length)

    def _keep(self, node: Node, value: object) -> None:
        if node not in self.values:
            self.values[node] = value
            self.filling[node] = collapsed(value, node, self.layout)

    def _ask(self, node: Node, read: Mapping[Node, object]) -> None:
        known = self.known
        if node in known.rules:
            return
        if is_alias(node):
            known.rules[node] = Rule(True, (True,), mixes=False)
            return
        kind = signature(node, self.layout)
        if kind not in known.kinds:
            known.kinds[kind] = find_rule(node, read, self.layout, self.device)
        known.rules[node] = known.kinds[kind]
