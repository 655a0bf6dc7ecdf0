"""Edge attribution on planted circuits and on controls, for the kind of network that is audited.

The default method of the circuit section scores the edges of small networks whose
true edges are known; AUROC says how far true edges stand above all others. Then the same
networks get random weights of the same spread, and the same edges, which now mean nothing, are
looked for again: that is the control, and it must not find them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import numpy as np
import torch
from torch import nn

from patchclamp.core.document import Cell, Column, Table
from patchclamp.core.findings import Evidence, Finding, Null, Record, Verdict
from patchclamp.methods.circuits.checking.recovery import auroc
from patchclamp.methods.circuits.finding.edge_attribution import EdgeAttribution
from patchclamp.methods.circuits.network.contrast import Contrast, contrast
from patchclamp.methods.circuits.network.wiring import Wiring, wire
from patchclamp.model.identity import model_hash
from patchclamp.model.sources import load
from patchclamp.net import Net
from patchclamp.truth.motifs import Form, Pairs, motif
from patchclamp.truth.planted_circuit import PlantedCircuit, Truth
from patchclamp.truth.planted_layers import plant_layers

METHOD = "circuits.edge_attribution"
_ENOUGH = 0.95
_CHANCE = (0.25, 0.75)
_NUM_CONTROLS = 4


class Kind(StrEnum):
    """What is planted: heads and perceptrons on a stream, or layers of units and channels."""

    STREAM = "stream"
    LAYERS = "layers"


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """One planted network.

    Attributes:
        name, description: of the circuit.
        num_true, num_edges: edges that matter, and all edges.
        found: AUROC of the scores against the true edges.
        control: the mean of the same over networks of random weights.
        model_hash, data_hash: of the planted network and its pairs.
    """

    name: str
    description: str
    num_true: int
    num_edges: int
    found: float
    control: float
    model_hash: str
    data_hash: str


def kind_of(net: Net) -> Kind | None:
    """The kind that a network is of; None where it cannot be captured."""
    if net.capture_error() is not None:
        return None
    return Kind.STREAM if net.graph.attention else Kind.LAYERS


def passed(trials: tuple[Recovered, ...]) -> bool:
    """Every planted circuit found, and nothing in the controls, taken together."""
    low, high = _CHANCE
    return all(t.found >= _ENOUGH for t in trials) and low <= _control(trials) <= high


def validation(trials: tuple[Recovered, ...]) -> str:
    """What the method was checked on, in words; says so where it failed."""
    names = ", ".join(t.name for t in trials)
    worst = min(t.found for t in trials)
    return (
        f"{METHOD} {'passed' if passed(trials) else 'FAILED'} on {len(trials)} planted circuits "
        f"({names}): AUROC of their active edges at least {worst:.3f}; on the same networks with "
        f"random weights {_control(trials):.2f}"
    )


def finding(trials: tuple[Recovered, ...]) -> Finding:
    """Whether the method may be relied on."""
    controls = [t.control for t in trials]
    return Finding(
        id=f"instrument/{METHOD}",
        claim="Edge attribution ranks the true edges of planted circuits above all others, and "
        "does not in networks of random weights.",
        subject=METHOD,
        effect=sum(t.found for t in trials) / len(trials),
        unit="AUROC",
        null=Null(
            kind="the same networks with random weights",
            mean=_control(trials),
            low=min(controls),
            high=max(controls),
            num=_NUM_CONTROLS * len(trials),
        ),
        evidence=Evidence.VALIDATED,
        verdict=Verdict.HOLDS if passed(trials) else Verdict.DOES_NOT_HOLD,
        over=f"{len(trials)} planted networks of {min(t.num_edges for t in trials)} to "
        f"{max(t.num_edges for t in trials)} edges",
        validation=validation(trials),
        record=Record(
            method=METHOD,
            options={"networks": [t.name for t in trials]},
            model="patchclamp.truth",
            model_hash=trials[0].model_hash,
            data=f"the pairs of {trials[0].name} and the other planted circuits",
            data_hash=trials[0].data_hash,
            metric="AUROC of active edges",
            engine="graph",
        ),
        caveats=("shown on small networks; a large one may hold circuits of other kinds",),
    )


def table(trials: tuple[Recovered, ...]) -> Table:
    """What was planted, and how well it was found."""
    rows: list[tuple[Cell, ...]] = [
        (t.name, t.description, t.num_true, t.num_edges, t.found, t.control) for t in trials
    ]
    return Table(
        title="Edges of planted circuits",
        columns=(
            Column(name="network", title="Network", role="address"),
            Column(name="computes", title="Computes"),
            Column(name="true", title="True edges", role="number"),
            Column(name="edges", title="of edges", role="number"),
            Column(name="auroc", title="AUROC", role="number", help="1: all true edges on top"),
            Column(
                name="control",
                title="with random weights",
                role="number",
                help="0.5: chance; the true edges mean nothing there",
            ),
        ),
        rows=tuple(rows),
        note=f"By {METHOD} with its default options, against the edges that matter when patched.",
    )


@cache
def recovered(kind: Kind) -> tuple[Recovered, ...]:
    """Run the method on planted circuits of this kind; the same every time, so measured once."""
    makers: dict[Kind, tuple[Callable[[], PlantedCircuit], ...]] = {
        # pairs that change both features at once: one direction alone is blind to OR on them
        Kind.STREAM: (lambda: motif("or", pairs=Pairs.TOGETHER), lambda: motif("backup")),
        Kind.LAYERS: (
            lambda: motif("or", form=Form.MLP, pairs=Pairs.TOGETHER),
            lambda: motif("xor", form=Form.MLP),
            lambda: plant_layers("corner"),
        ),
    }
    return tuple(_trial(make(), kind) for make in makers[kind])


def _trial(planted: PlantedCircuit, kind: Kind) -> Recovered:
    net = Net(load(planted.module), planted.clean[:2])
    wiring = wire(net, str(kind))
    pairs = contrast(net, planted.clean, planted.corrupt, planted.metric)
    true = planted.edges(Truth.ACTIVE)
    original = model_hash(planted.module)
    found = _auroc(wiring, pairs, planted)
    controls = []
    for seed in range(_NUM_CONTROLS):  # the captured graph reads the weights as they are now
        _randomise(planted.module, seed)
        controls.append(_auroc(wiring, pairs, planted))
    return Recovered(
        name=planted.name,
        description=planted.description,
        num_true=len(true),
        num_edges=int(wiring.possible.sum()),
        found=found,
        control=sum(controls) / len(controls),
        model_hash=original,
        data_hash=pairs.data_hash,
    )


def _auroc(wiring: Wiring, pairs: Contrast, planted: PlantedCircuit) -> float:
    circuit = EdgeAttribution().run(wiring, pairs).circuit
    true = planted.edges(Truth.ACTIVE)
    is_true = np.array(
        [circuit.edge(int(r), int(w)) in true for r, w in np.argwhere(circuit.possible)]
    )
    return auroc(np.abs(circuit.scores[circuit.possible]), is_true)


def _randomise(module: nn.Module, seed: int) -> None:
    """Random weights, every tensor with the spread that it has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = float(parameter.std()) if parameter.numel() > 1 else 1.0
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))


def _control(trials: tuple[Recovered, ...]) -> float:
    return sum(t.control for t in trials) / len(trials)
