"""Captured graphs as diagrams: nothing lost, axes as captured, repeats by structure."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import patchclamp
from patchclamp.core.document import Architecture, Box
from patchclamp.core.errors import OptionError
from patchclamp.engine.diagram import diagram
from patchclamp.engine.ir import Graph, Kind, Node
from patchclamp.engine.parallel import REARRANGING, applied_over, is_linear, origin, repeats
from patchclamp.net import Net
from tests.networks import SPECIMENS, opened, tiny_llama


def graph_of(net: Net) -> Graph:
    assert net.graph is not None
    return net.graph.capture.graph


def captured(module: nn.Module, x: Tensor | None = None) -> Graph:
    return graph_of(patchclamp.open(module.eval(), torch.rand(3, 4) if x is None else x))


def labels(made: Architecture) -> list[str]:
    return [box.label for box in made.boxes]


def named(made: Architecture, label: str) -> Box:
    (box,) = (box for box in made.boxes if box.label == label)
    return box


class Layer(nn.Module):
    """One layer of a stack; `act` and `width` set its structure."""

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.relu, width: int = 5) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(4, width), nn.Linear(width, 4), act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Stack(nn.Module):
    """Layers one after the other, under the names of the keywords."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("name", SPECIMENS)
def test_every_operator_is_in_exactly_one_box(name: str, depth: int) -> None:
    graph = graph_of(opened(name)[0])
    made = diagram(graph, depth=depth)
    drawn = Counter(op for box in made.boxes for op in box.operations)
    ops = [n for n in graph.nodes if n.kind is Kind.OP]
    assert drawn == Counter(n.address or n.operation for n in ops)
    num_inputs = sum(n.kind is Kind.INPUT for n in graph.nodes)
    assert [b.kind for b in made.boxes].count("input") == num_inputs
    assert [b.kind for b in made.boxes].count("output") == len(graph.outputs)
    if depth == 0:
        assert len(made.boxes) == num_inputs + 1 + len(graph.outputs)


@pytest.mark.parametrize("name", SPECIMENS)
def test_axes_of_wires_are_the_captured_shapes(name: str) -> None:
    net, _ = opened(name)
    graph = graph_of(net)
    assert net.graph is not None
    axes = {address: site.axes for address, site in net.graph.sites().items()}
    shapes = {n.address or n.operation: n.shape for n in graph.nodes if n.kind is not Kind.CONST}
    for depth in (1, 2, 9):
        made = diagram(graph, depth=depth, axes=axes)
        ids = {box.id for box in made.boxes}
        assert made.wires
        for wire in made.wires:
            assert {wire.source, wire.target} <= ids
            assert wire.sizes == tuple(str(size) for size in shapes[wire.value] or ())
            assert len(wire.axes) == len(wire.sizes)
            if wire.value in axes:
                assert wire.axes == axes[wire.value]


@pytest.mark.parametrize("name", ["digits_cnn", "digits_mlp", "lstm", "spiking"])
def test_opened_up_all_the_way_every_value_has_its_wires(name: str) -> None:
    """Without repeats there is a wire for every value that an operator reads."""
    graph = graph_of(opened(name)[0])
    made = diagram(graph, depth=99)
    assert not made.frames
    assert {box.times for box in made.boxes} == {1}
    wires = {(w.value, w.target) for w in made.wires}
    box_of = {op: box.id for box in made.boxes for op in box.operations}
    for node in graph.nodes:
        if node.kind is Kind.OP and node.shape is not None and node.operation != "getitem":
            for source in map(origin, node.inputs()):
                is_value = source.kind is Kind.INPUT or (source.shape and source.kind is Kind.OP)
                if is_value and box_of.get(source.address) != box_of[node.address]:
                    assert (source.address or source.operation, box_of[node.address]) in wires


@pytest.mark.parametrize("name", SPECIMENS)
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_no_box_waits_for_itself(name: str, depth: int) -> None:
    made = diagram(graph_of(opened(name)[0]), depth=depth)
    feeds: dict[str, set[str]] = {box.id: set() for box in made.boxes}
    for wire in made.wires:
        feeds[wire.target].add(wire.source)
    done: set[str] = set()
    while ready := {n for n, needs in feeds.items() if needs <= done} - done:
        done |= ready
    assert done == feeds.keys()


def test_the_same_network_gives_the_same_diagram() -> None:
    for depth in (1, 2, 3):
        once = diagram(captured(Stack(a=Layer(), b=Layer())), depth=depth)
        assert once == diagram(captured(Stack(a=Layer(), b=Layer())), depth=depth)


def test_layers_of_the_language_model_are_drawn_once() -> None:
    graph = graph_of(opened("tiny_lm")[0])
    layers = named(diagram(graph, depth=1), "blocks.0 \u2026 blocks.1")
    assert layers.times == 2
    opened_up = diagram(graph, depth=2)
    (frame,) = opened_up.frames
    assert (frame.label, frame.times) == ("blocks.0 \u2026 blocks.1", 2)
    within = [box for box in opened_up.boxes if box.frame == frame.id]
    assert len(within) == 6
    assert not [label for label in labels(opened_up) if label.startswith("blocks.1")]
    assert sum(len(b.operations) for b in within) == len(layers.operations)
    attention = named(opened_up, "blocks.0.attn")
    assert {op.split(".")[1] for op in attention.operations if "." in op} == {"0", "1"}


def test_layers_that_share_a_mask_and_rotations_collapse() -> None:
    graph = captured(tiny_llama(), torch.randint(0, 97, (2, 7)))
    layers = [box for box in diagram(graph, depth=2).boxes if box.times > 1]
    assert [box.times for box in layers] == [2]


def test_repeats_are_found_by_structure_and_not_by_name() -> None:
    same = diagram(captured(Stack(first=Layer(), x=Layer(), last=Layer())), depth=1)
    assert [(b.label, b.times) for b in same.boxes if b.kind == "module"] == [
        ("first \u2026 last", 3)
    ]
    part = diagram(
        captured(Stack(a=Layer(), b=Layer(), c=Layer(torch.tanh), d=Layer(torch.tanh))), depth=1
    )
    assert [(b.label, b.times) for b in part.boxes if b.kind == "module"] == [
        ("a \u2026 b", 2),
        ("c \u2026 d", 2),
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Layer(torch.relu), Layer(torch.tanh)),
        (Layer(width=5), Layer(width=6)),
        (Layer(lambda x: x.clamp(min=0.0)), Layer(lambda x: x.clamp(min=0.5))),
        (Layer(lambda x: x * 2), Layer(lambda x: x * 2.0)),
    ],
)
def test_parts_that_differ_are_both_drawn(first: nn.Module, second: nn.Module) -> None:
    made = diagram(captured(Stack(layer0=first, layer1=second)), depth=1)
    assert [b.times for b in made.boxes if b.kind == "module"] == [1, 1]


class Sharing(nn.Module):
    """Equal layers, wired so that they are no chain of the same thing."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.layers
        if self.how == "side by side":
            return a(x) + b(x) + c(x)
        if self.how == "read between":
            y = a(x)
            return c(b(y)) + y
        return c(torch.sin(b(torch.sin(a(x)))))


@pytest.mark.parametrize("how", ["side by side", "read between", "something between"])
def test_equal_parts_that_are_no_chain_are_all_drawn(how: str) -> None:
    made = diagram(captured(Sharing(how)), depth=1)
    times = [b.times for b in made.boxes if b.kind == "module"]
    assert times == ([1, 2] if how == "read between" else [1, 1, 1])


class Recurrent(nn.Module):
    """One layer, applied three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(self.layer(x)))


def test_calls_of_one_module_collapse_and_say_so() -> None:
    made = diagram(captured(Recurrent()), depth=1)
    box = named(made, "layer, called 3 times")
    assert box.times == 3
    assert box.num_weights == 4 * 5 + 5 + 5 * 4 + 4


class Around(nn.Module):
    """A module whose own work goes on after another's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(torch.relu(x)))


def test_each_level_opens_up_one_more() -> None:
    graph = captured(nn.Sequential(Around(), nn.Linear(4, 2)))
    assert [labels(diagram(graph, depth=d)) for d in (0, 1, 2)] == [
        ["input", "the network", "output"],
        ["input", "0", "1: linear", "output"],
        ["input", "0: relu", "0.inner: linear", "0: tanh", "1: linear", "output"],
    ]
    with pytest.raises(OptionError, match="negative"):
        diagram(graph, depth=-1)


class Crossing(nn.Module):
    """Two modules that need each other: neither can be one box."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(self.a(x).relu()).relu())


def test_a_part_that_is_left_and_entered_again_is_two_boxes() -> None:
    made = diagram(captured(Crossing()), depth=1)
    assert labels(made) == [
        *("input", "a: linear", "relu", "b: linear", "relu", "a@1: linear", "output")
    ]


class Entered(nn.Module):
    """A block that is called, and then a part of it once more, from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.block.up(torch.sin(self.block(x)))


def test_a_part_that_is_entered_from_outside_does_not_wait_for_itself() -> None:
    made = diagram(captured(Entered()), depth=1)
    assert labels(made) == ["input", "block", "sin", "block: linear", "output"]
    row = [(w.source, w.target) for w in made.wires]
    ids = [box.id for box in made.boxes]
    assert row == [(ids[0], ids[1]), (ids[1], ids[2]), (ids[2], ids[3]), (ids[3], ids[4])]


def test_a_value_that_is_repeated_says_along_which_axis() -> None:
    made = diagram(graph_of(opened("tiny_lm")[0]), depth=1)
    add = named(made, "add").id
    broadcast = {w.axes: w.broadcast for w in made.wires if w.target == add}
    assert broadcast == {("batch", "position", "unit"): (), ("position", "unit"): ("batch",)}
    assert not [w for w in made.wires if w.broadcast and w.target != add]


def test_a_perceptron_is_the_same_for_each_position_and_attention_is_not() -> None:
    made = diagram(graph_of(opened("tiny_lm")[0]), depth=2)
    assert named(made, "blocks.0.mlp").over == ("batch", "position")
    assert named(made, "blocks.0.attn").over == ("batch",)
    assert named(made, "unembed: linear").over == ("batch", "position")
    assert named(diagram(graph_of(opened("lstm")[0]), depth=1), "lstm").over is None


def values(graph: Graph, module: nn.Module, inputs: Tensor) -> dict[Node, object]:
    """Every value of the graph, computed operator by operator."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    env: dict[Node, object] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node.kind is Kind.INPUT:
                env[node] = inputs
            elif node.kind is Kind.CONST:
                env[node] = node.constant if node.constant is not None else state[node.path]
            elif node.kind is Kind.TAG:
                env[node] = env[node.inputs()[0]]
            else:
                env[node] = run(node, env)
    return env


def run(node: Node, env: dict[Node, object]) -> object:
    args, kwargs = pytree.tree_map(
        lambda x: env[x] if isinstance(x, Node) else x,
        (node.args, node.kwargs),
        is_leaf=lambda x: isinstance(x, Node),
    )
    assert node.target is not None
    if node.operation == "view":  # strides are the capture's business, not the diagram's
        return torch.reshape(*args)
    return node.target(*args, **kwargs)


def computed(node: Node) -> list[Node]:
    found = [x for x in node.inputs() if origin(x).kind is not Kind.CONST and x.shape is not None]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("name", SPECIMENS)
def test_operators_work_along_the_axes_they_are_said_to(name: str) -> None:
    """A change of one number changes the result at one index of such an axis, at most."""
    net, inputs = opened(name)
    graph = graph_of(net)
    env = values(graph, net.module, inputs)
    draw = random.Random(0)
    checked = 0
    for node in graph.nodes:
        axes = applied_over(node) if node.kind is Kind.OP else None
        before = env[node]
        if not axes or not isinstance(before, Tensor):
            continue
        for source in computed(node):
            given = env[source]
            assert isinstance(given, Tensor)
            for _ in range(4):
                at = tuple(draw.randrange(n) for n in given.shape)
                other = given.clone()
                other[at] = (given[at] + 1) % 5 if not given.is_floating_point() else given[at] + 1
                with torch.no_grad():
                    after = run(node, {**env, source: other})
                assert isinstance(after, Tensor)
                changed = (after != before).nonzero()
                for axis in set(axes) - set(repeats(source, node)):
                    if node.operation not in REARRANGING:  # an index in for an index out
                        assert before.shape[axis] in given.shape, (node, axis)
                    assert len(changed[:, axis].unique()) <= 1, (node, axis)
                    checked += len(changed) > 0
    assert checked > 10


@pytest.mark.parametrize("name", SPECIMENS)
def test_linear_operators_are_linear_and_the_others_are_not(name: str) -> None:
    net, inputs = opened(name)
    graph = graph_of(net)
    env = values(graph, net.module, inputs)
    seen = Counter()
    for node in graph.nodes:
        reads = computed(node) if node.kind is Kind.OP else []
        floats = [x for x in reads if isinstance(y := env[x], Tensor) and y.is_floating_point()]
        if not reads or len(floats) != len(reads) or not isinstance(env[node], Tensor):
            continue
        torch.manual_seed(0)
        one = {x: torch.randn_like(env[x], dtype=torch.float64) for x in reads}  # type: ignore[call-overload]  # a tensor
        two = {x: torch.randn_like(y) for x, y in one.items()}
        sides = [
            run(node, {**_double(env), **given})
            for given in (
                {x: one[x] + two[x] for x in reads},
                {x: torch.zeros_like(one[x]) for x in reads},
                one,
                two,
            )
        ]
        both, none, first, second = (s for s in sides if isinstance(s, Tensor))
        additive = torch.allclose(both + none, first + second, atol=1e-9)
        if node.operation in REARRANGING or is_linear(node):
            assert additive, node
            seen["linear"] += 1
        elif applied_over(node) is not None:  # of a kind that the rules know
            assert not additive, node
            seen["not linear"] += 1
    assert min(seen["linear"], seen["not linear"] or (name == "lstm")) > 0


def _double(env: dict[Node, object]) -> dict[Node, object]:
    return {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in env.items()
    }
