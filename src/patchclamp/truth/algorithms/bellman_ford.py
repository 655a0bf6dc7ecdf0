"""Bellman-Ford as message passing: distances from a source, and the tree by least number.

Arcs add their lengths to what they carry, and nodes take the smallest (min-plus):

    distance' = min over itself and arcs u -> v of (distance_u + length)

The parent is read off in the same step. Every node also sends `BASE` times its distance
plus its number, along arcs that add `BASE` times their length. The smallest of
these, less `BASE` times the new distance, is the least number among the neighbours that
attain it. Where none does, as at the source, it is `BASE` or more, and is cut off there.

Distances are kept with `OFFSET` added, so that the rectifier does not cut off negative
ones. Exact after (nodes - 1) steps on directed graphs of fewer than `BASE` nodes with whole
lengths, also negative ones where no cycle is; shortest paths stay above -`OFFSET`.
A node with an output distance of `UNREACHED` / 2 or more has no path to it.
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

BASE = 32.0
"""Above every number of a node. It stands for no parent."""

OFFSET = 512.0
UNREACHED = 2048.0
"""Distance before any path is known. Twice (the largest gain) BASE times UNREACHED + OFFSET
is below `NONE`, and everything is far below 2^24, where float32 stops holding whole numbers."""


def bellman_ford() -> Algorithm:
    """The plan. Features: source, number. Outputs: distance, parent."""
    keep_number = {"number": Unit({"number": 1.0})}
    return Algorithm(
        name="bellman_ford",
        description="shortest distances from a source, and parents",
        features=("source", "number"),
        encode={
            "distance": Unit({"source": -UNREACHED}, OFFSET + UNREACHED),
            **keep_number,
        },
        rounds={
            "step": RoundPlan(
                message={
                    "way": Unit({"distance": 1.0}),
                    "traced": Unit({"distance": BASE, "number": 1.0}),
                },
                update={
                    "distance": Unit({"way": 1.0}),
                    "parent": Unit({"traced": 1.0, "way": -BASE}),
                    "beyond": Unit({"traced": 1.0, "way": -BASE}, -BASE),
                    **keep_number,
                },
                aggregate=Aggregate.MIN,
                scales={"way": 1.0, "traced": BASE},
                sees_itself=frozenset({"way"}),
            )
        },
        readout={
            "distance": Unit({"distance": 1.0}, -OFFSET),
            "parent": Unit({"parent": 1.0, "beyond": -1.0}),
        },
        num_steps=lambda num_nodes: num_nodes - 1,
        graph=partial(random_graph, lengths=(1, 9)),
        draw=source_and_index,
    )
