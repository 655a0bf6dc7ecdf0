"""Writing known units into the weights of linear and convolutional layers, among decoys.

A layer is given as named *units*, each saying which units of the layer before it reads
with which weight. `lay_out` gives the units of one layer their random places and
gains; `write` fills an operator's weights. All places that are left over are decoys:

- **dead ends** read everything at random, and no true unit reads them;
- **silent** units read with weights and a bias below zero, and what they read is
  never below zero, so that they are always exactly 0: true units read them at random;
- **constant** units read nothing and are always 1: true units read them at random,
  with a bias that makes up for it.

None of the three can move a true unit: patching their edges changes nothing at all.
What they read must come out of a rectifier, or be inputs that are never below zero.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchclamp.core.errors import OptionError
from patchclamp.truth.wiring import INPUT, Wire, nodes

GAINS = (0.5, 0.8, 1.25, 2.0)
"""Of hidden units, where arithmetic need not be exact."""


@dataclass(frozen=True)
class Unit:
    """What one true unit computes before its rectifier.

    Attributes:
        reads: weight of every unit that it reads, by name; a tensor where one
            weight is not enough (a kernel, or the cells of a flattened map).
        bias: added.
    """

    reads: Mapping[str, float | Tensor]
    bias: float = 0.0


Layer = Mapping[str, Unit]


@dataclass(frozen=True, kw_only=True)
class Space:
    """Where the units of one layer lie.

    Attributes:
        places: index of every true unit.
        gains: factor by which its value in the network is larger than in the plan.
        size: number of units with the decoys.
        silent, constant: decoys of these kinds; all others are dead ends.
    """

    places: Mapping[str, int]
    gains: Mapping[str, float]
    size: int
    silent: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()


def lay_out(
    names: Sequence[str],
    generator: torch.Generator,
    *,
    dead_ends: int = 0,
    silent: int = 0,
    constant: int = 0,
    gains: Sequence[float] = (1.0,),
) -> Space:
    """Random places for the named units and the decoys, and gains drawn from `gains`."""
    size = len(names) + dead_ends + silent + constant
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    drawn = torch.randint(len(gains), (len(names),), generator=generator).tolist()
    first = len(names) + dead_ends
    return Space(
        places=dict(zip(names, order, strict=False)),
        gains={name: gains[k] for name, k in zip(names, drawn, strict=True)},
        size=size,
        silent=tuple(order[first : first + silent]),
        constant=tuple(order[first + silent :]),
    )


def write(
    operator: nn.Linear | nn.Conv2d,
    units: Layer,
    reads: Sequence[Space],
    out: Space,
    generator: torch.Generator,
    *,
    spread: float = 1.0,
) -> frozenset[tuple[int, int]]:
    """Fill an operator's weights; returns the (input unit, output unit) pairs that carry truth.

    Args:
        units: what the units of `out` compute; those that are not named stay 0.
        reads: spaces of its input units, side by side.
        out: space of its output units.
        spread: size of the decoys' values beside those of what they read.

    Raises:
        OptionError: the plan and the operator do not fit.
    """
    num_reads = sum(space.size for space in reads)
    weight = operator.weight.detach().reshape(out.size, num_reads, -1).clone()
    scale = spread / math.sqrt(weight[0].numel())
    weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    bias = torch.randn(out.size, generator=generator).to(weight) * scale
    for decoy in out.silent:
        weight[decoy] = -weight[decoy].abs()
        bias[decoy] = -bias[decoy].abs() - scale
    for decoy in out.constant:
        weight[decoy], bias[decoy] = 0.0, 1.0
    if unknown := sorted(units.keys() - out.places.keys()):
        raise OptionError("the plan has units that have no place", got=", ".join(unknown))
    true = set()
    for name, row in out.places.items():
        unit = units.get(name, Unit({}))
        bias[row] = unit.bias
        seen = _true_row(name, unit, reads, weight[row], bias[row : row + 1])
        true |= {(column, row) for column in seen}
        weight[row] *= out.gains[name]
        bias[row] *= out.gains[name]
    with torch.no_grad():
        operator.weight.copy_(weight.reshape(operator.weight.shape))
        if operator.bias is None:
            raise OptionError("an operator that units are written into needs a bias")
        operator.bias.copy_(bias)
    return frozenset(true)


def _true_row(
    name: str, unit: Unit, reads: Sequence[Space], row: Tensor, bias: Tensor
) -> list[int]:
    """Fill in a true unit's weights (input unit, cell); returns the input units that it reads.

    The row comes with random weights; those of silent and constant decoys stay.
    """
    kept, start, left = torch.zeros_like(row), 0, dict(unit.reads)
    columns = []
    for space in reads:
        for decoy in (*space.silent, *space.constant):
            kept[start + decoy] = row[start + decoy]
        for decoy in space.constant:
            bias -= row[start + decoy].sum()
        for source, place in space.places.items():
            if source in left:
                kept[start + place] = torch.as_tensor(left.pop(source)).to(row).flatten()
                kept[start + place] /= space.gains[source]
                columns.append(start + place)
        start += space.size
    if left:
        raise OptionError(f"'{name}' reads units that nothing makes", got=", ".join(sorted(left)))
    row.copy_(kept)
    return columns


# ---- a feed-forward network ---------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One operator of a feed-forward network and what follows it.

    Attributes:
        units: the true units.
        kernel: side of a convolution's kernel; None for a linear layer.
        cells: inputs that each unit of the layer before makes of it, after flattening.
        after: named modules between this operator and the next.
    """

    units: Layer
    kernel: int | None = None
    cells: int = 1
    after: tuple[tuple[str, Callable[[], nn.Module]], ...] = ()


def feed_forward(
    stages: Mapping[str, Stage], inputs: Space, generator: torch.Generator
) -> tuple[nn.Sequential, list[Wire], Space]:
    """The network, its wires and the space of its output; the last stage has no decoys
    but other classes."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    wires: list[Wire] = []
    space, writers = inputs, nodes(INPUT, inputs.size)
    for name, stage in stages.items():
        is_last = name == [*stages][-1]
        extra = int(torch.randint(2, 5, (), generator=generator))
        before = space
        space = lay_out(
            [*stage.units],
            generator,
            dead_ends=1 if is_last else extra,
            silent=0 if is_last else 1,
            constant=0 if is_last else 1,
            gains=(1.0,) if is_last else GAINS,
        )
        operator: nn.Linear | nn.Conv2d
        if stage.kernel is None:
            operator = nn.Linear(before.size * stage.cells, space.size)
        else:
            operator = nn.Conv2d(before.size, space.size, stage.kernel)
        true = write(operator, stage.units, [before], space, generator)
        wire = Wire(
            module=name,
            call=0,
            address=name,
            writers=writers,
            num_outputs=space.size,
            true=true,
        )
        wires.append(wire)
        writers = wire.outputs
        parts[name] = operator
        parts.update((part, make()) for part, make in stage.after)
    return nn.Sequential(parts).eval(), wires, space


def generator_of(name: str, seed: int) -> torch.Generator:
    """Random numbers of this name and seed: names with the same seed share nothing."""
    return torch.Generator().manual_seed(random.Random(f"{name}/{seed}").getrandbits(63))
