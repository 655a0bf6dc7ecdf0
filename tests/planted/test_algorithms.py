"""Compiled graph algorithms equal the algorithms, on every graph tried, and only through their
true edges."""

from __future__ import annotations

import heapq
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

import patchclamp
from patchclamp.core.circuit import Edge
from patchclamp.core.errors import OptionError
from patchclamp.methods.circuits.network.wiring import wire
from patchclamp.truth.algorithms import (
    ALGORITHMS,
    MessagePassing,
    algorithm,
    plant_algorithm,
    randomised,
)
from patchclamp.truth.algorithms.bellman_ford import BASE, UNREACHED
from patchclamp.truth.algorithms.compiling import Compiled, compiled, random_graph, wire_algorithm
from patchclamp.truth.planted_circuit import Family
from patchclamp.truth.wiring import possible_edges

SIZES = (2, 3, 5, 8, 11)
GRAPHS_A_SIZE = 60
CHANCES = (0.15, 0.3, 0.5, 0.9)

Arcs = list[list[float]]


# ---- the algorithms, in plain Python ----------------------------------------------


def reference(name: str, arcs: Arcs, source: int, number: list[int]) -> list[tuple[float, ...]]:
    """One tuple of outputs for every node, in the order of the plan's outputs."""
    if name == "bfs":
        return by_queue(arcs, source, number, num_steps=len(arcs) - 1)
    if name == "dfs":
        return by_recursion(arcs, source, number, num_moves=2 * len(arcs) - 3)
    return by_heap(arcs, source, number)


def by_queue(arcs: Arcs, source: int, number: list[int], num_steps: int) -> list[tuple[float, ...]]:
    level, front = {source: 0}, [source]
    while front:
        found = {v for u in front for v, x in enumerate(arcs[u]) if x < math.inf} - level.keys()
        level |= dict.fromkeys(found, level[front[0]] + 1)
        front = [*found]
    made = []
    for v in range(len(arcs)):
        above = [number[u] for u in level if arcs[u][v] < math.inf and level[u] + 1 == level.get(v)]
        made.append((level.get(v, max(2, num_steps)), min(above, default=0)))
    return made


def by_recursion(
    arcs: Arcs, source: int, number: list[int], num_moves: int
) -> list[tuple[float, ...]]:
    found: dict[int, tuple[float, ...]] = {}
    moves = 0

    def visit(u: int, parent: int, depth: int) -> None:
        nonlocal moves
        found[u] = (parent, depth, moves)
        for v in sorted(range(len(arcs)), key=lambda node: number[node]):
            if arcs[u][v] < math.inf and v not in found:
                moves += 1
                visit(v, number[u], depth + 1)
                moves += 1

    visit(source, 0, 1)
    return [found.get(v, (0, 0, max(2, num_moves))) for v in range(len(arcs))]


def by_heap(arcs: Arcs, source: int, number: list[int]) -> list[tuple[float, ...]]:
    """Dijkstra, which shares nothing with Bellman-Ford; lengths are above zero."""
    nodes = range(len(arcs))
    distance, queue = {source: 0.0}, [(0.0, source)]
    while queue:
        at, u = heapq.heappop(queue)
        for v in nodes:
            if at == distance[u] and at + arcs[u][v] < distance.get(v, math.inf):
                distance[v] = at + arcs[u][v]
                heapq.heappush(queue, (distance[v], v))
    made = []
    for v in nodes:
        tight = [number[u] for u in distance if distance[u] + arcs[u][v] == distance.get(v)]
        made.append((distance.get(v, UNREACHED), min(tight, default=BASE)))
    return made


# ---- exactness --------------------------------------------------------------------


def batch(name: str, num_nodes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Graphs (row, node, node) of several densities, and features."""
    draw = torch.Generator().manual_seed(seed)
    directed = {"bfs": {}, "dfs": {"both_ways": True}, "bellman_ford": {"lengths": (1, 9)}}[name]
    graphs = [
        random_graph(draw, num_nodes, chance=CHANCES[k % 4], **directed)
        for k in range(GRAPHS_A_SIZE)
    ]
    return torch.stack(graphs), algorithm(name).draw(draw, GRAPHS_A_SIZE, num_nodes)


def outputs(
    name: str, network: Compiled, module: MessagePassing, x: Tensor, graph: Tensor
) -> Tensor:
    plan = algorithm(name)
    with torch.no_grad():
        made = module(network.features(x, plan.features), graph)
    return torch.stack([network.output(made, out) for out in plan.readout], -1)


def expected(name: str, x: Tensor, graphs: Tensor) -> Tensor:
    return torch.tensor(
        [
            reference(
                name, graph.tolist(), int(row[:, 0].argmax()), [int(i) for i in row[:, 1].tolist()]
            )
            for row, graph in zip(x, graphs, strict=True)
        ],
        dtype=torch.float32,
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_outputs_equal_the_algorithm_on_three_hundred_graphs(name: str) -> None:
    num_seen = num_reached = 0
    for seed, num_nodes in enumerate(SIZES):
        graphs, x = batch(name, num_nodes, seed)
        plan = algorithm(name)
        network = compiled(plan, max(2, plan.num_steps(num_nodes)), seed=seed)
        got = outputs(name, network, network.module, x, graphs)
        want = expected(name, x, graphs)
        assert torch.equal(got, want), f"{num_nodes} nodes: {int((got != want).sum())} differ"
        num_seen += len(graphs)
        num_reached += int((got[..., 0] != got[:, :1, 0]).any(1).sum())
    assert num_seen >= 200
    assert num_reached > 0.5 * num_seen  # most graphs have something to find


@pytest.mark.parametrize("name", ALGORITHMS)
def test_control_the_same_weights_shuffled_get_nearly_all_wrong(name: str) -> None:
    graphs, x = batch(name, 8, 0)
    plan = algorithm(name)
    network = compiled(plan, plan.num_steps(8), seed=0)
    want = expected(name, x, graphs)
    for seed in range(3):
        got = outputs(name, network, randomised(network.module, seed), x, graphs)
        assert (got == want).all(-1).float().mean() < 0.1


def test_lengths_below_zero_are_added_like_others() -> None:
    draw, plan = torch.Generator().manual_seed(2), algorithm("bellman_ford")
    num_nodes, graphs = 7, []
    for _ in range(40):
        arcs = random_graph(draw, num_nodes, chance=0.6, lengths=(-9, 9))
        graphs.append(torch.where(torch.ones_like(arcs).triu(1) > 0, arcs, torch.inf))  # no cycle
    x = plan.draw(draw, 40, num_nodes)
    x[..., 0] = torch.nn.functional.one_hot(torch.zeros(40, dtype=torch.int64), num_nodes)
    network = compiled(plan, num_nodes - 1)
    got = outputs("bellman_ford", network, network.module, x, torch.stack(graphs))[..., 0]
    for row, graph in zip(got, graphs, strict=True):
        best = [0.0] + [math.inf] * (num_nodes - 1)
        for v in range(1, num_nodes):  # in topological order
            best[v] = min(best[u] + float(graph[u, v]) for u in range(v))
        assert [d if d < UNREACHED / 2 else math.inf for d in row.tolist()] == best
    assert (got < 0).any()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_path_takes_all_its_steps(name: str) -> None:
    num_nodes = 5
    graph = torch.full((num_nodes, num_nodes), torch.inf)
    for u in range(num_nodes - 1):
        graph[u, u + 1] = graph[u + 1, u] = 1.0
    x = torch.zeros(1, num_nodes, 2)
    x[0, 0, 0], x[0, :, 1] = 1.0, torch.arange(1, num_nodes + 1)
    found = []
    for num_steps in (num_nodes - 2, num_nodes - 1):
        network = compiled(algorithm(name), num_steps)
        made = outputs(name, network, network.module, x, graph)
        found.append(made[0, -1].tolist())
    arrived = {"bfs": [4, 4], "dfs": [4, 5, 4], "bellman_ford": [4, 4]}[name]
    assert found[1] == arrived
    assert found[0] != arrived


# ---- the circuits -----------------------------------------------------------------


def test_the_edges_are_those_of_the_plan() -> None:
    # By hand, 5 nodes and so 4 steps. BFS: 2 encoded, 12 a step, 3 read out, less the 3 that
    # have nothing to add up in the first step and 1 in the second, and 2 unread at the end.
    bfs = plant_algorithm("bfs", num_nodes=5)
    assert len(bfs.structural) == 2 + 4 * 12 + 3 - 3 - 1 - 2
    # Bellman-Ford: 2 encoded, 3 in each step but the last, where parents are read: 8; 3 read out.
    shortest = plant_algorithm("bellman_ford", num_nodes=5)
    assert len(shortest.structural) == 2 + 3 * 3 + 8 + 3
    assert shortest.active == shortest.structural
    assert {e.reader.site for e in shortest.structural} == {
        "encode",
        "readout",
        *(f"step.{part}@{t}" for part in ("message", "update") for t in range(4)),
    }


@pytest.mark.parametrize("name", ["bfs", "bellman_ford"])
@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_but_true_edges_has_any_effect(name: str, seed: int) -> None:
    w = wire_algorithm(algorithm(name), seed, num_nodes=4)
    circuit = w.planted()
    effects = {e: float(v.abs().max()) for e, v in w.effects(possible_edges(w.wires)).items()}
    assert max(v for e, v in effects.items() if e not in circuit.structural) == 0
    assert min(effects[e] for e in circuit.active) >= 0.5  # whole numbers
    assert len(circuit.active) > 10


def test_depth_first_search_has_its_edges_too() -> None:
    w = wire_algorithm(algorithm("dfs"), seed=1, num_nodes=3)
    circuit = w.planted()
    assert circuit.family is Family.MESSAGE_PASSING
    others = sorted(set(possible_edges(w.wires)) - circuit.structural, key=str)
    some = random.Random(0).sample(others, 150)
    assert max(float(v.abs().max()) for v in w.effects(some).values()) == 0
    rounds = {e.reader.site.split("@")[0] for e in circuit.active}
    assert rounds == {
        "encode",
        "ask.message",
        "ask.update",
        "tell.message",
        "tell.update",
        "readout",
    }


@pytest.mark.parametrize("name", ALGORITHMS)
def test_seeds_draw_other_places_and_graphs(name: str) -> None:
    first, second, again = (
        wire_algorithm(algorithm(name), seed, num_nodes=3) for seed in (0, 1, 0)
    )
    assert {e for w in first.wires for e in w.true} != {e for w in second.wires for e in w.true}
    assert torch.equal(first.clean, again.clean)
    for a, b in zip(first.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["bfs", "bellman_ford"])
def test_methods_see_the_same_edges_under_the_same_names(name: str) -> None:
    w = wire_algorithm(algorithm(name), num_nodes=3)
    net = patchclamp.open(w.module, w.clean)
    assert net.capture_error() is None
    seen = wire(net, "layers")
    theirs = {
        Edge(seen.writers[j], seen.readers[i].node, seen.readers[i].slot)
        for i, j in np.argwhere(seen.possible)
    }
    assert theirs == set(possible_edges(w.wires))


# ---- errors -----------------------------------------------------------------------


def test_bad_options_are_refused() -> None:
    with pytest.raises(OptionError, match="bfs"):
        plant_algorithm("bfss")
    with pytest.raises(OptionError, match="nodes"):
        plant_algorithm("bfs", num_nodes=1)
    with pytest.raises(OptionError, match="steps"):
        compiled(algorithm("bfs"), 1)
    with pytest.raises(OptionError, match="no graph"):
        compiled(algorithm("bfs"), 2).module(torch.zeros(1, 3, 3))
