"""Motifs: the smallest circuits that methods are known to miss, planted among decoys.

Two features A and B, each on or off, are carried by writers to where a motif reads them.

    and         both are on
    or          at least one is on
    xor         exactly one is on
    backup      A is shown; a second writer shows B, but only while A is off
    cancelling  two writers carry A with opposite signs, a third carries B
    inhibition  A is shown unless B is on
    gate        A says whether B is let through (by attention, in a transformer)

Each in two forms. In a *perceptron* units carry the features (`fc0`), units compute the
motif (`fc1`), and `head` reads them. In a *transformer* heads carry the features to the
last place, the perceptron of a later block computes the motif, and one logit reads it;
the residual basis is rotated at random, and the other heads and perceptrons are decoys
of random weights that read everything and write where nothing true reads. `seed` draws
places, sizes, decoys and the rotation.

Which first-order score misses what. A score of an edge is the change of the writer's
part times a slope of the metric with respect to the reader's input. On pairs where
both features are on in the clean input and off in the corrupt one (`Pairs.TOGETHER`):

    motif        slope at clean       slope at corrupt     slopes averaged on the way
    and          sees both            blind: flat          sees both
    or           blind: flat          sees both            sees both
    xor          sees both            sees both            blind: rises as it falls
    backup       blind to its reads   blind to its reads   blind to its reads
    inhibition   blind: flat          blind: flat          blind: flat

The last two compare A with B, and both change together: every point of the way has the
same difference. The table is about transformers, where one perceptron reads for all its units;
in the perceptron form `xor` has two units, and the average sees an edge into either.

Exact patching of one edge has the same problem in one direction alone. On these pairs
noising misses both edges into `or`, the one by which a backup reads B (A still holds it
down), and A's into `inhibition` (B still holds it down); denoising misses both edges
into `and`, the one by which the backup reads A, and B's into `inhibition`. Both
directions together miss none. `cancelling` hides from patching at the features, not
at edges: both parts are as large as B's, and their sum is 0. A gate by attention is
flat in its query wherever it is well open or shut, so that slopes at the ends nearly
miss that edge.

`Pairs.ALL` holds every change of A alone, of B alone and of both, in both orders: slopes
averaged on the way see every edge on some pair, while signed averages over pairs cancel.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from patchclamp.core.errors import OptionError, nearest
from patchclamp.truth.motif_transformer import Gate, StreamPlan, plant_in_stream
from patchclamp.truth.planted_circuit import Family, PlantedCircuit
from patchclamp.truth.planted_layers import ANSWER, answering
from patchclamp.truth.planting import Stage, Unit, feed_forward, generator_of, lay_out
from patchclamp.truth.wiring import Wired


class Form(StrEnum):
    """What kind of network a motif is planted in."""

    MLP = "mlp"
    TRANSFORMER = "transformer"


class Pairs(StrEnum):
    """Which changes of A and B the pairs hold; see the module docstring."""

    ALL = "all"
    TOGETHER = "together"


@dataclass(frozen=True, kw_only=True)
class Motif:
    """What a motif computes, in terms of writers.

    Attributes:
        description: one line.
        carried: feature ("A" or "B") that each writer carries, as 0 or 1.
        units: rectified units that read writers.
        out: weights of the output on units and, directly, on writers.
        bias: of the output.
    """

    description: str
    carried: Mapping[str, str]
    units: Mapping[str, Unit]
    out: Mapping[str, float]
    bias: float = 0.0

    @property
    def direct(self) -> dict[str, float]:
        """Writers that the output reads itself."""
        return {name: weight for name, weight in self.out.items() if name in self.carried}


_AB = {"a": "A", "b": "B"}
# Thresholds lie between the values that occur: at a rectifier's corner, slopes would
# depend on rounding.
_BOTH = Unit({"a": 1.0, "b": 1.0}, -1.5)
_NEITHER = Unit({"a": -1.0, "b": -1.0}, 0.5)

MOTIFS: dict[str, Motif] = {
    "and": Motif(description="A and B", carried=_AB, units={"both": _BOTH}, out={"both": 2.0}),
    "or": Motif(
        description="A or B",
        carried=_AB,
        units={"neither": _NEITHER},
        out={"neither": -2.0},
        bias=1.0,
    ),
    "xor": Motif(
        description="either A or B",
        carried=_AB,
        units={"both": _BOTH, "neither": _NEITHER},
        out={"both": -2.0, "neither": -2.0},
        bias=1.0,
    ),
    "backup": Motif(
        description="A, and B while A is off",
        carried=_AB,
        units={"backup": Unit({"b": 1.0, "a": -1.0}, -0.5)},
        out={"a": 1.0, "backup": 2.0},
    ),
    "cancelling": Motif(
        description="A less A, and B",
        carried={**_AB, "against": "A"},
        units={},
        out={"a": 1.0, "against": -1.0, "b": 1.0},
    ),
    "inhibition": Motif(
        description="A unless B",
        carried=_AB,
        units={"free": Unit({"a": 1.0, "b": -1.0}, -0.5)},
        out={"free": 2.0},
    ),
    "gate": Motif(
        description="B if A",
        carried=_AB,
        units={"through": Unit({"b": 1.0, "a": 4.0}, -3.5)},
        out={"through": 1.0},
    ),
}


def motif(
    name: str,
    seed: int = 0,
    form: Form | str = Form.TRANSFORMER,
    *,
    pairs: Pairs | str = Pairs.ALL,
    repeats: int = 3,
) -> PlantedCircuit:
    """A planted motif.

    Args:
        repeats: pairs of each change, which differ in what is no part of the circuit.

    Raises:
        OptionError: there is no such motif, or no pairs are wanted.
    """
    if name not in MOTIFS:
        raise OptionError(f"no motif '{name}'", nearest=nearest(name, MOTIFS))
    if repeats < 1:
        raise OptionError("a motif needs pairs", got=f"repeats={repeats}", expected="at least 1")
    clean, corrupt = feature_pairs(Pairs(pairs), repeats)
    if Form(form) is Form.MLP:
        return wired_motif(name, seed, clean, corrupt).planted()
    return _in_transformer(name, seed, clean, corrupt)


def feature_pairs(pairs: Pairs, repeats: int) -> tuple[Tensor, Tensor]:
    """Whether A and B are on: clean and corrupt, both (pair, 2), 0 or 1."""
    states = list(itertools.product((0, 1), repeat=2))
    changes = [(x, y) for x in states for y in states if x != y]
    if pairs is Pairs.TOGETHER:
        changes = [((1, 1), (0, 0))]
    table = torch.tensor(changes * repeats)
    return table[:, 0], table[:, 1]


def wired_motif(name: str, seed: int, clean: Tensor, corrupt: Tensor) -> Wired:
    """A motif as a perceptron, for pairs of features (pair, 2)."""
    plan, generator = MOTIFS[name], generator_of(f"motif {name}", seed)
    inputs = lay_out("AB", generator, dead_ends=int(torch.randint(2, 5, (), generator=generator)))
    carry = {writer: Unit({feature: 1.0}) for writer, feature in plan.carried.items()}
    middle = {**plan.units, **{writer: Unit({writer: 1.0}) for writer in plan.direct}}
    stages = {
        "fc0": Stage(units=carry, after=(("act0", nn.ReLU),)),
        "fc1": Stage(units=middle, after=(("act1", nn.ReLU),)),
        "head": Stage(units={ANSWER: Unit(plan.out, plan.bias)}),
    }
    module, wires, out = feed_forward(stages, inputs, generator)

    def drawn(features: Tensor) -> Tensor:
        x = torch.rand(len(features), inputs.size, generator=generator)
        x[:, [inputs.places["A"], inputs.places["B"]]] = features.to(x)
        return x

    both = drawn(clean), drawn(corrupt)
    return answering(
        f"{name}/mlp/{seed}", Family.MLP, module, wires, both, (inputs, out), plan.description
    )


def _in_transformer(name: str, seed: int, clean: Tensor, corrupt: Tensor) -> PlantedCircuit:
    plan, generator = MOTIFS[name], generator_of(f"motif {name} in a stream", seed)
    stream = StreamPlan(carried=plan.carried, units=plan.units, out=plan.out, bias=plan.bias)
    if name == "gate":
        stream = StreamPlan(
            carried={"a": "A"}, units={}, out={}, gate=Gate(opened_by="a", value="B")
        )
    return plant_in_stream(
        f"{name}/transformer/{seed}", plan.description, stream, (clean, corrupt), generator
    )
