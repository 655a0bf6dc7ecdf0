"""Attention found by its structure, whatever the modules are called.

A softmax whose input comes from a product of two activations is an attention
pattern: backwards over scaling and masks lies the score product (q, k),
forwards the value product (v, z). A fused attention operator hides all of
this; `expanded` writes it out as separate operators on demand, so that only
requests for the pattern or the scores pay for it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from patchclamp.core.sites import WHOLE, View
from patchclamp.engine.ir import Graph, Kind, Node

_FUSED = "attention"
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "mm"})
_BEFORE_SOFTMAX = frozenset(
    {"mul", "div", "add", "sub", "masked_fill", "where", "to", "clamp", "view", "reshape"}
)
_AFTER_SOFTMAX = frozenset({"to", "mul", "view", "reshape", "dropout", "masked_fill", "expand"})
_ROLES = ("q", "k", "v", "scores", "pattern", "z")


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention found in a graph.

    Attributes:
        module: path of the module it belongs to.
        roles: role ("q", "k", "v", "scores", "pattern", "z") -> address.
        num_heads: where batch and heads share an axis, how many heads there are.
        grouped: keys and values have fewer heads than queries.
        orders: order of the axes of roles that do not lie as (batch, head, position, unit).
    """

    module: str
    roles: dict[str, str]
    num_heads: int | None = None
    grouped: bool = False
    orders: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def axes(self, role: str) -> tuple[str, ...]:
        """Axis names of a role's value, seen through `view(role)`."""
        if role in self.orders:
            return self.orders[role]
        if role in ("scores", "pattern"):
            return ("batch", "head", "query", "key")
        head = "kv_head" if self.grouped and role in ("k", "v") else "head"
        return ("batch", head, "position", "unit")

    def view(self) -> View:
        """How a role's raw value is seen with a head axis of its own."""
        return WHOLE if self.num_heads is None else View(split=(0, -1, self.num_heads))


def expanded_addresses(node: Node) -> dict[str, str]:
    """Addresses that a fused attention operator gains when it is written out."""
    return {role: f"{node.address}.{role}" for role in ("scores", "pattern")}


def find_attention(graph: Graph) -> list[Attention]:
    """Every attention in the graph, in the order of the forward pass."""
    users = graph.users()
    found = []
    for node in graph.nodes:
        if node.kind is not Kind.OP:
            continue
        if node.operation == _FUSED:
            found.append(_fused(node))
        elif node.operation == "softmax":
            attention = _written_out(node, users)
            if attention is not None:
                found.append(attention)
    return found


def _fused(node: Node) -> Attention:
    q, k, v = (_address(x) for x in node.args[:3])
    roles = {"q": q, "k": k, "v": v, "z": node.address, **expanded_addresses(node)}
    return Attention(
        module=node.module,
        roles={r: a for r, a in roles.items() if a},
        grouped=fused_options(node)[3],
    )


def _written_out(softmax: Node, users: dict[Node, list[Node]]) -> Attention | None:
    product = _score_product(softmax)
    if product is None or softmax.shape is None:
        return None
    factors = [x for x in product.inputs() if x.kind is not Kind.CONST][-2:]
    value = _value_product(softmax, users)
    if len(factors) < 2 or value is None:
        return None
    probabilities = _carriers(softmax, users)
    v = next((x for x in value.inputs() if x not in probabilities), None)
    k, turned = _untransposed(factors[1])
    roles = {
        "q": factors[0].address,
        "k": k.address,
        "v": v.address if v is not None else "",
        "scores": _address(softmax.args[0]),
        "pattern": softmax.address,
        "z": value.address,
    }
    orders = {**_einsum_orders(product, "qk", ""), **_einsum_orders(value, "pv", "z")}
    orders.pop("p", None)
    if product.operation != "einsum" and not turned:
        orders["k"] = ("batch", "head", "unit", "position")
    first = softmax.shape[0]
    merged = len(softmax.shape) == 3 and isinstance(first, str) and "*batch" in first
    heads = int(str(first).partition("*")[0]) if merged else None
    if len(softmax.shape) == 3 and heads is None:
        return None
    return Attention(
        module=softmax.module,
        roles={r: a for r, a in roles.items() if a},
        num_heads=heads,
        orders=orders,
    )


def _untransposed(key: Node) -> tuple[Node, bool]:
    """The keys before they were turned for the product, and whether they were."""
    turned, node = False, key
    while node.kind is Kind.OP and node.operation in ("transpose", "mT") and node.shape:
        rank = len(node.shape)
        axes = {int(a) % rank for a in node.args[1:3] if isinstance(a, int)} or {rank - 2, rank - 1}
        source = node.args[0]
        if axes != {rank - 2, rank - 1} or not isinstance(source, Node):
            break
        node, turned = source, not turned
    return (node, True) if turned else (key, False)


def _einsum_orders(node: Node, operands: str, result: str) -> dict[str, tuple[str, ...]]:
    """Axes of the operands and the result of an einsum, from the letters of its equation.

    The scores come as (batch, head, query, key), the pattern likewise.
    """
    if node.operation != "einsum" or not isinstance(node.args[0], str):
        return {}
    left, _, right = node.args[0].replace(" ", "").partition("->")
    letters = dict(zip(operands, left.split(","), strict=False))
    known = letters.get("p", right)
    if "." in node.args[0] or len(known) != 4:
        return {}
    names = dict(zip(known, ("batch", "head", "position", "position"), strict=True))
    letters[result] = right
    return {
        role: tuple(names.get(letter, "unit") for letter in of)
        for role, of in letters.items()
        if role
    }


def _address(x: object) -> str:
    return x.address if isinstance(x, Node) else ""


def _score_product(softmax: Node) -> Node | None:
    """Back over scaling, masks and casts to the product of queries and keys."""
    stack = softmax.inputs()[:1]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.operation in _PRODUCTS:
            return node
        if node.kind is Kind.TAG or node.operation in _BEFORE_SOFTMAX:
            stack += reversed(node.inputs())
    return None


def _carriers(softmax: Node, users: dict[Node, list[Node]]) -> set[Node]:
    """The pattern under all its names: casts, dropout masks, tags."""
    carriers, stack = {softmax}, [softmax]
    while stack:
        for user in users[stack.pop()]:
            passes = user.kind is Kind.TAG or user.operation in _AFTER_SOFTMAX
            if passes and user not in carriers:
                carriers.add(user)
                stack.append(user)
    return carriers


def _value_product(softmax: Node, users: dict[Node, list[Node]]) -> Node | None:
    for carrier in _carriers(softmax, users):
        for user in users[carrier]:
            if user.operation in _PRODUCTS and len(user.inputs()) == 2:
                return user
    return None


def attention_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    grouped: bool,
) -> torch.Tensor:
    """Scores before the softmax: (batch, head, query, key), masks added as -inf or as given.

    Grouped-query attention repeats each key head for its group of query heads.
    """
    if grouped:
        k = repeat_heads(k, q)
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if mask is not None:
        masked = mask.dtype is torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if masked else scores + mask
    return scores


def repeat_heads(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Key or value heads repeated to the number of query heads, on axis -3."""
    return x.repeat_interleave(like.shape[-3] // x.shape[-3], -3)


def attention_values(pattern: torch.Tensor, v: torch.Tensor, grouped: bool) -> torch.Tensor:
    """Weighted values z: (batch, head, position, unit)."""
    return pattern @ (repeat_heads(v, pattern) if grouped else v)


def fused_options(node: Node) -> tuple[object, bool, object, bool]:
    """(mask, is_causal, scale, grouped) of a fused attention operator."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return (
        given.get("attn_mask"),
        bool(given.get("is_causal", False)),
        given.get("scale"),
        bool(given.get("enable_gqa", False)),
    )


def expanded(graph: Graph, which: Collection[str]) -> Graph:
    """A copy of the graph with the fused attention operators at these addresses written out."""
    swap: dict[Node, Node] = {}
    nodes: list[Node] = []

    def add(node: Node) -> Node:
        nodes.append(node)
        return node

    for old in graph.nodes:
        node = Node(**vars(old))
        node.replace_inputs(lambda x: swap[x])
        if old.operation == _FUSED and old.kind is Kind.OP and old.address in which:
            for made in _parts(node):
                add(made)
            swap[old] = nodes[-1]
        else:
            swap[old] = add(node)
    outputs = [swap[x] if isinstance(x, Node) else x for x in graph.outputs]
    return Graph(nodes, outputs, graph.out_spec)


def _parts(node: Node) -> list[Node]:
    """Scores, pattern and weighted values in place of one fused operator."""
    mask, causal, scale, grouped = fused_options(node)
    q, k, v = node.args[:3]
    shape = score_shape(node)
    addresses = expanded_addresses(node)

    def part(address: str, operation: str, target: object, args: tuple[object, ...]) -> Node:
        return Node(
            Kind.OP,
            address=address,
            operation=operation,
            module=node.module,
            call=node.call,
            target=target,  # type: ignore[arg-type]  # each is a function of tensors
            args=args,
            shape=shape,
            dtype=node.dtype,
        )

    scores = part(
        addresses["scores"], "scores", attention_scores, (q, k, mask, causal, scale, grouped)
    )
    pattern = part(addresses["pattern"], "softmax", torch.softmax, (scores, -1))
    z = part(node.address, _FUSED, attention_values, (pattern, v, grouped))
    z.shape = node.shape
    return [scores, pattern, z]


def score_shape(node: Node) -> tuple[int | str, ...] | None:
    """Symbolic shape (batch, head, query, key) of a fused operator's pattern."""
    q, k = node.args[0], node.args[1]
    if not isinstance(q, Node) or not isinstance(k, Node) or not q.shape or not k.shape:
        return None
    return (*q.shape[:-1], k.shape[-2])
