"""What all planted circuits share, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from patchclamp.core.circuit import Edge, Node
from patchclamp.core.errors import DataError
from patchclamp.truth.planted_circuit import Family, PlantedCircuit, Truth, nodes_of

FIRST = Edge(Node(":input", 0), Node("0", 1))
SECOND = Edge(Node("0", 1), Node("2", 0))


class Sum:
    """The sum of all outputs."""

    name = "sum"
    position = None

    def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
        return output.sum(1)


def circuit() -> PlantedCircuit:
    return PlantedCircuit(
        name="two layers",
        family=Family.MLP,
        module=nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval(),
        clean=torch.zeros(4, 2),
        corrupt=torch.ones(4, 2),
        metric=Sum(),
        structural=frozenset([FIRST, SECOND]),
        active=frozenset([SECOND]),
        tolerance=1e-3,
    )


def test_the_two_truths_and_their_nodes() -> None:
    planted = circuit()
    assert planted.num_pairs == 4
    assert planted.edges("structural") == {FIRST, SECOND}
    assert planted.edges(Truth.ACTIVE) == {SECOND}
    assert planted.nodes("structural") == {Node(":input", 0), Node("0", 1), Node("2", 0)}
    assert planted.nodes("active") == nodes_of([SECOND]) == {Node("0", 1), Node("2", 0)}


def test_there_is_no_third_truth() -> None:
    with pytest.raises(ValueError, match="causal"):
        circuit().edges("causal")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corrupt": torch.ones(3, 2)}, "do not match"),
        ({"corrupt": torch.ones(4, 2, dtype=torch.int64)}, "do not match"),
        ({"clean": torch.ones(0, 2), "corrupt": torch.ones(0, 2)}, "at least one pair"),
        ({"structural": frozenset([FIRST])}, r"not structural; got 1, the first is 0\[1\]->2\[0\]"),
        ({"module": nn.Dropout()}, "training mode"),
    ],
)
def test_what_cannot_be_a_planted_circuit_is_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        dataclasses.replace(circuit(), **changes)  # type: ignore[arg-type]  # one at a time
