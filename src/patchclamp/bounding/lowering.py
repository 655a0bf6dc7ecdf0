"""A captured network made into rules: constants computed, perturbed values kept as `Value`s.

The network is lowered for one example, whose batch axis stays as an axis of size 1 (or as it
is, where the network's batch is fixed); sub-problems are stacked in front of it. Whatever does
not depend on something perturbed is computed once and becomes a constant inside a rule, so
that a weight or a hidden activation can be perturbed like an input.

Afterwards neighbouring affine rules are merged where that costs no work.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from patchclamp.core.errors import BoundError
from patchclamp.engine.ir import Graph, Kind, Node
from patchclamp.rules.layout import Reshape
from patchclamp.rules.linear import Linear
from patchclamp.rules.operators.builder import Builder
from patchclamp.rules.operators.table import TABLE
from patchclamp.rules.sums import Scale
from patchclamp.rules.value import Value


@dataclass(frozen=True)
class Lowered:
    """A network as rules.

    Attributes:
        values: in an order in which they can be computed.
        leaves: what is perturbed, by address.
        output: the value that is bounded.
        dtype: of all constants.
    """

    values: tuple[Value, ...]
    leaves: dict[str, Value]
    output: Value
    dtype: torch.dtype

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output at points (N, *shape) of every perturbed value. Differentiable."""
        held: dict[Value, Tensor] = {}
        last = _last_uses(self.values, self.output)
        for value in self.values:
            if value.rule is None:
                held[value] = inputs[value.name]
            else:
                held[value] = value.rule.forward(*(held[a] for a in value.arguments))
                for a in value.arguments:
                    if last[a] is value:
                        held.pop(a, None)
        return held[self.output]


def _last_uses(values: tuple[Value, ...], output: Value) -> dict[Value, Value]:
    last = {a: v for v in values for a in v.arguments}
    last[output] = output
    return last


def lower(
    graph: Graph,
    constants: Callable[[Node], Tensor],
    example: list[Tensor],
    perturbed: Mapping[Node, str],
    output: Node,
    dtype: torch.dtype = torch.float32,
) -> Lowered:
    """Lower the part of a graph between what is perturbed and one output.

    Args:
        graph: the network.
        constants: the tensor of a constant node.
        example: the inputs of one call.
        perturbed: nodes whose values are perturbed -> the name of each.
        output: the node that is bounded.

    Raises:
        BoundError: an operator without a rule; an output that nothing perturbed reaches.
    """
    needed = graph.upstream([output])
    builder = Builder(dtype, [])
    held: dict[Node, object] = {}
    leaves: dict[str, Value] = {}
    reached: set[Node] = set()
    for node in graph.nodes:
        if node not in needed:
            continue
        value = _computed(node, held, builder, constants, example, node in perturbed)
        reached |= {node} if node in perturbed else set()
        if node in perturbed:
            if not isinstance(value, Tensor):
                raise BoundError(f"'{perturbed[node]}' lies behind another perturbed value")
            leaf = Value(None, (), tuple(value.shape), perturbed[node], len(builder.values))
            builder.values.append(leaf)
            leaves[leaf.name] = leaf
            value = leaf
        held[node] = value
    result = held[output]
    missing = [name for node, name in perturbed.items() if node not in reached]
    if not isinstance(result, Value) or missing:
        raise BoundError(
            f"the output '{output.address}' does not depend on what is perturbed",
            got=", ".join(missing or perturbed.values()),
        )
    return merged(Lowered(tuple(builder.values), leaves, result, dtype))


def _computed(
    node: Node,
    held: dict[Node, object],
    builder: Builder,
    constants: Callable[[Node], Tensor],
    example: list[Tensor],
    perturbed: bool,
) -> object:
    if node.kind is Kind.INPUT:
        return example[node.number]
    if node.kind is Kind.CONST:
        return constants(node)

    def filled(x: object) -> object:
        return held[x] if isinstance(x, Node) else x

    def is_leaf(x: object) -> bool:
        return isinstance(x, (Node, Value))

    args, kwargs = pytree.tree_map(filled, (node.args, node.kwargs), is_leaf=is_leaf)
    if node.kind is Kind.TAG:
        return args[0]
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=is_leaf)
    if node.target is None:
        raise BoundError(f"'{node.address}' calls nothing")
    if not any(isinstance(x, Value) for x in leaves):
        with torch.no_grad():
            return node.target(*args, **kwargs)
    return _lowered(node, args, kwargs, builder)


def _lowered(
    node: Node, args: tuple[object, ...], kwargs: dict[str, object], builder: Builder
) -> object:
    builder.name = node.address or node.operation
    if node.target is operator.getitem and isinstance(args[0], list):
        return args[0][args[1]]  # type: ignore[call-overload]  # an index, as captured
    if node.operation == "sym_size" and isinstance(args[0], Value):
        return args[0].shape[args[1]]  # type: ignore[call-overload]  # an axis, as captured
    build = TABLE.get(node.target)
    if build is None:
        raise builder.refuse(f"operator '{node.target}'")
    try:
        return build(builder, *args, **kwargs)
    except TypeError as e:
        if "argument" not in str(e):
            raise
        raise builder.refuse(f"operator '{node.target}' called in this way ({e})") from e


def merged(network: Lowered) -> Lowered:
    """Neighbouring affine rules made into one where the product is no larger.

    A linear layer takes up the scaling, shift or reshape before it, and the scaling behind it;
    two linear layers become one where their product has no more weights. The sums are made
    in float64.
    """
    users: dict[Value, int] = {network.output: 1}
    for value in network.values:
        for a in value.arguments:
            users[a] = users.get(a, 0) + 1
    swapped: dict[Value, Value] = {}
    kept: list[Value] = []
    for value in network.values:
        value.arguments = tuple(swapped.get(a, a) for a in value.arguments)
        while len(value.arguments) == 1 and users.get(value.arguments[0], 0) == 1:
            before = value.arguments[0]
            rule = _product(value, before)
            if rule is None:
                break
            value.rule, value.arguments = rule, before.arguments
            kept.remove(before)
        kept.append(value)
    output = swapped.get(network.output, network.output)
    live = _reaching(output)
    kept = [v for v in kept if v in live]
    for number, value in enumerate(kept):
        value.number = number
    return Lowered(tuple(kept), network.leaves, output, network.dtype)


def _reaching(output: Value) -> set[Value]:
    seen: set[Value] = set()
    stack = [output]
    while stack:
        value = stack.pop()
        if value not in seen:
            seen.add(value)
            stack += value.arguments
    return seen


def _product(value: Value, before: Value) -> Linear | Reshape | None:
    """One rule for `before` and then `value`, or None."""
    first, second = before.rule, value.rule
    if before.known is not None or first is None or before.rule is None:
        return None
    if isinstance(second, Reshape) and isinstance(first, Reshape):
        return Reshape(first.before, second.after)
    if isinstance(second, Linear) and isinstance(first, (Scale, Reshape, Linear)):
        return _into(second, first)
    if isinstance(second, Scale) and isinstance(first, Linear):
        return _onto(second, first)
    return None


def _into(second: Linear, first: Scale | Reshape | Linear) -> Linear | None:
    dtype = second.weight.dtype
    weight = second.weight.double()
    bias = weight.new_zeros(weight.shape[0]) if second.bias is None else second.bias.double()
    if bias.ndim != 1:
        return None
    if isinstance(first, Reshape):
        one = all(n == 1 for n in (*first.before[:-1], *second.lead))
        return Linear(second.weight, second.bias, first.before[:-1]) if _plain(first, one) else None
    if isinstance(first, Linear):
        one = all(n == 1 for n in second.lead)
        size = first.weight.shape[1] * weight.shape[0]
        if size > first.weight.numel() + weight.numel() or (first.bias is not None and not one):
            return None
        if first.bias is not None:
            bias = bias + weight @ first.bias.double().reshape(-1)
        return Linear((weight @ first.weight.double()).to(dtype), bias.to(dtype), second.lead)
    if any(n != 1 for n in second.lead):
        return None
    if first.shift is not None:
        bias = bias + weight @ first.shift.double().reshape(-1)
    if first.factor is not None:
        weight = weight * first.factor.double().reshape(1, -1)
    return Linear(weight.to(dtype), bias.to(dtype), second.lead)


def _plain(first: Reshape, one: bool) -> bool:
    """The reshape keeps the last axis, and nothing else is larger than 1."""
    return one and first.before[-1] == first.after[-1] and len(first.before) == len(first.after)


def _onto(second: Scale, first: Linear) -> Linear | None:
    dtype, num = first.weight.dtype, first.weight.shape[0]
    if any(n != 1 for n in first.lead):
        return None
    weight = first.weight.double()
    bias = weight.new_zeros(num) if first.bias is None else first.bias.double().reshape(-1)
    if second.factor is not None:
        factor = second.factor.double().reshape(-1)
        weight, bias = weight * factor[:, None], bias * factor
    if second.shift is not None:
        bias = bias + second.shift.double().reshape(-1)
    return Linear(weight.to(dtype), bias.to(dtype), first.lead)
