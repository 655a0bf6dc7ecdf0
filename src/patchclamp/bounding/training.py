"""Certified training: an upper bound of the loss over a box, differentiable in the weights.

The cross-entropy of a label is the log-sum-exp of how far every class lies above it. With
`fused` the sum of exponentials is bounded as one row: each exponential lies below its chord on
the interval of its margin, and the sum of the chords is one linear function of the logits, so
that one row goes backwards instead of one for each class. The logarithm grows and is taken last.

A training step has no use for what rounding can do: this is float32 arithmetic without
allowance. What a network is worth in the end is for `net.bound` to say.

Source: Gowal et al. 2018 (interval bound propagation); Zhang et al. 2020, arXiv 1906.06316
(intervals forwards, the last pass backwards); Xu et al. 2020, arXiv 2002.12920, section 3.3
(loss fusion).
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from patchclamp.bounding.lowering import Lowered, lower
from patchclamp.bounding.propagate import Propagation
from patchclamp.bounding.sets import Box
from patchclamp.core.errors import BoundError, OptionError, nearest
from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.ir import Kind, Node
from patchclamp.model.inputs import BATCH
from patchclamp.rules.base import Affine


class Training(StrEnum):
    """How a loss is bounded: INTERVAL throughout; FUSED with intervals inside and one row
    backwards; CROWN with every layer bounded backwards, and one row."""

    INTERVAL = "interval"
    FUSED = "fused"
    CROWN = "crown"


def certified_loss(
    engine: GraphEngine, box: Box, labels: Tensor, method: Training | str = Training.FUSED
) -> Tensor:
    """An upper bound of the cross-entropy of each example over its box, (N,).

    Shapes: box (N, *input) for a network with one input and logits (batch, class); labels (N,).
    Units: nats. Cost: of lowering the network, a forward pass with intervals and, other than
        for "interval", one row backwards; "crown" goes backwards for every layer.
    Raises: BoundError, for an operator without a rule or an output of another form.
    Fails when: the margins' intervals are so wide that an exponential overflows.

    Args:
        engine: of the network, `net.graph`; its weights are read at every call.
    """
    bounds, chosen = _bounds(engine, box, method)
    top = _above(bounds, labels)
    if chosen is Training.INTERVAL:
        return torch.logsumexp(top, 1)
    own = torch.nn.functional.one_hot(labels, top.shape[1]).to(top.dtype)
    low = -_above(bounds, labels, lowest=True) * (1 - own)
    reference = top.detach().amax(1, keepdim=True)
    at_low, at_top = torch.exp(low - reference), torch.exp(top - reference)
    width = top - low
    flat = width < 1e-6
    slope = torch.where(flat, at_top, (at_top - at_low) / torch.where(flat, 1, width))
    row = slope * (1 - own)
    row = row - own * row.sum(1, keepdim=True)
    output = bounds.network.output
    start = -row.reshape(-1, 1, *output.shape)
    highest = -bounds.linearise({output: start}, start.new_zeros(1, 1)).bound[:, 0]
    total = highest + (at_top - slope * top).sum(1) + (slope * top * own).sum(1)
    return reference[:, 0] + torch.log(total.clamp(min=torch.finfo(total.dtype).tiny))


def certified_margins(
    engine: GraphEngine, box: Box, labels: Tensor, method: Training | str = Training.CROWN
) -> Tensor:
    """The least that the label lies above every class over each box, (N, class); 0 for itself.

    As `certified_loss`; without an allowance for rounding.
    """
    bounds, _ = _bounds(engine, box, method)
    if method == Training.INTERVAL:
        return -_above(bounds, labels)
    output = bounds.network.output
    rows = _rows(labels, torch.Size(output.shape).numel(), box.lower.dtype)
    nothing = rows.new_zeros(1, 1)
    return bounds.linearise({output: -rows.reshape(*rows.shape[:2], *output.shape)}, nothing).bound


def _bounds(engine: GraphEngine, box: Box, method: Training | str) -> tuple[Propagation, Training]:
    if method not in set(Training):
        raise OptionError(
            f"no way '{method}' to bound a loss",
            expected=f"one of {', '.join(Training)}",
            nearest=nearest(str(method), Training),
        )
    network = _lowered(engine, box)
    one = network.leaves["input"].shape
    bounds = Propagation(network, {"input": box.mapped(lambda x: x.reshape(-1, *one))})
    if method == Training.CROWN:
        bounds.run()
    return bounds, Training(method)


def _lowered(engine: GraphEngine, box: Box) -> Lowered:
    graph, dtype = engine.capture.graph, box.lower.dtype
    inputs = [n for n in graph.nodes if n.kind is Kind.INPUT]
    outs = [n for n in graph.outputs if isinstance(n, Node)]
    if len(inputs) != 1 or len(outs) != 1:
        raise BoundError(
            "a certified loss needs one input and one output",
            got=f"{len(inputs)} and {len(outs)}",
        )
    example = box.lower[:1].detach()
    dims = engine.capture.dims[0]
    if dims[0] != BATCH or len(dims) != example.ndim:
        raise BoundError(
            "the box does not fit the network's input",
            got=str(tuple(box.lower.shape)),
            expected=str(dims),
        )
    return lower(
        graph,
        lambda n: _precise(engine.constant(n), dtype),
        [example],
        {inputs[0]: "input"},
        outs[0],
        dtype,
        differentiable=True,
    )


def _precise(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _rows(labels: Tensor, num: int, dtype: torch.dtype) -> Tensor:
    """What takes the label's logit from each: (N, class, class)."""
    one = torch.eye(num, dtype=dtype)
    return one[None] - one[labels][:, None]


def _above(bounds: Propagation, labels: Tensor, *, lowest: bool = False) -> Tensor:
    """The highest that each class lies above the label, (N, class), from intervals alone.

    Or, with `lowest`, minus the lowest. The last affine layer is taken into the rows, which
    keeps what the logits have in common.
    """
    output = bounds.network.output
    num = torch.Size(output.shape).numel()
    rows = _rows(labels, num, bounds.network.dtype) * (-1.0 if lowest else 1.0)
    A, constant, value = rows.reshape(*rows.shape[:2], *output.shape), rows.new_zeros(1, 1), output
    if isinstance(output.rule, Affine) and len(output.arguments) == 1:
        gained = output.rule.constant(A)
        constant = constant if gained is None else constant + gained
        (A,), (value,) = output.rule.backward(A), output.arguments
    low, high = (side.flatten(1)[:, :, None] for side in bounds.interval(value))
    flat = A.flatten(2)
    return constant + (flat.clamp(min=0) @ high + flat.clamp(max=0) @ low)[:, :, 0]
