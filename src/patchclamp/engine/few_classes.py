"""The last projection for the classes that a metric reads, which may be few of many.

A metric with an attribute `reads` (class indices) promises that no other class makes a
difference to it. Where the network's output is made by a projection, only those classes
are computed then: of a vocabulary of fifty thousand often two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.ir import Kind, Node
from patchclamp.engine.streams import projection
from patchclamp.engine.targets import Metric


@dataclass(frozen=True, kw_only=True)
class FewClasses:
    """A projection for some of its classes.

    Attributes:
        address: what the projection is applied to.
        classes: that are computed; the others are 0.
        weight, bias: of these classes.
        num_classes: of the output.
        after: addresses of the projection's own values: an edit there is not seen before it.
    """

    address: str
    classes: Tensor
    weight: Tensor
    bias: Tensor | None
    num_classes: int
    after: frozenset[str]

    def logits(self, data: Tensor) -> Tensor:
        """(row, ..., width) to (row, ..., class)."""
        made = data.new_zeros(*data.shape[:-1], self.num_classes)
        made[..., self.classes] = torch.nn.functional.linear(data, self.weight, self.bias)
        return made


def few_classes(engine: GraphEngine, metric: Metric) -> FewClasses | None:
    """Where the metric says which classes it reads, and a projection makes the output."""
    classes = getattr(metric, "reads", None)
    node, after = engine.capture.graph.outputs[0], set()
    while isinstance(node, Node) and node.kind is Kind.TAG:
        after.add(node.address)
        node = node.args[0]
    made = projection(node) if isinstance(node, Node) else None
    if not isinstance(classes, Tensor) or made is None or not made.data.address:
        return None
    weight = engine.constant(made.weight).detach()
    weight = weight if made.transposed else weight.T
    bias = None if made.bias is None else engine.constant(made.bias).detach()
    return FewClasses(
        address=made.data.address,
        classes=classes,
        weight=weight[classes],
        bias=None if bias is None else bias[classes],
        num_classes=weight.shape[0],
        after=frozenset({*after, made.node.address}),
    )
