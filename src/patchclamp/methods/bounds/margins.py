"""How far a class stands above all others, on boxes of inputs: what claims about classifiers share.

A margin is the logit of a class minus that of another; the class is the network's answer where
all its margins are positive. The network is lowered twice: in float64 with bounds rounded
outwards, which hold over the reals, and in float32, to search with. With edits the lowered
network has the plain logits and behind them the edited ones, computed from one input and
sharing everything before the first edit, so that their difference can be bounded as well.

Source: Zhang et al. 2018 (margins bounded by CROWN); for differences of two networks,
Paulsen et al. 2020 (ReluDiff), here by linear bounds over what both share.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from patchclamp.bounding.edits import editing
from patchclamp.bounding.lowering import Lowered, Rewrite, lower
from patchclamp.bounding.sets import Box
from patchclamp.bounding.ways import Found, Method, Way
from patchclamp.core.edits import Edit
from patchclamp.core.errors import BoundError, InputError
from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.ir import Graph, Kind, Node
from patchclamp.model.inputs import BATCH, Call, principal
from patchclamp.net import Net
from patchclamp.rules.base import Interval, Nonlinear

HOLDS = "the reals, for the network as captured, with its weights taken as exact numbers"

_NAME = "input"
_COEFFICIENTS_PER_SECOND = 5e7
"""Of backward bounds in float64, one thread; only for plans of what fits into a time."""


@dataclass(eq=False)
class Classifier:
    """A network that gives one row of logits for one row of real numbers.

    Shapes: points (N, *shape), shape that of one example with its batch axis of size 1;
        classes (N,); margins (N, K - 1), the other classes in order.

    Attributes:
        net: the opened network.
        call: any call of the form that is bounded.
        edits: applied to the second row of logits.

    Raises: InputError for a network with other inputs or outputs, CaptureError where it
        cannot be captured; BoundError for an operator without a rule, by name.
    """

    net: Net
    call: Call
    edits: Sequence[Edit] = ()

    def __post_init__(self) -> None:
        tensors = self.call.tensors()
        if len(tensors) != 1 or not tensors[0].is_floating_point():
            raise InputError(
                f"{self.net.name} does not take one tensor of real numbers",
                hint="net.bound can perturb a value behind the input, such as the embeddings",
            )
        (self.dims,) = self.engine.capture.dims
        self.varying = self.dims[:1] == (BATCH,)
        if not self.varying and tensors[0].shape[:1] != (1,):
            raise InputError(
                f"{self.net.name} takes no batch of any size, and not one example at a time",
                got=f"inputs of shape {self.dims}",
            )
        shape = self.exact.output.shape
        if len(shape) != 2 or shape[0] != 1 or self.num_classes < 2:
            raise InputError(
                f"{self.net.name} does not put out one row of logits for each input",
                got=f"an output of shape {shape} for one input",
            )

    # ---- the network ----------------------------------------------------------

    @cached_property
    def engine(self) -> GraphEngine:
        """The captured network."""
        return self.net.graph_for(self.call)

    @cached_property
    def exact(self) -> Lowered:
        """In float64, nothing merged that would round a weight."""
        return self._lowered(torch.float64)

    @cached_property
    def fast(self) -> Lowered:
        """In float32."""
        return self._lowered(torch.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example, with its batch axis."""
        return self.exact.leaves[_NAME].shape

    @property
    def num_classes(self) -> int:
        """How many logits there are."""
        return int(self.exact.output.shape[-1]) // (2 if self.edits else 1)

    def _lowered(self, dtype: torch.dtype) -> Lowered:
        graph = self.engine.capture.graph
        output = _principal(graph)
        rewrites: dict[Node, list[Rewrite]] = {}
        if self.edits:
            taps = [(edit, tap) for edit in self.edits for tap in self.net.taps(edit.site)]
            sites = {tap.site.address for _, tap in taps}
            graph, output, copies = beside(graph, output, sites)
            for edit, tap in taps:
                rewrites.setdefault(copies[tap.site.address], []).append(editing(edit, tap))
        (x,) = self.call.tensors()
        example = x[:1].to(dtype)

        def constant(node: Node) -> Tensor:
            held = self.engine.constant(node).detach()
            return held.to(dtype) if held.is_floating_point() else held

        (leaf,) = (n for n in graph.nodes if n.kind is Kind.INPUT)
        return lower(
            graph, constant, [example], {leaf: _NAME}, output, dtype, rewrites=rewrites, exact=True
        )

    # ---- rows of inputs -------------------------------------------------------

    def points(self) -> Tensor:
        """The rows of the call, (N, *shape), in its own precision."""
        (x,) = self.call.tensors()
        return x.reshape(-1, *self.shape)

    def live(self, points: Tensor, edits: Sequence[Edit] = ()) -> Tensor:
        """Classes that the network itself gives, (N,); with edits on its live module."""
        found = []
        for piece in points.split(64 if self.varying else 1):
            call = self.call.mapped([piece.flatten(0, 1)])
            found.append(self.net.run(call, edits=list(edits)).output.argmax(1))
        return torch.cat(found)

    def logits(self, points: Tensor) -> Tensor:
        """In float32, differentiable: (N, K), or with edits (N, 2 K)."""
        return self.fast.forward({_NAME: points.to(torch.float32)}).flatten(1)

    # ---- bounds ---------------------------------------------------------------

    def rows(self, classes: Tensor, *, plain: float = 1.0, edited: float = 0.0) -> Tensor:
        """Rows (N, K - 1, K or 2 K) that read margins; those of both copies weighed and added."""
        K = self.num_classes
        eye = torch.eye(K, dtype=torch.float64)
        others = torch.arange(K).expand(len(classes), K)
        others = others[others != classes[:, None]].reshape(len(classes), K - 1)
        margin = eye[classes][:, None] - eye[others]
        return torch.cat([plain * margin, edited * margin], 2) if self.edits else margin

    def bound(
        self, box: Interval, rows: Tensor, method: Method, *, rounded: bool = True
    ) -> Interval:
        """Bounds of rows of the logits over boxes, (N, R); over the reals if `rounded`.

        Without `rounded` they are float32 numbers that prove nothing.
        """
        network = self.exact if rounded else self.fast
        lower, upper = (side.to(network.dtype) for side in box)
        way = Way(network, {_NAME: Box(lower, upper)}, method, rounded=rounded)
        C = rows.to(network.dtype).reshape(*rows.shape[:2], *network.output.shape)
        found: Found = way.run(C, torch.arange(network.output.shape[-1]))
        return Interval(found.lower, found.upper)

    def is_other(self, points: Tensor, classes: Tensor) -> Tensor:
        """Where another class is proved to stand above, over the reals, and the module says so."""
        x = points.double()
        margins = self.bound(Interval(x, x), self.rows(classes), Method.INTERVAL)
        return (margins.upper < 0).any(1) & (self.live(points) != classes)

    def seconds(self, method: Method) -> float:
        """About how long bounds of one example take in float64; a guess for plans."""
        sizes = [math.prod(v.shape) for v in self.exact.values]
        if method is Method.INTERVAL:
            num = sum(sizes)
        elif method in (Method.FORWARD, Method.FORWARD_CROWN):
            num = 2 * math.prod(self.shape) * sum(sizes)
        else:
            ends = {
                a for v in self.exact.values if isinstance(v.rule, Nonlinear) for a in v.arguments
            }
            num = sum(math.prod(a.shape) * sum(sizes[: a.number + 1]) for a in ends)
        steps = 42 if method is Method.ALPHA else 1
        return steps * (2e-3 + num / _COEFFICIENTS_PER_SECOND)


def around(points: Tensor, radius: Tensor, within: Interval | None) -> Interval:
    """Boxes in float64 that hold every real point within the radius and the limits.

    Args:
        points: (N, *shape).
        radius: (N,).
        within: limits of every element, that broadcast to the points.
    """
    x = points.double()
    r = radius.double().reshape(-1, *(1,) * (x.ndim - 1))
    limit = torch.full_like(x, math.inf)
    lower = torch.where(r > 0, torch.nextafter(x - r, -limit), x)
    upper = torch.where(r > 0, torch.nextafter(x + r, limit), x)
    if within is None:
        return Interval(lower, upper)
    return Interval(
        torch.maximum(lower, within.lower.double()), torch.minimum(upper, within.upper.double())
    )


def limits_of(points: Tensor, within: tuple[Tensor, Tensor] | None) -> Interval | None:
    """Limits in the form of the points.

    Raises: InputError where they do not hold for the points.
    """
    if within is None:
        return None
    low, high = (torch.as_tensor(side).double().expand(points.shape[2:]) for side in within)
    x = points.double()
    if bool((x < low).any()) or bool((x > high).any()):
        raise InputError(
            "rows lie outside the range that was given for them",
            got=f"values from {float(x.min()):g} to {float(x.max()):g}",
            expected=f"values from {float(low.min()):g} to {float(high.max()):g}",
        )
    return Interval(low, high)


def _principal(graph: Graph) -> Node:
    """The node that the network's logits are."""
    leaves = [torch.zeros(()) if isinstance(n, Node) else n for n in graph.outputs]
    chosen = principal(pytree.tree_unflatten(leaves, graph.out_spec))
    node = graph.outputs[next(i for i, x in enumerate(leaves) if x is chosen)]
    if not isinstance(node, Node):
        raise BoundError("the network's output is a constant")
    return node


def beside(graph: Graph, output: Node, sites: set[str]) -> tuple[Graph, Node, dict[str, Node]]:
    """The network and a second copy of what reads some sites, their outputs joined.

    Returns:
        The graph; its output, (batch, 2 K), the copy's logits last; and by address the copies
        of the sites, which nothing outside the copy reads.

    Raises: BoundError for a site that is not in the graph or does not reach the output.
    """
    copies: dict[Node, Node] = {}
    nodes: list[Node] = []
    made: dict[str, Node] = {}
    for node in graph.nodes:
        nodes.append(node)
        if any(n in copies for n in node.inputs()):
            copies[node] = dataclasses.replace(node)
            copies[node].replace_inputs(lambda n: copies.get(n, n))
            nodes.append(copies[node])
        if node.address in sites:
            if node not in copies:  # read what the network computes once, behind a name
                copies[node] = dataclasses.replace(
                    node, kind=Kind.TAG, target=None, args=(node,), kwargs={}
                )
                nodes.append(copies[node])
            made[node.address] = copies[node]
    missing = sites - made.keys()
    if missing or output not in copies:
        name = min(missing) if missing else min(sites)
        why = "is not in the captured network" if missing else "does not reach its output"
        raise BoundError(f"the edited site '{name}' {why}")
    joined = Node(
        Kind.OP,
        operation="cat",
        target=torch.ops.aten.cat.default,
        args=([output, copies[output]], -1),
        dtype=output.dtype,
    )
    return Graph([*nodes, joined], [joined], graph.out_spec), joined, made
