"""Images that can mutate: as pixels, or painted from the places of their pixels.

A painter is a small network: every pixel is a function of its row, column and distance from the
middle, through units that wave, bump, fold or bend. That makes symmetric, repeating, smooth
patterns, whatever the size of the image.

Source: both encodings of fooling images, Nguyen et al. 2015, arXiv 1412.1897; painters are
compositional pattern-producing networks, Stanley 2007. Here their wiring is fixed, two full
hidden layers; weights and the kinds of units evolve.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.methods.robustness.attacks.balls import Limits

_ETA = 5.0
"""How narrow polynomial mutation is; the paper's 15 takes longer on every network tried."""
_WIDTH = 10
_SPREAD = 2.0
"""Standard deviation of first weights."""
_SHIFT = 1.0
"""Standard deviation of a change of a weight."""
_NUM_KINDS = 5
_KINDS_RATE = 0.3
"""How often a kind changes, as a share of how often a weight does."""


class Genomes(ABC):
    """What evolves, one genome for each image; `parts` have an entry for each along axis 0."""

    @property
    @abstractmethod
    def parts(self) -> list[Tensor]:
        """All tensors."""

    @abstractmethod
    def images(self, limits: Limits) -> Tensor:
        """(n, *feature), within the limits."""

    @abstractmethod
    def mutated(self, parents: Tensor, rate: float, generator: torch.Generator) -> Genomes:
        """Children of some, changed here and there."""

    def put(self, at: Tensor, other: Genomes, index: Tensor) -> None:
        """Take over genomes of another set of the same form."""
        for mine, given in zip(self.parts, other.parts, strict=True):
            mine[at] = given[index]


@dataclass(eq=False)
class Pixels(Genomes):
    """Elements as they are. shares: (n, *feature), of the range of each."""

    shares: Tensor

    @classmethod
    def drawn(cls, num: int, shape: tuple[int, ...], generator: torch.Generator) -> Pixels:
        """Uniform noise."""
        return cls(torch.rand((num, *shape), generator=generator))

    @property
    def parts(self) -> list[Tensor]:
        """See `Genomes.parts`."""
        return [self.shares]

    def images(self, limits: Limits) -> Tensor:
        """See `Genomes.images`."""
        low, high = limits
        made = low + (high - low) * self.shares.to(low)
        return torch.minimum(torch.maximum(made, low), high)

    def mutated(self, parents: Tensor, rate: float, generator: torch.Generator) -> Pixels:
        """Polynomial mutation of each element with chance `rate`, of one at least."""
        flat = self.shares[parents].flatten(1)
        chance = torch.rand(flat.shape, generator=generator)
        chosen = (chance < rate) | (chance == chance.amin(1, keepdim=True))
        u = torch.rand(flat.shape, generator=generator)
        power = 1 / (_ETA + 1)
        shift = torch.where(u < 0.5, (2 * u) ** power - 1, 1 - (2 - 2 * u) ** power)
        changed = torch.where(chosen, (flat + shift).clamp(0, 1), flat)
        return Pixels(changed.reshape(len(parents), *self.shares.shape[1:]))


@dataclass(eq=False)
class Patterns(Genomes):
    """Painters, one for each image.

    Shapes: weights (n, unit, input + 1) for each of three layers, the last column a bias;
        kinds (n, unit) for each of two hidden layers.

    Attributes:
        shape: of an image, (channel, row, column).
    """

    shape: tuple[int, int, int]
    weights: list[Tensor]
    kinds: list[Tensor]

    @classmethod
    def drawn(cls, num: int, shape: tuple[int, ...], generator: torch.Generator) -> Patterns:
        """Random painters; OptionError where an input is no image."""
        if len(shape) != 3:
            raise OptionError(
                "patterns are painted on images only",
                got=f"inputs of shape {shape}",
                expected="(channel, row, column)",
                hint="direct encoding",
            )
        sizes = [(_WIDTH, 4), (_WIDTH, _WIDTH + 1), (shape[0], _WIDTH + 1)]
        weights = [_SPREAD * torch.randn((num, *size), generator=generator) for size in sizes]
        kinds = [torch.randint(_NUM_KINDS, (num, _WIDTH), generator=generator) for _ in range(2)]
        return cls((shape[0], shape[1], shape[2]), weights, kinds)

    @property
    def parts(self) -> list[Tensor]:
        """See `Genomes.parts`."""
        return self.weights + self.kinds

    def images(self, limits: Limits) -> Tensor:
        """(n, channel, row, column), within the limits."""
        _, height, width = self.shape
        v, u = torch.meshgrid(
            torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
        )
        places = torch.stack([u, v, (u.square() + v.square()).sqrt()]).flatten(1)
        value = places.expand(len(self.weights[0]), *places.shape)
        for weight, kind in zip(self.weights, self.kinds, strict=False):
            value = _bent(_layer(value, weight), kind[:, :, None])
        shares = torch.sigmoid(_layer(value, self.weights[-1])).reshape(-1, *self.shape)
        low, high = limits
        return torch.minimum(torch.maximum(low + (high - low) * shares.to(low), low), high)

    def mutated(self, parents: Tensor, rate: float, generator: torch.Generator) -> Patterns:
        """Children with weights and kinds changed here and there."""
        weights, kinds = [], []
        for weight in self.weights:
            old = weight[parents]
            hit = torch.rand(old.shape, generator=generator) < rate
            shift = _SHIFT * torch.randn(old.shape, generator=generator)
            weights.append(torch.where(hit, old + shift, old))
        for kind in self.kinds:
            before = kind[parents]
            changed = torch.rand(before.shape, generator=generator) < _KINDS_RATE * rate
            new = torch.randint(_NUM_KINDS, before.shape, generator=generator)
            kinds.append(torch.where(changed, new, before))
        return Patterns(self.shape, weights, kinds)


def _layer(value: Tensor, weight: Tensor) -> Tensor:
    made: Tensor = weight[:, :, :-1] @ value / math.sqrt(value.shape[1]) + weight[:, :, -1:]
    return made


def _bent(x: Tensor, kind: Tensor) -> Tensor:
    """A wave, a bump, a fold, a bend or a line, by kind."""
    forms = (torch.sin(3 * x), torch.exp(-x.square()), x.abs(), torch.tanh(x), x)
    return torch.stack(forms).gather(0, kind.expand(x.shape)[None])[0]
