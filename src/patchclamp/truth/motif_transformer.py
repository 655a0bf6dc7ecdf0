"""A motif laid out in a transformer: heads that carry, a perceptron that computes, decoys.

The residual stream is an orthogonal basis, rotated at random: one direction for the
value of a token, one for every place, one for each true writer, one for the answer,
and a few for whatever decoys have to say. True parts read and write the former only;
decoys read everything and write the latter, which only other decoys read.

Tokens: 0 is off, 1 is on, all others are fillers. Each feature has its place; what is
measured is one logit at the last place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.truth.planted_circuit import Family, PlantedCircuit
from patchclamp.truth.planting import Unit
from patchclamp.truth.rasp.edges import edge_effects, structural_edges
from patchclamp.truth.rasp.transformer import PlantedConfig, PlantedTransformer
from patchclamp.truth.wiring import OutputUnit

TOLERANCE = 1e-6
"""In float64, and nothing true has an effect near it."""

NUM_FILLERS = 4
NUM_CLASSES = 3
SHARP = 60.0
"""How far a head's score of its place is above that of other places: e^-60 leaks."""
SOFT = 8.0
"""The same for a gate, so that a slope remains."""
_DECOY_WIDTH = 6


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A head that looks at the value's place while a writer is on, and at a filler otherwise."""

    opened_by: str
    value: str


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """What is written into a transformer; see `patchclamp.truth.motifs.Motif`.

    Attributes:
        carried: feature that each writing head carries.
        units: hidden units of the perceptron, which read writers.
        out: weights of the answer on units and writers.
        bias: of the answer; needs a perceptron.
        gate: a head instead of the perceptron.
    """

    carried: Mapping[str, str]
    units: Mapping[str, Unit]
    out: Mapping[str, float]
    bias: float = 0.0
    gate: Gate | None = None


class Layout:
    """Random sizes and places, and the rotated basis, for one plan."""

    def __init__(self, plan: StreamPlan, generator: torch.Generator) -> None:
        self.plan, self.generator = plan, generator
        self.length = self.pick(4, 7)
        num_layers, num_heads = self.pick(2, 4), self.pick(2, 4)
        self.answer = self.pick(0, NUM_CLASSES)
        places = self.order(self.length - 1)
        self.place = {"A": places[0], "B": places[1]}
        self.sink = places[2]
        # The perceptron comes after all that it reads, the gate after its opener.
        self.depth = self.pick(1, num_layers)
        last = self.depth - 1 if plan.gate else self.depth
        free = [(n, h) for n in range(last + 1) for h in range(num_heads)]
        chosen = self.order(len(free))[: len(plan.carried)]
        self.heads = {w: free[k] for w, k in zip(plan.carried, chosen, strict=True)}
        self.gate = (self.depth, self.pick(0, num_heads)) if plan.gate else None
        names = ["value", "answer", *plan.carried, *(f"place {p}" for p in range(self.length))]
        width = len(names) + _DECOY_WIDTH
        self.config = PlantedConfig(
            vocab=2 + NUM_FILLERS,
            context=self.length,
            width=width,
            mlp_width=self.pick(6, 11),
            num_layers=num_layers,
            num_heads=num_heads,
            head_dim=self.pick(2, 4),
            num_classes=NUM_CLASSES,
            causal=bool(self.pick(0, 2)),
        )
        basis, _ = torch.linalg.qr(self.random(width, width))
        self.directions: dict[str, Tensor] = dict(zip(names, basis, strict=False))
        self.decoys = basis[len(names) :]

    def pick(self, low: int, high: int) -> int:
        """A whole number from `low` to `high` - 1."""
        return int(torch.randint(low, high, (), generator=self.generator))

    def order(self, num: int) -> list[int]:
        """0 to `num` - 1 in random order."""
        found: list[int] = torch.randperm(num, generator=self.generator).tolist()
        return found

    def random(self, *shape: int) -> Tensor:
        """Gaussian numbers."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def at(self, place: int) -> Tensor:
        """Direction of a place."""
        return self.directions[f"place {place}"]


@torch.no_grad()
def build(layout: Layout) -> PlantedTransformer:
    """The network of a layout."""
    module = PlantedTransformer(layout.config)
    module.embed.weight.copy_(layout.random(layout.config.vocab, _DECOY_WIDTH) @ layout.decoys)
    module.embed.weight[1] += layout.directions["value"]
    for place in range(layout.length):
        module.position.weight[place] = layout.at(place) + layout.random(1, _DECOY_WIDTH) @ (
            layout.decoys
        )
    true_heads = {*layout.heads.values(), layout.gate}
    for n in range(layout.config.num_layers):
        for h in range(layout.config.num_heads):
            if (n, h) not in true_heads:
                _decoy_head(layout, module, n, h)
        if n == layout.depth and layout.plan.units:
            _compute(layout, module, n)
        else:
            _decoy_perceptron(layout, module, n)
    for writer, (n, h) in layout.heads.items():
        _carry(layout, module, n, h, layout.plan.carried[writer], layout.directions[writer])
    if layout.plan.gate is not None and layout.gate is not None:
        _gate(layout, module, *layout.gate, layout.plan.gate)
    row = layout.directions["answer"].clone()
    for writer in layout.plan.carried:
        row += layout.plan.out.get(writer, 0.0) * layout.directions[writer]
    module.unembed.weight[layout.answer] = row
    return module.eval()


def _first_row(layout: Layout, h: int) -> int:
    return h * layout.config.head_dim


def _carry(
    layout: Layout, module: PlantedTransformer, n: int, h: int, feature: str, into: Tensor
) -> None:
    """A head that copies, to the last place, the value at the place of a feature."""
    attn, row = module.layer(n).attn, _first_row(layout, h)
    sharp = SHARP * math.sqrt(layout.config.head_dim)
    attn.q_proj.weight[row] = sharp * layout.at(layout.length - 1)
    attn.k_proj.weight[row] = layout.at(layout.place[feature])
    attn.v_proj.weight[row] = layout.directions["value"]
    attn.o_proj.weight[:, row] = into


def _gate(layout: Layout, module: PlantedTransformer, n: int, h: int, gate: Gate) -> None:
    attn, row = module.layer(n).attn, _first_row(layout, h)
    scale = math.sqrt(layout.config.head_dim)
    attn.q_proj.weight[row] = 2 * SOFT * scale * layout.directions[gate.opened_by]
    attn.q_proj.bias[row] = -SOFT * scale
    attn.k_proj.weight[row] = layout.at(layout.place[gate.value])
    attn.q_proj.bias[row + 1] = -SHARP * scale
    for place in range(layout.length):
        if place not in (layout.place[gate.value], layout.sink):
            attn.k_proj.weight[row + 1] += layout.at(place)
    attn.v_proj.weight[row] = layout.directions["value"]
    attn.o_proj.weight[:, row] = layout.directions["answer"]


def _compute(layout: Layout, module: PlantedTransformer, n: int) -> None:
    """The perceptron whose hidden units are the plan's, at random places among unused ones."""
    perceptron, plan = module.layer(n).mlp, layout.plan
    places = layout.order(layout.config.mlp_width)
    for place, (name, unit) in zip(places, plan.units.items(), strict=False):
        for writer, weight in unit.reads.items():
            perceptron.up.weight[place] += weight * layout.directions[writer]
        perceptron.up.bias[place] = unit.bias
        perceptron.down.weight[:, place] = plan.out[name] * layout.directions["answer"]
    perceptron.down.bias.copy_(plan.bias * layout.directions["answer"])


def _decoy_head(layout: Layout, module: PlantedTransformer, n: int, h: int) -> None:
    attn, size = module.layer(n).attn, layout.config.head_dim
    rows = slice(h * size, (h + 1) * size)
    for projection in (attn.q_proj, attn.k_proj, attn.v_proj):
        projection.weight[rows] = layout.random(size, layout.config.width)
        projection.bias[rows] = 0.1 * layout.random(size)
    attn.o_proj.weight[:, rows] = layout.decoys.T @ layout.random(_DECOY_WIDTH, size) / size**0.5


def _decoy_perceptron(layout: Layout, module: PlantedTransformer, n: int) -> None:
    perceptron, hidden = module.layer(n).mlp, layout.config.mlp_width
    perceptron.up.weight.copy_(layout.random(hidden, layout.config.width))
    perceptron.up.bias.copy_(0.1 * layout.random(hidden))
    mixed = layout.random(_DECOY_WIDTH, hidden) / hidden
    perceptron.down.weight.copy_(layout.decoys.T @ mixed)


def tokens(layout: Layout, features: Tensor) -> Tensor:
    """Token ids (pair, length) for features (pair, 2); the rest are random fillers."""
    shape = (len(features), layout.length)
    ids = 2 + torch.randint(NUM_FILLERS, shape, generator=layout.generator)
    ids[:, [layout.place["A"], layout.place["B"]]] = features
    return ids


def plant_in_stream(
    name: str,
    description: str,
    plan: StreamPlan,
    features: Iterable[Tensor],
    generator: torch.Generator,
) -> PlantedCircuit:
    """The planted circuit of a plan, for clean and corrupt features, each (pair, 2)."""
    layout = Layout(plan, generator)
    module = build(layout)
    clean, corrupt = (tokens(layout, x) for x in features)
    metric = OutputUnit(unit=layout.answer, position=layout.length - 1, name=description)
    structural = structural_edges(module)
    effects = edge_effects(module, clean, corrupt, metric, structural)
    return PlantedCircuit(
        name=name,
        family=Family.TRANSFORMER,
        module=module,
        clean=clean,
        corrupt=corrupt,
        metric=metric,
        structural=structural,
        active=frozenset(e for e, effect in effects.items() if effect > TOLERANCE),
        tolerance=TOLERANCE,
        description=description,
    )
