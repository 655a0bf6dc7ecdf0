"""Residual streams found in a captured graph: who writes into the sums, who reads them.

A *stream value* is a sum of several parts' outputs, such as the residual stream of a
transformer between two blocks. Its *sources* are the summands, followed back through
all additions; its *reads* are what takes it in. Everything is found from the structure of the
graph, so that no list of architectures is needed:

- an addition of two activations that are both (batch, length, width) is part of a
  stream; what is added and is no such addition itself is a source;
- a source that is an output projection of an attention is made of heads, of which each
  is a writer of its own;
- what reads a stream value, up to the next addition, is one region: an attention,
  whose queries, keys and values of every head read for themselves, or anything else
  (an MLP, a norm after the sum, the unembedding), which reads once.

Networks whose norm comes after the sum (post-norm) simply have more streams: the norm
reads one and is the source of the next.

Source of the view of a transformer as writers and readers of one stream: Elhage et al.
2021, "A mathematical framework for transformer circuits".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from patchclamp.core.errors import EngineError
from patchclamp.core.sites import SiteTable, Tap
from patchclamp.engine.attention import Attention
from patchclamp.engine.ir import Graph, Kind, Node

_PROJECTIONS = frozenset({"linear", "addmm", "matmul", "mm"})
_LAYOUT = frozenset({"view", "reshape", "transpose", "permute", "to", "contiguous", "clone"})
_ELEMENTWISE = frozenset(
    {"mul", "pow", "div", "neg", "tanh", "sigmoid", "exp", "erf", "silu", "gelu"}
)
ROLES = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """A linear map with constant weights.

    Attributes:
        node: the operator.
        data: what it is applied to.
        weight, bias: its constants.
        transposed: the weight is (out, in), as `linear` has it.
    """

    node: Node
    data: Node
    weight: Node
    bias: Node | None
    transposed: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A summand of a stream.

    Attributes:
        leaf: what is added.
        value: what is remembered of it: the heads' weighted values (z), or the leaf itself.
        site: its name.
        attention: whose heads write it, for the layout of `value`; None for one writer.
        num_heads: of that attention.
        output: the projection of the heads, side by side.
    """

    leaf: Node
    value: Node
    site: str
    attention: Attention | None = None
    num_heads: int | None = None
    output: Projection | None = None

    @property
    def num_writers(self) -> int:
        """Heads, or 1."""
        return self.num_heads or 1


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The heads' inputs of one role, as features of a projection.

    Attributes:
        role: "q", "k" or "v".
        site: name of the readers' site.
        start, num_heads, head_dim: where they lie in the projection's output.
        projection: see there.
    """

    role: str
    site: str
    start: int
    num_heads: int
    head_dim: int
    projection: Projection


@dataclass(frozen=True, kw_only=True, eq=False)
class Read:
    """A region that takes in one stream value.

    Attributes:
        entry: the stream value.
        sources: indices of its sources.
        consumers: nodes that read `entry` directly and belong to the region.
        region: all nodes of the region.
        slots: queries, keys and values of an attention; empty for a region that reads once.
        site: name of what the region computes.
        feeds: indices of the sources that the region writes.
    """

    entry: Node
    sources: tuple[int, ...]
    consumers: tuple[Node, ...]
    region: frozenset[Node]
    slots: tuple[Slots, ...]
    site: str
    feeds: tuple[int, ...]

    @property
    def num_slots(self) -> int:
        """Readers in this read."""
        return sum(s.num_heads for s in self.slots) or 1


@dataclass(frozen=True, kw_only=True)
class Streams:
    """All sources and reads of a graph, in the order of the forward pass."""

    graph: Graph
    sources: tuple[Source, ...]
    reads: tuple[Read, ...]


def projection(node: Node) -> Projection | None:
    """The node as a linear map with constant weights, where it is one."""
    if node.kind is not Kind.OP or node.operation not in _PROJECTIONS:
        return None
    nodes = [x for x in node.args if isinstance(x, Node)]
    if node.operation == "linear":
        data, weight, bias = nodes[0], nodes[1], nodes[2] if len(nodes) > 2 else None
        bias = bias if bias is not None else _keyword(node, "bias")
    elif node.operation == "addmm":
        if node.kwargs or len(nodes) != 3:
            return None
        bias, data, weight = nodes
    else:
        if len(nodes) != 2:
            return None
        data, weight, bias = nodes[0], nodes[1], None
    if weight.kind is not Kind.CONST or weight.shape is None or len(weight.shape) != 2:
        return None
    if data.kind is Kind.CONST or (bias is not None and bias.kind is not Kind.CONST):
        return None
    return Projection(
        node=node,
        data=data,
        weight=weight,
        bias=bias,
        transposed=node.operation == "linear",
    )


def _keyword(node: Node, name: str) -> Node | None:
    value = node.kwargs.get(name)
    return value if isinstance(value, Node) else None


def names_of(graph: Graph, value: Node) -> list[Node]:
    """A value and the tags that stand for it; other parts may read it through them too."""
    found = [value]
    for node in graph.nodes:
        if node.kind is Kind.TAG and node.args[0] in found:
            found.append(node)
    return found


def batch_axis(node: Node) -> int:
    """The axis along which examples lie, possibly together with positions."""
    for axis, size in enumerate(node.shape or ()):
        if isinstance(size, str) and "batch" in size:
            return axis
    raise EngineError(f"'{node.address}' has no batch axis")


def find_streams(graph: Graph, attention: Sequence[Attention], table: SiteTable) -> Streams:
    """Sources and reads of every residual stream of the graph.

    Args:
        graph: the captured network.
        attention: attentions found in it.
        table: for the standard names.

    Raises:
        EngineError: the network has no residual stream, or one whose parts cannot be told apart.
    """
    return _Finder(graph, attention, table).found()


class _Finder:
    """Used once by `find_streams`."""

    def __init__(self, graph: Graph, attention: Sequence[Attention], table: SiteTable) -> None:
        self.graph, self.attention, self.table = graph, attention, table
        self.users = graph.users()
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self.named: dict[str, list[str]] = {}
        for name, alias in table.aliases.items():
            self.named.setdefault(alias.address, []).append(name)
        self.by_address = {n.address: n for n in graph.values()}
        self.adds = self._additions()

    def found(self) -> Streams:
        leaves = self._leaves()
        self.index = {leaf: i for i, leaf in enumerate(leaves)}
        sources = tuple(self._source(leaf) for leaf in leaves)
        reads = tuple(r for value in self._stream_values() for r in self._reads(value, sources))
        if not reads or len(sources) < 2:
            raise EngineError(
                f"{self.table.network} has no residual stream that several parts write into",
                hint="for plain stacks of linear and convolutional layers use the layered wiring",
            )
        return Streams(graph=self.graph, sources=sources, reads=reads)

    # ---- sums ----------------------------------------------------------------

    def _additions(self) -> set[Node]:
        """Additions of two activations of one shape (batch, length, width).

        The last summands may lack the batch: learned positions do.
        """
        made = set()
        for node in self.graph.nodes:
            if node.kind is not Kind.OP or node.operation != "add" or node.kwargs:
                continue
            parts = [x for x in node.args if isinstance(x, Node)]
            shape = node.shape
            if len(parts) != 2 or shape is None or len(shape) != 3 or not isinstance(shape[2], int):
                continue
            if not all(p.shape is not None and p.shape[-2:] == shape[-2:] for p in parts):
                continue
            if not self._bent(parts[0], parts[1]) and not self._bent(parts[1], parts[0]):
                made.add(node)
        widths = Counter(add.shape[2] for add in made if add.shape is not None)
        width = self._attention_width() or max(widths, key=widths.__getitem__, default=None)
        return {add for add in made if add.shape is not None and add.shape[2] == width}

    def _bent(self, node: Node, source: Node) -> bool:
        """Whether `node` is `source` through elementwise operators only, as in x + c x^3."""
        stack, seen = [node], set()
        while stack:
            x = stack.pop()
            if x in seen:
                continue
            seen.add(x)
            if self._past_tags(x) is self._past_tags(source):
                return True
            if x.kind is Kind.TAG or x.operation in _ELEMENTWISE:
                stack += x.inputs()
        return False

    def _attention_width(self) -> int | None:
        """Width of what attentions write, where there are any."""
        z = {self.by_address.get(a.roles.get("z", "")) for a in self.attention}
        for node in self.graph.nodes:
            made = projection(node)
            if made is not None and self._back_over_layout(made.data) in z and node.shape:
                return int(node.shape[-1])
        return None

    def _past_tags(self, node: Node) -> Node:
        while node.kind is Kind.TAG:
            node = node.args[0]  # type: ignore[assignment]  # a tag has one node
        return node

    def _summands(self, node: Node) -> list[Node]:
        node = self._past_tags(node)
        if node not in self.adds:
            return [node]
        return [x for part in node.inputs() for x in self._summands(part)]

    def _leaves(self) -> list[Node]:
        leaves = {x for add in self.adds for x in self._summands(add)}
        return sorted(leaves, key=self.place.__getitem__)

    def _readers(self, node: Node) -> list[Node]:
        """Users of a value that are no stream additions; tags that only lead to those count not."""
        found = []
        for user in self.users[node]:
            if user in self.adds:
                continue
            if user.kind is Kind.TAG and user.operation == "output":
                found += self._readers(user)
            elif self._leads_on(user):
                found.append(user)
        return found

    def _leads_on(self, node: Node) -> bool:
        """Whether something other than stream additions depends on it; the output counts."""
        if node.kind is not Kind.TAG or node in self.graph.outputs:
            return True
        users = [u for u in self.users[node] if u not in self.adds]
        return any(self._leads_on(u) for u in users)

    def _stream_values(self) -> list[Node]:
        """Sums, and single sources, that something reads."""
        values = [x for x in (*self.adds, *self.index) if self._readers(x)]
        values = [x for x in values if x in self.adds or x.shape is not None]
        return sorted(values, key=self.place.__getitem__)

    # ---- names ---------------------------------------------------------------

    def _name(self, leaf: Node) -> str:
        """The standard name of a value, or the address of the outermost module that gives it."""
        tags, stack = [leaf], [leaf]
        while stack:  # through modules that change nothing, such as dropout
            after = [u for u in self.users[stack.pop()] if u.kind is Kind.TAG]
            stack += after
            tags += [u for u in after if u.operation == "output"]
        for tag in reversed(tags):
            if self.named.get(tag.address):
                return self.named[tag.address][0]
        return tags[-1].address or leaf.path

    # ---- sources -------------------------------------------------------------

    def _source(self, leaf: Node) -> Source:
        made = projection(self._back_over_layout(leaf))
        if made is not None:
            for number, attention in enumerate(self.attention):
                z = self.by_address.get(attention.roles.get("z", ""))
                if z is not None and self._back_over_layout(made.data) is z:
                    return Source(
                        leaf=leaf,
                        value=z,
                        site=self._role_site(number, "z"),
                        attention=attention,
                        num_heads=self._num_heads(attention),
                        output=made,
                    )
        return Source(leaf=leaf, value=leaf, site=self._name(leaf))

    def _back_over_layout(self, node: Node) -> Node:
        while node.kind is Kind.TAG or (node.kind is Kind.OP and node.operation in _LAYOUT):
            node = node.inputs()[0]
        return node

    def _role_site(self, number: int, role: str) -> str:
        """`attn.3.z`, also where an adapter knows the same value under another address."""
        attention = self.attention[number]
        prefixes = [
            name.rpartition(".")[0]
            for name, alias in self.table.aliases.items()
            if name.startswith("attn.")
            and alias.address in (attention.roles.get("pattern"), attention.roles.get("scores"))
        ]
        return f"{prefixes[0] if prefixes else f'attn.{number}'}.{role}"

    def _num_heads(self, attention: Attention) -> int:
        if attention.num_heads is not None:
            return attention.num_heads
        axes, z = attention.axes("z"), self.by_address[attention.roles["z"]]
        size = z.shape[axes.index("head")] if z.shape is not None else None
        if not isinstance(size, int):
            raise EngineError(f"the number of heads of '{attention.module}' is not known")
        return size

    # ---- reads ---------------------------------------------------------------

    def _reads(self, entry: Node, sources: tuple[Source, ...]) -> list[Read]:
        made = []
        if len(entry.shape or ()) != 3 or "batch" not in str((entry.shape or ("",))[0]):
            raise EngineError(
                f"the stream at '{entry.address}' does not lie as (batch, position, unit)",
                got=f"{entry.shape}",
            )
        for consumers, region in self._regions(entry):
            feeds = self._fed(region)
            names = [sources[i].site for i in feeds]
            slots = self._slots(region)
            site = names[0] if names else self._output_site(region)
            made.append(
                Read(
                    entry=entry,
                    sources=tuple(self.index[x] for x in self._summands(entry)),
                    consumers=tuple(consumers),
                    region=frozenset(region),
                    slots=slots,
                    site=site,
                    feeds=tuple(feeds),
                )
            )
        return made

    def _regions(self, entry: Node) -> list[tuple[list[Node], set[Node]]]:
        """Consumers of a stream value, those together whose results meet before the next sum."""
        groups: list[tuple[list[Node], set[Node]]] = []
        for consumer in self._readers(entry):
            region = self._forward(consumer)
            together = [g for g in groups if g[1] & region]
            for g in together:
                groups.remove(g)
            consumers = [c for g in together for c in g[0]] + [consumer]
            groups.append((consumers, region.union(*(g[1] for g in together))))
        return groups

    def _forward(self, start: Node) -> set[Node]:
        """What depends on a node, up to the next stream addition."""
        seen, stack = set(), [start]
        while stack:
            node = stack.pop()
            if node in seen or node in self.adds:
                continue
            seen.add(node)
            if node in self.index and node is not start:
                continue  # a source: what reads it is a read of its own
            stack += self.users[node]
        return seen

    def _fed(self, region: set[Node]) -> list[int]:
        return sorted(self.index[n] for n in region if n in self.index)

    def _output_site(self, region: set[Node]) -> str:
        names = [n for n in ("logits",) if n in self.table.aliases]
        if names and self.by_address.get(self.table.aliases[names[0]].address) in region:
            return names[0]
        return ":output"

    def _slots(self, region: set[Node]) -> tuple[Slots, ...]:
        inside = [
            (number, a)
            for number, a in enumerate(self.attention)
            if self.by_address.get(a.roles.get("z", "")) in region
        ]
        if not inside:
            return ()
        if len(inside) > 1:
            raise EngineError(
                f"two attentions of {self.table.network} read one stream value together",
                got=f"'{inside[0][1].module}' and '{inside[1][1].module}'",
            )
        number, attention = inside[0]
        slots = []
        for role in ROLES:
            node = self.by_address[attention.roles[role]]
            found = self._projection_behind(node, region)
            if found is None:
                raise EngineError(
                    f"the projection that makes the {role} of '{attention.module}' was not found",
                    hint="only linear projections with constant weights can be followed",
                )
            slots.append(self._slot(number, role, found))
        return tuple(slots)

    def _projection_behind(self, node: Node, region: set[Node]) -> Projection | None:
        """The nearest linear map upstream, by the path that stays in the region."""
        stack, seen = [node], set()
        while stack:
            x = stack.pop(0)
            if x in seen or x not in region:
                continue
            seen.add(x)
            made = projection(x)
            if made is not None:
                return made
            stack += x.inputs()
        return None

    def _slot(self, number: int, role: str, made: Projection) -> Slots:
        attention = self.attention[number]
        num_heads = self._num_heads(attention)
        tap = self._alias(self._role_site(number, role))
        if tap is not None and tap.view.split is not None and self._is_of(tap, made):
            start = tap.view.narrow[1] if tap.view.narrow is not None else 0
            heads, dim = tap.view.split[1], tap.shape[-1]
        else:
            start, heads, dim = self._split_after(made, attention, role)
        if not isinstance(dim, int) or (
            heads != num_heads and not attention.grouped and role == "q"
        ):
            raise EngineError(f"the heads of '{attention.module}' do not fit its projections")
        site = self._role_site(number, "z" if heads == num_heads else role)
        return Slots(
            role=role, site=site, start=start, num_heads=heads, head_dim=dim, projection=made
        )

    def _alias(self, name: str) -> Tap | None:
        return self.table[name] if name in self.table.aliases else None

    def _is_of(self, tap: Tap, made: Projection) -> bool:
        node = self.by_address.get(tap.site.address)
        return node is not None and self._back_over_layout(node) is made.node

    def _split_after(
        self, made: Projection, attention: Attention, role: str
    ) -> tuple[int, int, int]:
        """(first feature, heads, head size) from the operator that splits the features.

        A projection that makes queries, keys and values at once is split into three first.
        """
        width = made.node.shape[-1] if made.node.shape is not None else 0
        num_heads, stack = self._num_heads(attention), [made.node]
        while stack and isinstance(width, int):
            node = stack.pop(0)
            for user in self.users[node]:
                shape = user.shape or ()
                if user.operation in ("view", "reshape", "unflatten") and len(shape) >= 3:
                    outer, inner = shape[-2:]
                    if outer == 3 and inner == width // 3 and width % (3 * num_heads) == 0:
                        third = ROLES.index(role) * (width // 3)
                        return third, num_heads, width // (3 * num_heads)
                    if isinstance(outer, int) and isinstance(inner, int) and outer * inner == width:
                        return 0, outer, inner
                if user.kind is Kind.TAG or user.operation in _LAYOUT:
                    stack.append(user)
        raise EngineError(
            f"how the {role} projection of '{attention.module}' is split into heads is not known",
            hint="an adapter in model/adapters that names attn.N.q, attn.N.k and attn.N.v says it",
        )
