"""Graph algorithms compiled into the weights of message-passing networks, exactly.

Source: "Mind The Gap: Deep Learning Doesn't Learn Deeply" (neural compilation of
breadth-first search, depth-first search and Bellman-Ford).
"""

from __future__ import annotations

from collections.abc import Callable

from patchclamp.core.errors import OptionError, nearest
from patchclamp.truth.algorithms.bellman_ford import bellman_ford
from patchclamp.truth.algorithms.bfs import breadth_first
from patchclamp.truth.algorithms.compiling import Algorithm, wire_algorithm
from patchclamp.truth.algorithms.dfs import depth_first
from patchclamp.truth.algorithms.message_passing import MessagePassing, randomised
from patchclamp.truth.planted_circuit import PlantedCircuit

ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "bfs": breadth_first,
    "dfs": depth_first,
    "bellman_ford": bellman_ford,
}
"""Plans by name."""

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "MessagePassing",
    "algorithm",
    "plant_algorithm",
    "randomised",
]


def algorithm(name: str) -> Algorithm:
    """The plan of the algorithm `name`.

    Raises:
        OptionError: there is no such algorithm.
    """
    if name not in ALGORITHMS:
        raise OptionError(f"no algorithm '{name}'", nearest=nearest(name, ALGORITHMS))
    return ALGORITHMS[name]()


def plant_algorithm(name: str, seed: int = 0, num_nodes: int = 5) -> PlantedCircuit:
    """The planted circuit of the algorithm `name` on one random graph.

    Raises:
        OptionError: there is no such algorithm, or fewer than 2 nodes are wanted.
    """
    return wire_algorithm(algorithm(name), seed, num_nodes).planted()
