"""A network whose circuit is known, with the inputs and the metric that the circuit is about.

What all planted circuits share, whatever the network is: transformers compiled from
programs, motifs, small convolutional networks and perceptrons, message passing,
recurrent steps. There are two truths about which edges belong to the circuit, and they
differ:

- **structural**: the construction writes something through this edge that the reader
  reads, and it lies on a way from the input to the output. It follows from the weights
  alone. An edge can be structural and still never matter: a lookup that gives the same
  answer for every value it is asked about, a value that is read where attention never
  looks, a query that only says "everywhere".
- **active**: patching exactly this edge, and nothing else, moves the metric by more
  than `tolerance` on at least one of the pairs in at least one of the two directions.
  It is found by brute force with the network itself, so it is about these pairs.

Noise that a hard variant adds to the weights is no part of either. Scores say which
truth they are against. Names of nodes and edges are those of `patchclamp.core.circuit`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor, nn

from patchclamp.core.circuit import Edge, Node
from patchclamp.core.errors import DataError
from patchclamp.engine.targets import Metric


class Family(StrEnum):
    """What kind of network a circuit was planted in."""

    TRANSFORMER = "transformer"
    MLP = "mlp"
    CNN = "cnn"
    MESSAGE_PASSING = "message passing"
    RECURRENT = "recurrent"


class Truth(StrEnum):
    """Which of the two truths a score is against; see the module docstring."""

    STRUCTURAL = "structural"
    ACTIVE = "active"


@dataclass(frozen=True, kw_only=True, eq=False)
class PlantedCircuit:
    """A network, its pairs of inputs, what is measured, and its true edges.

    Attributes:
        name: of the circuit, unique within its family.
        family: what kind of network this is.
        module: the network, in evaluation mode.
        clean, corrupt: pairs of inputs, alike in shape and type, the first axis being the
            pair. They are drawn so that the parts of the circuit matter in some pair.
        metric: what the circuit is about.
        structural: edges that the construction writes and reads through.
        active: edges whose patching alone moves the metric on some pair.
        tolerance: how far the metric must move for an edge to be called active.
        description: one line about what the network computes.

    Raises:
        DataError: the pairs differ in shape or type, there are none, the module is in
            training mode, or an active edge is not structural.
    """

    name: str
    family: Family
    module: nn.Module
    clean: Tensor
    corrupt: Tensor
    metric: Metric
    structural: frozenset[Edge]
    active: frozenset[Edge]
    tolerance: float
    description: str = ""

    def __post_init__(self) -> None:
        a, b = self.clean, self.corrupt
        if a.shape != b.shape or a.dtype != b.dtype or a.ndim == 0 or a.shape[0] == 0:
            raise DataError(
                f"the pairs of '{self.name}' do not match",
                got=f"{tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}",
                expected="at least one pair, alike in shape and type",
            )
        if self.module.training:
            raise DataError(f"the network of '{self.name}' is in training mode")
        odd = sorted(str(edge) for edge in self.active - self.structural)
        if odd:
            raise DataError(
                f"'{self.name}' has active edges that are not structural",
                got=f"{len(odd)}, the first is {odd[0]}",
            )

    @property
    def num_pairs(self) -> int:
        """How many pairs of inputs there are."""
        return int(self.clean.shape[0])

    def edges(self, truth: Truth | str) -> frozenset[Edge]:
        """The true edges: `Truth.STRUCTURAL` or `Truth.ACTIVE`."""
        return self.structural if Truth(truth) is Truth.STRUCTURAL else self.active

    def nodes(self, truth: Truth | str) -> frozenset[Node]:
        """The nodes that the true edges join."""
        return nodes_of(self.edges(truth))


def nodes_of(edges: Iterable[Edge]) -> frozenset[Node]:
    """Writers and readers of some edges."""
    return frozenset(node for edge in edges for node in (edge.writer, edge.reader))
