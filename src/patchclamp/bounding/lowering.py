"""A captured network made into rules: constants computed, perturbed values kept as `Value`s.

The network is lowered for one example, whose batch axis stays as an axis of size 1 (or as it
is, where the network's batch is fixed); sub-problems are stacked in front of it. Whatever does
not depend on something perturbed is computed once and becomes a constant inside a rule, so
that a weight or a hidden activation can be perturbed like an input.

Afterwards neighbouring affine rules are merged where that costs no work.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from patchclamp.core.errors import BoundError
from patchclamp.engine.ir import Graph, Kind, Node
from patchclamp.rules.base import Affine
from patchclamp.rules.conv import Conv
from patchclamp.rules.layout import Reshape
from patchclamp.rules.linear import Linear
from patchclamp.rules.operators.builder import Builder, Operand
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


Rewrite = Callable[[Builder, Operand], Operand]
"""What a value becomes right after it was computed: something perturbed, or something edited."""


def lower(
    graph: Graph,
    constants: Callable[[Node], Tensor],
    example: list[Tensor],
    perturbed: Mapping[Node, str],
    output: Node,
    dtype: torch.dtype = torch.float32,
    *,
    rewrites: Mapping[Node, Sequence[Rewrite]] | None = None,
    exact: bool = False,
    differentiable: bool = False,
) -> Lowered:
    """Lower the part of a graph between what is perturbed and one output.

    Args:
        graph: the network.
        constants: the tensor of a constant node.
        example: the inputs of one call.
        perturbed: nodes whose whole values are perturbed -> the name of each.
        output: the node that is bounded.
        rewrites: what else is done to values, in order; it may make perturbed values too.
        exact: merge rules only where nothing is computed for it, so that no rounding of the
            weights themselves stays unaccounted for.
        differentiable: keep the graph from the constants to the rules.

    Raises:
        BoundError: an operator without a rule; an output that nothing perturbed reaches.
    """
    needed = graph.upstream([output])
    changes = {n: [_replacing(name)] for n, name in perturbed.items()}
    for node, more in (rewrites or {}).items():
        changes[node] = [*changes.get(node, []), *more]
    builder = Builder(dtype, [])
    held: dict[Node, object] = {}
    for node in graph.nodes:
        if node not in needed:
            continue
        with torch.set_grad_enabled(differentiable):
            value = _computed(node, held, builder, constants, example)
            for change in changes.get(node, ()):
                builder.name = node.address or node.path or node.operation
                if not isinstance(value, (Tensor, Value)):
                    raise BoundError(f"'{builder.name}' is not one tensor and cannot be changed")
                value = change(builder, value)
        held[node] = value
    result = held[output]
    leaves = {v.name: v for v in builder.values if v.rule is None}
    live = _reaching(result) if isinstance(result, Value) else set()
    unread = [perturbed[n] for n in perturbed if n not in needed]
    unread += [name for name, leaf in leaves.items() if leaf not in live]
    if not isinstance(result, Value) or unread:
        raise BoundError(
            f"the output '{output.address}' does not depend on what is perturbed",
            got=", ".join(unread) or "nothing perturbed before it",
        )
    return merged(Lowered(tuple(builder.values), leaves, result, dtype), exact=exact)


def _replacing(name: str) -> Rewrite:
    """The value is replaced by a perturbed one."""

    def replace(builder: Builder, value: Operand) -> Operand:
        if not isinstance(value, Tensor):
            raise behind(name)
        return builder.leaf(tuple(value.shape), name)

    return replace


def behind(name: str) -> BoundError:
    """The error for something perturbed that depends on something else perturbed."""
    return BoundError(
        f"'{name}' lies behind another perturbed value, so it has no value of its own to perturb",
        hint="perturb one of the two; a weight and an input can be perturbed together",
    )


_CASTS = {
    torch.ops.aten.to.dtype,
    torch.ops.aten.to.dtype_layout,
    torch.ops.aten._to_copy.default,
}


def _computed(
    node: Node,
    held: dict[Node, object],
    builder: Builder,
    constants: Callable[[Node], Tensor],
    example: list[Tensor],
) -> object:
    if node.kind is Kind.INPUT:
        return example[node.number]
    if node.kind is Kind.CONST:
        value = constants(node)
        return value if torch.is_grad_enabled() else value.detach()

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
    if any(isinstance(x, Value) for x in leaves):
        return _lowered(node, args, kwargs, builder)
    if node.target in _CASTS and node.dtype is not None and node.dtype.is_floating_point:
        return args[0].to(builder.dtype)  # casts between real numbers are the identity here
    return pytree.tree_map(lambda x: _precise(x, builder.dtype), node.target(*args, **kwargs))


def _precise(x: object, dtype: torch.dtype) -> object:
    """Real tensors in the precision of the bounds, whatever an operator makes them in."""
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _lowered(
    node: Node, args: tuple[object, ...], kwargs: dict[str, object], builder: Builder
) -> object:
    builder.name = node.address or node.operation
    if node.dtype is not None and node.dtype.is_floating_point:
        builder.native = node.dtype
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


def merged(network: Lowered, *, exact: bool = False) -> Lowered:
    """Neighbouring affine rules made into one where the product is no larger.

    A linear layer takes up the scaling, shift or reshape before it, and the scaling behind it;
    two linear layers become one where their product has no more weights. The sums are made
    in float64; with `exact`, only what needs no sums is merged.
    """
    users: dict[Value, int] = {network.output: 1}
    for value in network.values:
        for a in value.arguments:
            users[a] = users.get(a, 0) + 1
    kept: list[Value] = []
    for value in network.values:
        while len(value.arguments) == 1 and users.get(value.arguments[0], 0) == 1:
            before = value.arguments[0]
            rule = _product(value, before, exact)
            if rule is None:
                break
            value.rule, value.arguments = rule, before.arguments
            kept.remove(before)
        kept.append(value)
    live = _reaching(network.output)
    kept = [v for v in kept if v in live]
    for number, value in enumerate(kept):
        value.number = number
    return Lowered(tuple(kept), network.leaves, network.output, network.dtype)


def _reaching(output: Value) -> set[Value]:
    seen: set[Value] = set()
    stack = [output]
    while stack:
        value = stack.pop()
        if value not in seen:
            seen.add(value)
            stack += value.arguments
    return seen


def _product(value: Value, before: Value, exact: bool) -> Affine | None:
    """One rule for `before` and then `value`, or None."""
    first, second = before.rule, value.rule
    if before.known is not None or first is None or before.rule is None:
        return None
    if isinstance(second, Reshape) and isinstance(first, Reshape):
        return Reshape(first.before, second.after)
    if exact and not (isinstance(second, Linear) and isinstance(first, Reshape)):
        return None
    if isinstance(second, Linear) and isinstance(first, (Scale, Reshape, Linear)):
        return _into(second, first)
    if isinstance(second, Scale) and isinstance(first, Linear):
        return _onto(second, first)
    if isinstance(second, Scale) and isinstance(first, Scale):
        return _onto_scale(second, first)
    if isinstance(second, Scale) and isinstance(first, Conv):
        return _onto_conv(second, first)
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


def _onto_scale(second: Scale, first: Scale) -> Scale:
    dtype = first.dtype
    factor, shift = (None if c is None else c.double() for c in (first.factor, first.shift))
    if second.factor is not None:
        more = second.factor.double()
        factor = more if factor is None else factor * more
        shift = None if shift is None else shift * more
    if second.shift is not None:
        shift = second.shift.double() if shift is None else shift + second.shift.double()
    return Scale(first.shape, *(None if c is None else c.to(dtype) for c in (factor, shift)))


def _onto_conv(second: Scale, first: Conv) -> Conv | None:
    """Where every channel has one factor and one shift, as in batch norm."""
    num, dtype = first.weight.shape[0], first.weight.dtype
    factor, shift = _by_channel(second.factor, num), _by_channel(second.shift, num)
    one_each = [c is None or bool((c == c[:, :1]).all()) for c in (factor, shift)]
    if first.before[0] != 1 or not all(one_each):
        return None
    weight = first.weight.double()
    bias = weight.new_zeros(num) if first.bias is None else first.bias.double()
    if factor is not None:
        weight = weight * factor[:, 0].reshape(-1, *(1,) * (weight.ndim - 1))
        bias = bias * factor[:, 0]
    if shift is not None:
        bias = bias + shift[:, 0]
    return replace(first, weight=weight.to(dtype), bias=bias.to(dtype))


def _by_channel(x: Tensor | None, num: int) -> Tensor | None:
    return None if x is None else x.double().reshape(num, -1)
