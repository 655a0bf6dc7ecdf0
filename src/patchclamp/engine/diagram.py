"""A captured graph as a neural circuit diagram: boxes, the values between, and their axes.

Every operator of the graph is in exactly one box. Boxes follow the tree of modules
down to a depth; parts of equal structure, one feeding the next, are drawn once with
their number. Parts are equal if they apply the same operators to the same shapes with
the same options, wired in the same way: names decide nothing. Each wire says which
axes its value has, and along which its reader repeats it; each box says along which
axes it is applied to one index at a time, and whether it is linear. Where an operator
is not known to these rules, the box says that it is not known.

Sizes are no values: operators that only work out sizes are counted in the box that
uses them, without a wire. Source: Abbott 2024 (neural circuit diagrams).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils import _pytree as pytree

from patchclamp.core.document import Architecture, Box, Frame, Wire
from patchclamp.core.errors import OptionError
from patchclamp.engine.axes import name_axes
from patchclamp.engine.ir import Graph, Kind, Node
from patchclamp.engine.parallel import REARRANGING, applied_over, is_linear, origin, repeats

Instance = tuple[str, int]
"""A module's path, and which call of it."""

AxisNames = Mapping[str, tuple[str, ...]]


def diagram(
    graph: Graph,
    *,
    depth: int = 2,
    axes: AxisNames | None = None,
    title: str = "Architecture",
) -> Architecture:
    """Draw a captured graph as plain data.

    Args:
        graph: `net.graph.capture.graph`.
        depth: levels of modules that are opened up; 0 is one box. Lists of modules,
            which are never called themselves, are no level.
        axes: names of axes by address, `{a: s.axes for a, s in net.graph.sites().items()}`;
            without them names follow from shapes alone.

    Raises:
        OptionError: `depth` is negative.

    Source: Abbott 2024.
    """
    if depth < 0:
        raise OptionError("'depth' is negative", got=str(depth), expected="0 or more")
    reading = _Reading.of(graph)
    repeated = _Repeats(reading, depth)
    boxes = _Boxes(reading, repeated, depth, axes or {})
    return Architecture(
        title=title,
        boxes=tuple(boxes.drawn()),
        wires=tuple(boxes.wires()),
        frames=tuple(repeated.frames.values()),
    )


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """The graph without its tags.

    Attributes:
        graph: as captured.
        ops: operators that make values, in order.
        sizes: operators that only work out sizes.
        chains: the calls of modules an operator is in, the network itself first.
        users: who reads an operator's value; None stands for the output.
    """

    graph: Graph
    ops: list[Node]
    sizes: list[Node]
    chains: dict[Node, tuple[Instance, ...]]
    users: dict[Node, list[Node | None]]

    @classmethod
    def of(cls, graph: Graph) -> _Reading:
        users: dict[Node, list[Node | None]] = {node: [] for node in graph.nodes}
        for node in graph.nodes:
            if node.kind is Kind.OP:
                for source in node.inputs():
                    users[origin(source)].append(node)
        for leaf in graph.outputs:
            if isinstance(leaf, Node):
                users[origin(leaf)].append(None)
        ops: list[Node] = []
        sizes: list[Node] = []
        for node in graph.nodes:
            if node.kind is Kind.OP:
                several = any(u is not None and u.operation == "getitem" for u in users[node])
                (ops if node.shape is not None or several else sizes).append(node)
        return cls(graph=graph, ops=ops, sizes=sizes, chains=_chains(graph), users=users)


def _chains(graph: Graph) -> dict[Node, tuple[Instance, ...]]:
    """Modules that were never called (lists, and paths export made up) are left out."""
    called = {node.module for node in graph.nodes if node.kind is Kind.TAG}
    calls: dict[str, int] = {}
    chains: dict[Node, tuple[Instance, ...]] = {}
    for node in graph.nodes:
        if node.kind is Kind.TAG and node.operation == "input":
            calls[node.module] = node.call
        elif node.kind is Kind.OP:
            parts = node.module.split(".")
            paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
            inside = [(p, calls.get(p, 0)) for p in paths if p and p in called]
            chains[node] = (("", 0), *inside)
    return chains


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One call of a module: its operators, what they do, and what they read from outside."""

    instance: Instance
    ops: list[Node]
    structure: list[object]
    slots: list[Node]


class _Repeats:
    """Which operators stand for which: of equal parts in a row, the first is drawn.

    Attributes:
        drawn: for every operator, the one that is drawn for it.
        times: how many operators are drawn as one.
        ranges: what a collapsed part stands for, by its first instance.
        frames: for parts that are drawn opened up.
        frame_of: the innermost frame of an instance.
    """

    def __init__(self, reading: _Reading, depth: int) -> None:
        self.reading, self.depth = reading, depth
        self.hidden = set(reading.sizes)
        self.drawn = {op: op for op in reading.ops}
        self.times: dict[Instance, int] = {}
        self.ranges: dict[Instance, str] = {}
        self.frames: dict[Instance, Frame] = {}
        self._open(reading.ops, 0, "")

    def _open(self, ops: Sequence[Node], level: int, frame: str) -> None:
        """Find repeats among the modules called at this level by what `ops` belong to."""
        if level >= self.depth:
            return
        children: dict[Instance, list[Node]] = {}
        for op in ops:
            chain = self.reading.chains[op]
            if len(chain) > level + 1:
                children.setdefault(chain[level + 1], []).append(op)
        for run in self._runs([self._part(i, own) for i, own in children.items()]):
            first = run[0]
            inside = frame
            if len(run) > 1:
                self._join(run)
                if level + 1 < self.depth and len(first.ops) > 1:
                    inside = f"frame {len(self.frames)}"
                    self.frames[first.instance] = Frame(
                        id=inside, label=self.ranges[first.instance], times=len(run), inside=frame
                    )
            self._open(first.ops, level + 1, inside)

    def _runs(self, parts: Sequence[_Part]) -> list[list[_Part]]:
        runs: list[list[_Part]] = []
        links: list[object] = []
        for part in parts:
            link = self._link(runs[-1][-1], part) if runs else None
            if link is not None and (len(runs[-1]) == 1 or link == links[-1]):
                runs[-1].append(part)
            else:
                runs.append([part])
            links.append(link)
        return runs

    def _link(self, before: _Part, after: _Part) -> list[object] | None:
        """How `after` reads `before`; None unless it is the same thing done to its result."""
        if before.structure != after.structure:
            return None
        own = {op: i for i, op in enumerate(before.ops)}
        allowed = {*before.ops, *after.ops}
        link: list[object] = []
        for old, new in zip(before.slots, after.slots, strict=True):
            if new in own:
                link.append(own[new])
            elif new is old:
                link.append("shared")
            else:
                return None
        read = [u for op in before.ops for u in self.reading.users[op] if u not in self.hidden]
        leaks = any(user not in allowed for user in read)
        return link if not leaks and any(isinstance(x, int) for x in link) else None

    def _join(self, run: Sequence[_Part]) -> None:
        first, last = run[0], run[-1]
        for part in run[1:]:
            for op, shown in zip(part.ops, first.ops, strict=True):
                self.drawn[op] = shown
        self.times[first.instance] = len(run)
        if first.instance[0] == last.instance[0]:
            self.ranges[first.instance] = f"{first.instance[0]}, called {len(run)} times"
        else:
            self.ranges[first.instance] = f"{first.instance[0]} \u2026 {last.instance[0]}"

    def _part(self, instance: Instance, ops: list[Node]) -> _Part:
        inside = {op: i for i, op in enumerate(ops)}
        slots: dict[Node, int] = {}

        def told(x: object) -> object:
            if not isinstance(x, Node):
                return (type(x).__name__, repr(x))  # 1, 1.0 and True are three things
            source = origin(x)
            if source in self.hidden:
                return "size"
            if source in inside:
                return ("own", inside[source])
            if source.kind is Kind.CONST:
                return _constant(source, instance[0])
            return ("slot", slots.setdefault(source, len(slots)), source.shape, source.dtype)

        structure: list[object] = [
            (
                op.target,
                op.module.removeprefix(instance[0]),
                op.shape,
                op.dtype,
                pytree.tree_map(told, (op.args, op.kwargs), is_leaf=lambda x: isinstance(x, Node)),
            )
            for op in ops
        ]
        return _Part(instance=instance, ops=ops, structure=structure, slots=list(slots))


def _constant(node: Node, module: str) -> object:
    """A part's own weights are equal by place and shape; fixed tensors by value too."""
    if node.constant is not None:
        x = node.constant.detach()
        return ("constant", node.shape, str(x.dtype), tuple(x.flatten().tolist()))
    inside = node.path.startswith(f"{module}.")
    return (
        "weight",
        node.path.removeprefix(f"{module}.") if inside else node.path,
        inside,
        node.shape,
    )


@dataclass
class _Content:
    """A box while it is filled."""

    id: str
    key: object
    drawn: list[Node] = field(default_factory=list)
    all: list[Node] = field(default_factory=list)
    feeds: set[str] = field(default_factory=set)


class _Boxes:
    """Fills boxes in the order of the graph, so that no box ever waits for itself."""

    def __init__(self, reading: _Reading, repeats: _Repeats, depth: int, names: AxisNames) -> None:
        self.reading, self.repeats, self.depth, self.names = reading, repeats, depth, names
        self.contents: dict[str, _Content] = {}
        self.box_of: dict[Node, str] = {}
        self.latest: dict[object, str] = {}
        self.inputs = [n for n in reading.graph.nodes if n.kind is Kind.INPUT]
        self.outputs = [origin(x) for x in reading.graph.outputs if isinstance(x, Node)]
        for node in self.inputs:
            self.box_of[node] = f"input {node.number}"
        for op in reading.ops:
            if repeats.drawn[op] is op:
                self._place(op)
        for op in reading.ops:
            self.contents[self.box_of[repeats.drawn[op]]].all.append(op)
        self._place_sizes()

    def _sources(self, op: Node) -> list[Node]:
        """Values that an operator reads and that are computed or given, without sizes."""
        found = [origin(x) for x in op.inputs()]
        return [
            self.repeats.drawn.get(x, x)
            for x in found
            if x in self.repeats.drawn or x.kind is Kind.INPUT
        ]

    def _place(self, op: Node) -> None:
        feeds = {self.box_of[x] for x in self._sources(op)}
        chain = self.reading.chains[op]
        if op.operation == "getitem":  # one of several results stays with what made them
            box = self.contents.get(self.box_of[self._sources(op)[0]])
        else:
            key: object = chain[self.depth] if len(chain) > self.depth else op
            box = self.contents.get(self.latest.get(key, ""))
            if box is not None and any(self._reaches(box.id, f) for f in feeds if f != box.id):
                box = None  # what left the part comes back: a second box for the rest of it
            if box is None:
                box = _Content(id=f"box {len(self.contents)}", key=key)
                self.contents[box.id] = box
                self.latest[key] = box.id
        assert box is not None  # several results are always made by an operator
        box.drawn.append(op)
        box.feeds |= feeds - {box.id}
        self.box_of[op] = box.id

    def _reaches(self, start: str, end: str) -> bool:
        """Whether a value of `start` goes into `end`, by whatever way."""
        seen, stack = set(), [end]
        while stack:
            name = stack.pop()
            if name == start:
                return True
            if name not in seen and name in self.contents:
                seen.add(name)
                stack += self.contents[name].feeds
        return False

    def _place_sizes(self) -> None:
        for op in reversed(self.reading.sizes):
            first = next((u for u in self.reading.users[op] if u is not None), None)
            if first is None:
                name = self.box_of[op] = f"box {len(self.contents)}"
                self.contents[name] = _Content(id=name, key=op, drawn=[op])
            else:
                self.box_of[op] = self.box_of[self.repeats.drawn.get(first, first)]
            self.contents[self.box_of[op]].all.append(op)

    def drawn(self) -> list[Box]:
        """Inputs, operators in the order of the graph, outputs."""
        made = [
            Box(id=self.box_of[n], label=_numbered("input", i, len(self.inputs)), kind="input")
            for i, n in enumerate(self.inputs)
        ]
        made += [self._box(content) for content in self.contents.values()]
        return made + [
            Box(id=f"output {i}", label=_numbered("output", i, len(self.outputs)), kind="output")
            for i in range(len(self.outputs))
        ]

    def _box(self, content: _Content) -> Box:
        chain = self.reading.chains[content.drawn[0]]
        collapsed = content.key if isinstance(content.key, tuple) else None
        ops = [op for op in content.drawn if op.operation != "getitem"]
        kind = "module"
        if len(ops) == 1:
            kind = "rearrange" if ops[0].operation in REARRANGING else "operator"
        frames = [self.repeats.frames[i].id for i in chain if i in self.repeats.frames]
        weights = {
            x.path or str(id(x)): x
            for op in content.all
            for x in map(origin, op.inputs())
            if x.kind is Kind.CONST
        }
        return Box(
            id=content.id,
            label=self._label(content, ops),
            kind=kind,
            operations=tuple(op.address or op.operation for op in content.all),
            times=self._times(collapsed),
            over=_over(ops, self.names),
            linear=_linear(ops),
            num_weights=sum(_numel(x) for x in weights.values()),
            frame=frames[-1] if frames else "",
        )

    def _times(self, key: object) -> int:
        return self.repeats.times.get(key, 1) if isinstance(key, tuple) else 1

    def _label(self, content: _Content, ops: Sequence[Node]) -> str:
        if isinstance(content.key, tuple):
            path, call = content.key
            name = self.repeats.ranges.get(content.key, f"{path}@{call}" if call else path)
            name = name or "the network"
            return f"{name}: {ops[0].operation}" if len(ops) == 1 else name
        path = self.reading.chains[ops[0]][-1][0]
        return f"{path}: {ops[0].operation}" if path else ops[0].operation

    def wires(self) -> list[Wire]:
        """One wire for each value and each box that reads it."""
        broadcast: dict[tuple[Node, str], list[str]] = {}
        for content in self.contents.values():
            for op in content.drawn:
                for source in self._sources(op):
                    if self.box_of[source] != content.id:
                        repeated = broadcast.setdefault((source, content.id), [])
                        own = _named(op, self.names)
                        repeated += [own[i] for i in repeats(source, op) if own[i] not in repeated]
        for i, node in enumerate(self.outputs):
            broadcast[self.repeats.drawn.get(node, node), f"output {i}"] = []
        return [
            Wire(
                source=self.box_of[node],
                target=target,
                value=node.address or node.operation,
                axes=_named(node, self.names),
                sizes=tuple(str(size) for size in node.shape or ()),
                broadcast=tuple(repeated),
            )
            for (node, target), repeated in broadcast.items()
            if node in self.box_of
        ]


def _named(node: Node, names: AxisNames) -> tuple[str, ...]:
    shape = node.shape or ()
    known = names.get(node.address, ())
    return known if len(known) == len(shape) else name_axes(shape, channels=_channels(node))


def _channels(node: Node) -> bool:
    return (
        node.operation in ("conv1d", "conv2d", "conv3d", "batch_norm") and len(node.shape or ()) > 2
    )


def _over(ops: Sequence[Node], names: AxisNames) -> tuple[str, ...] | None:
    """Axes over which every operator is applied one index at a time.

    Of several operators, only axes of open size (batch, length) count: such a size names
    the same axis from one operator to the next, where a number need not.
    """
    if any(op.shape is None or applied_over(op) is None for op in ops):
        return None
    if len(ops) == 1:
        own = _named(ops[0], names)
        return tuple(own[i] for i in applied_over(ops[0]) or ())
    called: dict[str, str] = {}
    for op in ops:
        for size, name in zip(op.shape or (), _named(op, names), strict=True):
            if isinstance(size, str):
                called.setdefault(size, name)
    return tuple(name for size, name in called.items() if all(_goes_along(op, size) for op in ops))


def _goes_along(op: Node, size: str) -> bool:
    """Whether the operator has nothing to do with this axis but to work along it."""
    shape = op.shape or ()
    read = [s for x in op.inputs() for s in x.shape or ()]
    if not any(isinstance(s, str) and size in s for s in (*shape, *read)):
        return True
    return shape.count(size) == 1 and shape.index(size) in (applied_over(op) or ())


def _linear(ops: Sequence[Node]) -> bool:
    plain = [op for op in ops if op.operation not in REARRANGING]
    return bool(plain) and all(is_linear(op) for op in plain)


def _numbered(name: str, i: int, num: int) -> str:
    return name if num == 1 else f"{name} {i}"


def _numel(node: Node) -> int:
    sizes = [size for size in node.shape or () if isinstance(size, int)]
    return int(torch.Size(sizes).numel())
