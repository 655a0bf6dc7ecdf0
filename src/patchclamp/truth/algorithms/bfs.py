"""Breadth-first search as message passing: levels, and the tree by least number.

All nodes that were reached tell their neighbours at once, so that step t reaches level
t. Every node counts the steps that it waits, which is its level, and when it is first
reached it takes the least number among the neighbours that reached it as its parent.

    reached' = max over itself and arcs to it of reached
    level'   = level + 1 - reached
    newest'  = least number of a reached neighbour, in the step of being reached, else 0
    parent'  = parent + newest

Exact on directed graphs of fewer than `CAP` nodes numbered from 1, after as many steps as
the longest shortest path. A node that is not reached has parent 0 and the number of
steps as its level.
"""

from __future__ import annotations

from patchclamp.truth.algorithms.compiling import (
    Algorithm,
    RoundPlan,
    random_graph,
    source_and_index,
)
from patchclamp.truth.algorithms.message_passing import Aggregate
from patchclamp.truth.planting import Unit

CAP = 64.0
"""Above every number of a node."""


def breadth_first() -> Algorithm:
    """The plan. Features: source, number. Outputs: level, parent."""
    keep_number = {"number": Unit({"number": 1.0})}
    return Algorithm(
        name="bfs",
        description="breadth-first search: levels and parents",
        features=("source", "number"),
        encode={"reached": Unit({"source": 1.0}), **keep_number},
        rounds={
            "step": RoundPlan(
                message={
                    "hail": Unit({"reached": 1.0}),
                    # Highest for the least number among those reached; 0 for the others.
                    "offer": Unit({"reached": CAP, "number": -1.0}),
                },
                update={
                    "reached": Unit({"hail": 1.0}),
                    "level": Unit({"level": 1.0, "reached": -1.0}, 1.0),
                    "newest": Unit({"hail": CAP, "offer": -1.0, "reached": -CAP}),
                    "parent": Unit({"parent": 1.0, "newest": 1.0}),
                    **keep_number,
                },
                aggregate=Aggregate.MAX,
                scales={},
                sees_itself=frozenset({"hail"}),
            )
        },
        readout={
            "level": Unit({"level": 1.0}),
            "parent": Unit({"parent": 1.0, "newest": 1.0}),
        },
        num_steps=lambda num_nodes: num_nodes - 1,
        graph=random_graph,
        draw=source_and_index,
    )
