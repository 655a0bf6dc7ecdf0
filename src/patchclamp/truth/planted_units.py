"""A classifier built by hand, every unit of which is known.

One hidden layer `act` of rectified units reads made-up features, and `head` reads
the hidden layer. With K = 4 classes the units are, in this order:

- **deciders** (K): unit c fires for every row of class c and for no other row, and
  `head` reads nothing else, so this group alone carries the decision;
- **decoys** (K): made like the deciders, with the same distribution of values, from
  a class that was drawn without looking at the label; nothing reads them;
- **noisy**: a Gaussian whose mean is higher by `separation` standard deviations in
  class `NOISY_CLASS`, far from the rectifier's corner, so that the area under its ROC
  curve is Phi(separation / sqrt 2); it is above zero on every row;
- **silent** and **stuck**: always 0, and always 1: both dead;
- **dense**: a Gaussian on a high bias, of no class;
- **duplicates**: two units that are equal on every row;
- **opposites**: two units that sum to 1 on every row, so that their correlation is -1;
- **fillers**: rectified Gaussians, each its own, of no class.

Negative controls: `shuffled_labels`, `random_weights`, and the decoys. Nothing but
what is listed is dead, dense, redundant, selective or needed.

Shapes: inputs (row, feature); hidden values (row, unit); logits (row, class).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchclamp.core.errors import OptionError
from patchclamp.data.catalogue import Kind
from patchclamp.data.dataset import Dataset

NUM_CLASSES = 4
NOISY_CLASS = 1
NUM_FILLERS = 16
HIDDEN = "act"
"""Site of the planted units."""

_HIGH = 10.0  # far enough from the rectifier's corner for any Gaussian here
_GAIN = 4.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Numbers of the planted units, and what is true of them.

    Attributes:
        noisy_area: area under the ROC curve of `noisy` for `NOISY_CLASS`.
        dead, dense: all units that are so, in order.
        pairs: all redundant pairs (a < b) with their correlation.
    """

    deciders: tuple[int, ...]
    decoys: tuple[int, ...]
    noisy: int
    noisy_area: float
    dead: tuple[int, ...]
    dense: tuple[int, ...]
    pairs: dict[tuple[int, int], float]
    fillers: tuple[int, ...]

    @property
    def num_units(self) -> int:
        """Units of the hidden layer."""
        return self.fillers[-1] + 1


def plan(separation: float = 1.0) -> Plan:
    """What is planted, for a separation of the noisy unit in standard deviations."""
    if not 0 <= separation < _HIGH / 2:
        raise OptionError(
            "the separation of the noisy unit is out of range",
            got=f"{separation:g}",
            expected=f"0 to {_HIGH / 2:g}",
        )
    k = NUM_CLASSES
    noisy, silent, stuck, dense = 2 * k, 2 * k + 1, 2 * k + 2, 2 * k + 3
    first = dense + 1
    return Plan(
        deciders=tuple(range(k)),
        decoys=tuple(range(k, 2 * k)),
        noisy=noisy,
        noisy_area=0.5 * (1 + math.erf(separation / 2)),
        dead=(silent, stuck),
        dense=(noisy, dense),
        pairs={(first, first + 1): 1.0, (first + 2, first + 3): -1.0},
        fillers=tuple(range(first + 4, first + 4 + NUM_FILLERS)),
    )


_NOISY, _DENSE, _DUPLICATE, _COIN = range(2 * NUM_CLASSES, 2 * NUM_CLASSES + 4)
_FILLERS = _COIN + 1
NUM_FEATURES = _FILLERS + NUM_FILLERS


class PlantedUnits(nn.Module):
    """The network; see the module. Shapes: (row, feature) to logits (row, class)."""

    def __init__(self) -> None:
        super().__init__()
        units = plan()
        self.read = nn.Linear(NUM_FEATURES, units.num_units)
        self.act = nn.ReLU()
        self.head = nn.Linear(units.num_units, NUM_CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self._plant(units)

    def _plant(self, units: Plan) -> None:
        weight, bias = self.read.weight, self.read.bias
        for unit in (*units.deciders, *units.decoys):
            weight[unit, unit] = 1.0
        for unit, feature in zip(units.dense, (_NOISY, _DENSE), strict=True):
            weight[unit, feature], bias[unit] = 1.0, _HIGH
        silent, stuck = units.dead
        bias[silent], bias[stuck] = -1.0, 1.0
        same, opposite = units.pairs
        weight[list(same), _DUPLICATE] = 1.0
        weight[opposite[0], _COIN] = 1.0
        weight[opposite[1], _COIN], bias[opposite[1]] = -1.0, 1.0
        for number, unit in enumerate(units.fillers):
            weight[unit, _FILLERS + number] = 1.0
        for c, unit in enumerate(units.deciders):
            self.head.weight[c, unit] = _GAIN

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.act(self.read(x)))
        return logits


def random_weights(seed: int) -> PlantedUnits:
    """Control: the same anatomy with Gaussian weights, so that no group is special."""
    network = PlantedUnits()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 1 / math.sqrt(parameter.shape[-1])
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return network.eval()


def planted_data(num: int, *, separation: float = 1.0, seed: int = 0) -> Dataset:
    """Rows for the network, the classes in equal shares to within one.

    Raises: OptionError for a separation out of range.
    """
    plan(separation)
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(num) % NUM_CLASSES)[torch.randperm(num, generator=generator)]
    other = (torch.arange(num) % NUM_CLASSES)[torch.randperm(num, generator=generator)]
    features = torch.randn(num, NUM_FEATURES, generator=generator).clamp(-_HIGH / 2, _HIGH / 2)
    for start, classes in ((0, labels), (NUM_CLASSES, other)):
        strength = 0.5 + torch.rand(num, 1, generator=generator)
        code = nn.functional.one_hot(classes, NUM_CLASSES) * strength
        features[:, start : start + NUM_CLASSES] = code
    features[:, _NOISY] += separation * (labels == NOISY_CLASS)
    features[:, _COIN] = (torch.rand(num, generator=generator) < 0.5).float()
    return Dataset(
        name="planted units",
        inputs=features,
        labels=labels,
        class_names=tuple(f"class {c}" for c in range(NUM_CLASSES)),
        split="test",
        licence="none needed (generated)",
        description="features for patchclamp.truth.planted_units",
        kind=Kind.ARRAYS,
    )


def shuffled_labels(dataset: Dataset, seed: int) -> Dataset:
    """Control: the same rows with labels that have nothing to do with them."""
    if dataset.labels is None:
        raise OptionError(f"'{dataset.name}' has no labels to shuffle")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(dataset, labels=dataset.labels[order])
