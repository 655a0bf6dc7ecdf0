"""One walk over a captured network for every method that has a rule for each operator.

The network is lowered to rules between a site and its output (`bounding.lowering`): whatever
does not depend on the site is a constant inside a rule, affine neighbours are one, and modules,
functions, reuse and writes in place are no longer there to be mistaken for each other. Values go
forwards through the rules in float64; what a method propagates comes back through them, and an
operator without a rule is refused by name.

Examples lie side by side where nothing in the lowered network depends on the example; else (a
mask, a way around the site) each has a network of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from patchclamp.bounding.lowering import Lowered, lower
from patchclamp.core.errors import BoundError, EngineError, TargetError
from patchclamp.core.sites import WHOLE
from patchclamp.engine.attention import expanded, expanded_addresses
from patchclamp.engine.ir import Graph, Kind, Node
from patchclamp.engine.targets import Metric, Target, measured
from patchclamp.methods.scoring import Scorer
from patchclamp.model.inputs import BATCH, principal
from patchclamp.net import Net
from patchclamp.rules.base import Rule
from patchclamp.rules.value import Value

_LEAF = "site"
_MEMORY = 256 << 20
"""Bytes of values that are held at a time, of several examples."""

Step = Callable[[Value, Rule, Tensor], tuple[Tensor, ...]]
"""What goes back to each argument of a value with this rule, from what arrived at it."""


@dataclass(eq=False)
class Piece:
    """Some examples, side by side in one lowered network.

    Shapes: points (n, *leaf), whose second axis is the example's own batch axis, of size 1.

    Attributes:
        at: which examples.
        network: between the site and the output.
        points: the value at the site.
    """

    at: slice
    network: Lowered
    points: Tensor

    @property
    def rows(self) -> Tensor:
        """The examples' numbers."""
        return torch.arange(self.at.start, self.at.stop)


def values_at(network: Lowered, points: Tensor) -> dict[Value, Tensor]:
    """Every value of a lowered network where the site's value is `points`, (n, *shape) each."""
    held: dict[Value, Tensor] = {}
    for value in network.values:
        if value.rule is None:
            held[value] = points
        else:
            held[value] = value.rule.forward(*(held[a] for a in value.arguments))
    return held


def walked(network: Lowered, seed: Tensor, step: Step) -> Tensor:
    """What arrives at the site when `seed` (n, *output) starts at the output.

    Raises:
        EngineError: an operator without a rule, by its name.
    """
    arrived = {network.output: seed}
    for value in reversed(network.values):
        if value.rule is None or value not in arrived:
            continue
        try:
            parts = step(value, value.rule, arrived.pop(value))
        except EngineError as e:
            raise EngineError(f"'{value.name}': {e.what}", hint=e.hint) from e
        for argument, part in zip(value.arguments, parts, strict=True):
            before = arrived.get(argument)
            arrived[argument] = part if before is None else before + part
    return arrived[network.leaves[_LEAF]]


@dataclass(eq=False)
class Walk:
    """A network between a site and its score; make one with `Walk.of`.

    Attributes:
        scorer: the checked request: call, metric, site, its value and the live scores.
    """

    scorer: Scorer
    _constants: dict[Node, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, net: Net, inputs: object, target: Metric | Target, at: str | None) -> Walk:
        """As `Scorer.of`, which checks everything.

        Raises:
            InputError, SiteError, TargetError: as there.
            EngineError: the examples of a batch cannot be told apart.
            CaptureError: the network cannot be captured.
        """
        walk = cls(Scorer.of(net, inputs, target, at=at))
        if walk.scorer.num > 1 and not any(BATCH in dims for dims in walk._dims):
            raise EngineError(
                f"{net.name} was made for a batch of {walk.scorer.num}, whose examples cannot be "
                "told apart",
                hint="open it with inputs whose batch may vary, or of one example",
            )
        return walk

    @property
    def _dims(self) -> tuple[tuple[int | str, ...], ...]:
        return self.scorer.net.call_dims(self.scorer.call)

    @cached_property
    def value(self) -> Tensor:
        """The value at the site in float64, (num, *site)."""
        return self.scorer.value.double()

    @cached_property
    def _raw(self) -> Tensor:
        """The whole value that the site is seen in, (num, *raw)."""
        tap = self.scorer.tap
        if tap is None or tap.view == WHOLE:
            return self.value
        address = tap.site.address
        return self.scorer.net.record(self.scorer.call, address).tensor(address).double()

    def placed(self, value: Tensor, at: slice) -> Tensor:
        """Values at the site (n, *site) as points of a lowered network, the rest as it is."""
        tap = self.scorer.tap
        raw = value if tap is None else tap.view.write(self._raw[at], value)
        return raw[:, None]

    def seen(self, points: Tensor) -> Tensor:
        """What arrived at a lowered network's leaf, at the site: (n, *site)."""
        tap = self.scorer.tap
        return points[:, 0] if tap is None else tap.view.read(points[:, 0])

    def pieces(self) -> Iterator[Piece]:
        """All examples, as many at a time as fit into memory."""
        num = self.scorer.num
        if not self._alike:
            for i in range(num):
                at = slice(i, i + 1)
                yield Piece(at, self._lowered(i), self.placed(self.value[at], at))
            return
        network = self._lowered(0)
        each = 8 * sum(torch.Size(v.shape).numel() for v in network.values)
        size = max(1, _MEMORY // max(each, 1))
        for start in range(0, num, size):
            at = slice(start, min(num, start + size))
            yield Piece(at, network, self.placed(self.value[at], at))

    def scored(self, output: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (n,) of outputs (n, *output), and their gradients there."""
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            scores = measured(self.scorer.metric, leaf[:, 0], rows)
            if not scores.requires_grad:
                raise TargetError(
                    "the target has no gradient with respect to the output",
                    hint="a class, or a differentiable function of the output",
                )
            (grads,) = torch.autograd.grad(scores.sum(), leaf)
        return scores.detach(), grads

    def require_live(self, piece: Piece, output: Tensor, scores: Tensor) -> None:
        """The rules must compute what the live network does, to its precision.

        Raises:
            EngineError: they do not.
        """
        live = self.scorer.plain[piece.at].double()
        precision = torch.finfo(self.scorer.plain.dtype).eps ** 0.5
        allowed = precision * (1 + output.flatten(1).abs().amax(1))
        off = (live - scores).abs()
        if bool((off > allowed).any()):
            bad = int((off - allowed).argmax())
            raise EngineError(
                f"the rules of {self.scorer.net.name} do not give what it gives itself",
                got=f"{float(scores[bad]):g} for example {piece.at.start + bad}",
                expected=f"{float(live[bad]):g}",
                hint="in training mode a network differs from its capture: net.module.eval()",
            )

    def operation(self, name: str) -> str:
        """The captured operator that a lowered value of this name was part of."""
        return self._operations.get(name, name)

    @cached_property
    def _operations(self) -> dict[str, str]:
        return {n.address: n.operation for n in self._graph.values()}

    # ---- lowering -----------------------------------------------------------

    @cached_property
    def _graph(self) -> Graph:
        """The captured graph, fused attention written out where the site lies inside it."""
        graph = self.scorer.net.graph_for(self.scorer.call).capture.graph
        if self.scorer.tap is None:
            return graph
        wanted = self.scorer.tap.site.address
        hiding = [
            node.address
            for node in graph.values()
            if node.kind is Kind.OP and node.operation == "attention"
            if wanted in expanded_addresses(node).values()
        ]
        return expanded(graph, hiding) if hiding else graph

    @cached_property
    def _leaf(self) -> Node:
        tap, call = self.scorer.tap, self.scorer.call
        for node in self._graph.nodes:
            if tap is not None and node.address == tap.site.address:
                return node
            real = node.kind is Kind.INPUT and call.tensors()[node.number].is_floating_point()
            if tap is None and real:
                return node
        raise EngineError(
            f"site '{self.scorer.site}' is not in the captured network",
            hint="net.coverage() lists what the graph engine offers",
        )

    @cached_property
    def _output(self) -> Node:
        """The principal output."""
        outputs = self._graph.outputs
        leaves = [torch.zeros(()) if isinstance(n, Node) else n for n in outputs]
        chosen = principal(pytree.tree_unflatten(leaves, self._graph.out_spec))
        for node, leaf in zip(outputs, leaves, strict=True):
            if leaf is chosen and isinstance(node, Node):
                return node
        raise TargetError(f"the output of {self.scorer.net.name} is a constant")

    @cached_property
    def _alike(self) -> bool:
        """Whether nothing between site and output depends on the example in another way."""
        seen: set[Node] = set()
        stack = [self._output]
        while stack:
            node = stack.pop()
            if node in seen or node is self._leaf or node.operation == "sym_size":
                continue
            if node.kind is Kind.INPUT:
                return False
            seen.add(node)
            stack += node.inputs()
        return True

    def _lowered(self, example: int) -> Lowered:
        net, call = self.scorer.net, self.scorer.call
        if self._leaf not in self._graph.upstream([self._output]):
            raise TargetError(
                f"the target does not depend on '{self.scorer.site}' of {net.name}",
                hint="a site before the output",
            )
        one = call.rows(slice(example, example + 1), self._dims)
        given = [_precise(x) for x in one.tensors()]
        try:
            network = lower(
                self._graph,
                self._constant,
                given,
                {self._leaf: _LEAF},
                self._output,
                torch.float64,
            )
        except BoundError as e:
            raise EngineError(
                f"{net.name} cannot be walked over: {e.what.replace('bound rule', 'rule')}",
                got=e.got,
                hint="start at a site behind it (at=...), or take a method that runs the live "
                "network, such as integrated gradients",
            ) from e
        if network.output.shape[0] != 1:
            raise EngineError(
                f"the output of {net.name} has no batch axis in front",
                got=f"shape {network.output.shape} for one example",
            )
        return network

    def _constant(self, node: Node) -> Tensor:
        if node not in self._constants:
            engine = self.scorer.net.graph_for(self.scorer.call)
            self._constants[node] = _precise(engine.constant(node).detach())
        return self._constants[node]


def _precise(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
