"""Depth-first search as message passing: the sequential algorithm, one move a step.

One node is current. A step moves to its unvisited neighbour of least number, or, where there
is none, closes the node and moves back to its parent. It takes two rounds.

- *ask*: every node offers its number if it is unvisited, and its depth if it is open
  (visited and not closed). The current node takes the best offer as its `child`; if
  there is none it is `shut`, and the deepest open neighbour is `above` it: all open nodes
  are its ancestors, so this is its parent.
- *tell*: the current node sends what it took. An unvisited neighbour whose number is no
  larger than the child's is the child; an open one that is as deep as `above` is the
  parent. Either becomes current. The child takes over number and depth of the sender.

Comparisons need no equality: among neighbours the one that is meant is the extreme one.
What a step adds to a node's record lies in units of its own (`down`, `up`, `new_parent`,
`new_depth`), which all readers add up.

Exact on undirected graphs of fewer than `CAP` - 1 nodes, numbered from 1, after as many
moves as it takes to find them all: at most 2 * nodes - 3. Outputs: parent (0 for the source
and what is not reached), depth (1 for the source, 0 if not reached), and the number
of moves until the node was found (for all that are not found: all moves).
"""

from __future__ import annotations

from functools import partial

from patchclamp.truth.algorithms.compiling import (
    Algorithm,
    RoundPlan,
    random_graph,
    source_and_index,
)
from patchclamp.truth.algorithms.message_passing import Aggregate
from patchclamp.truth.planting import Unit

CAP = 32.0
"""Above every number and depth of a node."""

VETO = 64.0
"""What a condition that does not hold takes away: more than CAP + 1."""

_ASK = RoundPlan(
    message={
        "free": Unit({"number": -1.0, "visited": -CAP, "down": -CAP}, CAP),
        "deep": Unit({"depth": 1.0, "new_depth": 1.0, "open": CAP, "down": CAP}, -CAP),
    },
    update={
        "number": Unit({"number": 1.0}),
        "visited": Unit({"visited": 1.0, "down": 1.0}),
        "open": Unit({"open": 1.0, "down": 1.0}),
        "current": Unit({"down": 1.0, "up": 1.0}),
        "depth": Unit({"depth": 1.0, "new_depth": 1.0}),
        "parent": Unit({"parent": 1.0, "new_parent": 1.0}),
        "moves": Unit({"moves": 1.0}),
        "shut": Unit({"down": 1.0, "up": 1.0, "free": -1.0}),
        "child": Unit({"free": 1.0, "down": CAP, "up": CAP}, -CAP),
        "above": Unit({"deep": 1.0, "free": -CAP, "down": CAP, "up": CAP}, -CAP),
    },
    aggregate=Aggregate.MAX,
    scales={},
)

_IS_CHILD = {"child_code": -1.0, "number": -1.0, "going_down": VETO, "visited": -VETO}
_IS_CHILD_BIAS = 1.0 + CAP - VETO
"""Exactly 1 at the child, otherwise 0 or below."""


def _of_child(source: str, bias: float) -> Unit:
    """A value of the sender, at the child only."""
    reads = {name: CAP * weight for name, weight in _IS_CHILD.items()}
    return Unit({**reads, source: 1.0}, CAP * (_IS_CHILD_BIAS - 1.0) + bias)


_TELL = RoundPlan(
    message={
        "child_code": Unit({"child": 1.0}),
        "going_down": Unit({"current": 1.0, "shut": -1.0}),
        "going_up": Unit({"shut": 1.0}),
        "parent_depth": Unit({"above": 1.0}),
        "my_number": Unit({"number": 1.0, "current": CAP}, -CAP),
        "my_depth": Unit({"depth": 1.0, "current": CAP}, -CAP),
    },
    update={
        "number": Unit({"number": 1.0}),
        "visited": Unit({"visited": 1.0}),
        "open": Unit({"open": 1.0, "shut": -1.0}),
        "depth": Unit({"depth": 1.0}),
        "parent": Unit({"parent": 1.0}),
        "moves": Unit({"moves": 1.0, "visited": -1.0}, 1.0),
        "down": Unit(_IS_CHILD, _IS_CHILD_BIAS),
        "up": Unit(
            {"parent_depth": -1.0, "depth": 1.0, "going_up": VETO, "open": VETO}, 1.0 - 2 * VETO
        ),
        "new_parent": _of_child("my_number", 0.0),
        "new_depth": _of_child("my_depth", 1.0),
    },
    aggregate=Aggregate.MAX,
    scales={},
)


def depth_first() -> Algorithm:
    """The plan. Features: source, number. Outputs: parent, depth, moves."""
    begin = Unit({"source": 1.0})
    return Algorithm(
        name="dfs",
        description="depth-first search: parents, depths and moves",
        features=("source", "number"),
        encode={
            "number": Unit({"number": 1.0}),
            "visited": begin,
            "open": begin,
            "depth": begin,
            "up": begin,
        },
        rounds={"ask": _ASK, "tell": _TELL},
        readout={
            "parent": Unit({"parent": 1.0, "new_parent": 1.0}),
            "depth": Unit({"depth": 1.0, "new_depth": 1.0}),
            "moves": Unit({"moves": 1.0}),
        },
        num_steps=lambda num_nodes: 2 * num_nodes - 3,
        graph=partial(random_graph, both_ways=True),
        draw=source_and_index,
    )
