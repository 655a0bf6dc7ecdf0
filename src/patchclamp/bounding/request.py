"""Bounds of an opened network: `net.bound` in full.

A request names what is perturbed, what is bounded and how. Sites are raw values or parts of
them, so what is perturbed, restricted and edited is resolved to element numbers of values of
the captured graph; the graph is then lowered and bounded. Examples are bounded side by side
where nothing in the lowered network depends on the example, else one after the other.

What a statement holds over: with dtype "float64" every bound allows for rounding and holds over
the reals, for the network with the weights that it has; values that depend on nothing perturbed
are computed once in float64 and taken as they come out. With "float32" nothing is allowed for.
The live network's own float32 rounding is not part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from patchclamp.bounding.edits import editing, of_example
from patchclamp.bounding.lowering import Rewrite, lower
from patchclamp.bounding.results import Bounds
from patchclamp.bounding.sets import Around, PerturbedSet
from patchclamp.bounding.targets import (
    INPUT,
    Examples,
    Limits,
    Perturbed,
    Target,
    as_spec,
    plain_tap,
    restricting,
    whole,
)
from patchclamp.bounding.ways import Found, Linear, Method, Way
from patchclamp.core.edit_kinds import as_edits
from patchclamp.core.errors import BoundError, OptionError, SiteError, nearest
from patchclamp.core.sites import WHOLE, Tap
from patchclamp.engine.attention import expanded, expanded_addresses
from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.ir import Graph, Kind, Node
from patchclamp.model.inputs import BATCH, Call, principal
from patchclamp.rules.base import Interval, Shape
from patchclamp.rules.value import Value

if TYPE_CHECKING:
    from patchclamp.net import Edits, Net


@dataclass(frozen=True, kw_only=True, eq=False)
class BoundRequest:
    """Options of a request; `run` does it. See `Net.bound`."""

    output: str | None = None
    rows: object = None
    method: Method | str = Method.CROWN
    edits: Edits = ()
    restrict: Mapping[str, Limits] = field(default_factory=dict)
    dtype: str = "float64"
    num_steps: int = 20
    linear: bool = False

    def run(self, net: Net, inputs: object, perturbed: Perturbed) -> Bounds:
        """Bound the network on `inputs`, with what is perturbed."""
        if self.dtype not in ("float64", "float32"):
            raise OptionError("bounds are in float64 or float32", got=self.dtype)
        if self.method not in set(Method):
            raise OptionError(
                f"no bound method '{self.method}'",
                expected=f"one of {', '.join(Method)}",
                nearest=nearest(str(self.method), Method),
            )
        with torch.no_grad():
            return _Work(self, net, net.call(inputs), perturbed).done()


@dataclass(eq=False)
class _Work:
    """One request on one call."""

    options: BoundRequest
    net: Net
    call: Call
    perturbed: Perturbed

    def __post_init__(self) -> None:
        self.dims = self.net.call_dims(self.call)
        self.engine: GraphEngine = self.net.graph_for(self.call)
        self.edits = [
            (edit, tap) for edit in as_edits(self.options.edits) for tap in self.net.taps(edit.site)
        ]
        self.limits = [
            (tap, limits)
            for name, limits in self.options.restrict.items()
            for tap in self.net.taps(name)
        ]
        self.dtype = torch.float64 if self.options.dtype == "float64" else torch.float32
        self.num = self._num_examples()
        named = {} if isinstance(self.perturbed, Mapping) else {INPUT: self.perturbed}
        given = self.perturbed if isinstance(self.perturbed, Mapping) else named
        if not given:
            raise BoundError("nothing is perturbed", hint="net.bound(inputs, 0.03)")
        taps = {
            name: tap
            for name in given
            for tap in ([] if name == INPUT and name not in self.net.sites else self._site(name))
        }
        wanted = [*taps.values(), *(t for _, t in self.edits), *(t for t, _ in self.limits)]
        if self.options.output is not None:
            wanted += self._site(self.options.output)
        self.graph, self.nodes = _reached(self.engine, [t.site.address for t in wanted])
        self.targets = [self._target(name, taps.get(name), spec) for name, spec in given.items()]
        self.output_tap = self._output()
        needed = self.graph.upstream([self.output])
        for target in self.targets:
            if not needed.intersection(target.nodes):
                raise BoundError(
                    f"the output '{self.output_tap.label}' does not depend on '{target.name}'"
                )

    def _num_examples(self) -> int:
        sizes = [
            x.shape[d.index(BATCH)]
            for x, d in zip(self.call.tensors(), self.dims, strict=True)
            if BATCH in d
        ]
        return int(sizes[0]) if sizes else 1

    # ---- names --------------------------------------------------------------

    def _parameters(self) -> dict[str, Tensor]:
        """By path; a shared one under each of its paths."""
        return dict(self.net.module.named_parameters(remove_duplicate=False))

    def _site(self, name: str) -> list[Tap]:
        """The site of this name, or nothing where it is a parameter's path."""
        try:
            return self.net.taps(name)
        except SiteError:
            if name in self._parameters():
                return []
            known = [*self._parameters(), *self.net.sites.sites]
            raise SiteError(
                f"{self.net.name} has no site and no parameter '{name}'",
                nearest=nearest(name, known),
                hint="patchclamp sites MODEL; parameters by path, such as '0.weight'",
            ) from None

    def _target(self, name: str, tap: Tap | None, spec: object) -> Target:
        given = as_spec(name, spec)
        if tap is not None:
            return Target(name, tap, [self._node(tap)], given)
        if name == INPUT:
            return self._input(given)
        weight = self._parameters()[name]
        nodes = [
            n
            for n in self.graph.nodes
            if n.kind is Kind.CONST and self.engine.constant(n) is weight
        ]
        if not nodes:
            raise BoundError(f"the captured network does not read the parameter '{name}'")
        return Target(name, plain_tap(name, tuple(weight.shape)), nodes, given)

    def _input(self, spec: Around | PerturbedSet) -> Target:
        """The first input of real numbers."""
        for node in self.graph.nodes:
            if node.kind is Kind.INPUT and self.call.tensors()[node.number].is_floating_point():
                seen = next((n for n in self.graph.nodes if n.args[:1] == (node,)), node)
                site = self.engine.sites().get(seen.address)
                tap = plain_tap(INPUT, self.dims[node.number]) if site is None else whole(site)
                return Target(INPUT, tap, [node], spec, number=node.number)
        raise BoundError(
            f"{self.net.name} takes no real numbers that could move by a little",
            hint='perturb a value behind them: {"embed": 0.01}',
        )

    def _node(self, tap: Tap) -> Node:
        node = self.nodes.get(tap.site.address)
        if node is None:
            raise BoundError(
                f"site '{tap.label}' is not in the captured network",
                hint="net.coverage() lists what the graph engine offers",
            )
        return node

    def _output(self) -> Tap:
        if self.options.output is not None:
            taps = self._site(self.options.output)
            if len(taps) != 1:
                raise BoundError("one output is bounded at a time", got=self.options.output)
            self.output = self._node(taps[0])
            return taps[0]
        leaves = [torch.zeros(()) if isinstance(n, Node) else n for n in self.graph.outputs]
        chosen = principal(pytree.tree_unflatten(leaves, self.graph.out_spec))
        number = next(i for i, x in enumerate(leaves) if x is chosen)
        node = self.graph.outputs[number]
        if not isinstance(node, Node):
            raise BoundError("the network's output is a constant")
        self.output = node
        site = self.engine.sites().get(node.address)
        return (
            plain_tap(node.address or "output", node.shape or ()) if site is None else whole(site)
        )

    # ---- the work -----------------------------------------------------------

    def done(self) -> Bounds:
        """Bounds of all examples."""
        if self._alike():
            found = [self._bounded(0, self.num)]
        else:
            found = [self._bounded(e, 1) for e in range(self.num)]
        lower, upper = (
            torch.cat(side) for side in zip(*((f.lower, f.upper) for f in found), strict=True)
        )
        below, above = None, None
        if self.options.linear and found[0].below is not None:
            below, above = (_together([getattr(f, s) for f in found]) for s in ("below", "above"))
        axes: tuple[str, ...] = (BATCH, "row")
        if self.options.rows is None:
            (lower, axes), (upper, _) = self._placed(lower), self._placed(upper)
        method = Method(self.options.method)
        constants = tuple(dict.fromkeys(name for f in found for name in f.constants))
        return Bounds(Interval(lower, upper), axes, below, above, method, self._holds, constants)

    @property
    def _holds(self) -> str:
        if self.dtype is torch.float64:
            return "the reals"
        return "float32 arithmetic, without allowance for rounding"

    def _alike(self) -> bool:
        """Whether nothing in the lowered network depends on the example."""
        stops = {n for t in self.targets for n in t.nodes}
        seen: set[Node] = set()
        stack = [self.output]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in stops and all(t.tap.view == WHOLE for t in self.targets if node in t.nodes):
                continue
            stack += node.inputs()
        if any(n.kind is Kind.INPUT and n not in stops for n in seen):
            return False
        if any(of_example(edit, tap, 0, self.num) is not edit for edit, tap in self.edits):
            return False
        return not any(
            isinstance(t.spec, Around)
            and (t.spec.where or (t.number is None and t.nodes[0].kind is not Kind.CONST))
            for t in self.targets
        )

    def _bounded(self, first: int, num: int) -> Found:
        """Bounds of `num` examples from `first` on, (num, R)."""
        examples = Examples(self.call, self.dims, self.num, first, num, self.dtype)
        example = [
            x.to(self.dtype) if x.is_floating_point() else x
            for x in self.call.rows(slice(first, first + 1), self.dims).tensors()
        ]
        rewrites: dict[Node, list[Rewrite]] = {}
        for target in self.targets:
            target.leaf = None
            for node in target.nodes:
                rewrites.setdefault(node, []).append(target.rewrite)
        for edit, tap in self.edits:
            own = of_example(edit, tap, first, self.num)
            rewrites.setdefault(self._node(tap), []).append(editing(own, tap))
        restricted: list[Value] = []
        for tap, limits in self.limits:
            made = restricting(tap, limits, restricted, examples)
            rewrites.setdefault(self._node(tap), []).append(made)
        network = lower(
            self.graph,
            lambda n: _precise(self.engine.constant(n), self.dtype),
            example,
            {},
            self.output,
            self.dtype,
            rewrites=rewrites,
            exact=self.dtype is torch.float64,
        )
        sets = {t.name: t.set(examples) for t in self.targets}
        rows, index = self._rows(network.output.shape, first, num)
        way = Way(
            network,
            sets,
            Method(self.options.method),
            rounded=self.dtype is torch.float64,
            num_steps=self.options.num_steps,
            keep_linear=self.options.linear,
            restricted=tuple(restricted),
        )
        return _expanded(way.run(rows, index), num)

    # ---- the output ---------------------------------------------------------

    def _rows(self, shape: Shape, first: int, num: int) -> tuple[Tensor | None, Tensor]:
        """Rows on the raw output value, and which of its elements are seen."""
        numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
        index = self.output_tap.view.read(numbers)
        self.seen = tuple(index.shape)
        flat = index.flatten()
        if self.options.rows is None:
            return None, flat
        rows = torch.as_tensor(self.options.rows, dtype=self.dtype)
        at_batch = BATCH in self.output_tap.axes
        one = [n for n, a in zip(self.seen, self.output_tap.axes, strict=True) if a != BATCH]
        own = rows.ndim == len(one) + 2 and at_batch
        if list(rows.shape[-len(one) :] if one else ()) != one or not (
            rows.ndim == len(one) + 1 or (own and rows.shape[0] in (1, self.num))
        ):
            raise BoundError(
                f"rows that do not fit the output '{self.output_tap.label}'",
                got=f"shape {tuple(rows.shape)}",
                expected=f"(num rows, {', '.join(map(str, one))}), or (batch, num rows, ...)",
            )
        rows = rows if own else rows[None]
        if rows.shape[0] > 1 and num == 1:
            rows = rows[first : first + 1]
        C = torch.zeros(*rows.shape[:2], numbers.numel(), dtype=self.dtype)
        C[:, :, flat] = rows.flatten(2)
        return C.reshape(*rows.shape[:2], *shape), flat

    def _placed(self, x: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Bounds (N, elements) in the shape of the site."""
        axes = self.output_tap.axes
        full = x.reshape(x.shape[0], *self.seen)
        if BATCH in axes:
            at = axes.index(BATCH)
            return full.squeeze(at + 1).movedim(0, at), axes
        return (full[0], axes) if self.num == 1 else (full, ("example", *axes))


def _reached(engine: GraphEngine, addresses: Sequence[str]) -> tuple[Graph, dict[str, Node]]:
    """The captured graph by address, fused attention written out where a site lies inside it."""
    graph = engine.capture.graph
    hidden = {
        address: node.address
        for node in graph.values()
        if node.kind is Kind.OP and node.operation == "attention"
        for address in expanded_addresses(node).values()
    }
    which = frozenset(hidden[a] for a in addresses if a in hidden)
    if which:
        graph = expanded(graph, which)
    return graph, {n.address: n for n in graph.values()}


def _precise(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _expanded(found: Found, num: int) -> Found:
    """For every example, also where they are all alike."""
    return dataclasses.replace(
        found, lower=found.lower.expand(num, -1), upper=found.upper.expand(num, -1)
    )


def _together(parts: list[Linear]) -> Linear:
    rows = {name: torch.cat([p.rows[name] for p in parts]) for name in parts[0].rows}
    return Linear(rows, torch.cat([p.constant for p in parts]))
