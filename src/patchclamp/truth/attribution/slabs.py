"""A feature that one threshold reads, and one that needs many: networks read the first alone.

Every feature lies between -1 and 1 and would do to tell both classes apart. The *simple* one is
below zero in class 0 and above zero in class 1. A *complex* one has slabs across its range that
belong to the classes in turn; their number is odd, so that no threshold and no slope says
anything of the class. Gradient descent ends at networks that read the simple feature and do not
notice when a complex one is shuffled: the area under their ROC curve stays; it falls to .5 when
the simple one is.

So it is known which element of the input the network's output is due to, although another one
is as predictive: what data alone can say of a feature, both share.

Source: Shah et al. 2020, arXiv 2006.07710 (LMS-k data, randomised AUC).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchclamp.core.errors import OptionError
from patchclamp.net import open as open_net
from patchclamp.truth.attribution.base import Build, Gate, PlantedMaps, at_least, auc, logits
from patchclamp.truth.attribution.fitting import Recipe, fitted, perceptron

RECIPE = Recipe()
"""Of the training."""

MARGIN = 0.05
"""Half the empty range between classes of the simple feature; between slabs, as a share of one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SlabMaps(PlantedMaps):
    """As `PlantedMaps`, with areas under the ROC curve of class 1.

    Attributes:
        area: on the examples.
        area_simple: with the simple feature drawn from another example.
        area_complex: with all complex features drawn from other examples.
    """

    area: float
    area_simple: float
    area_complex: float


@dataclass(frozen=True, kw_only=True)
class Slabs:
    """One network on slab data.

    Shapes: inputs (num, feature): the simple one, then complex ones, then noise; masks alike,
        one feature each.
    Units: features lie between -1 and 1.
    Randomness: by `seed`; the caller's random state is left as it was.
    Cost: 2 s of one core.
    Raises: OptionError for options that cannot be.
    Fails when: `simple` is False and the network cannot learn the slabs either.
    Source: Shah et al. 2020, arXiv 2006.07710.

    Attributes:
        num_slabs: odd, of a complex feature.
        num_complex, num_noise: features of each kind.
        num, num_train: examples to look at, and to train on.
        simple: False is the negative control: the simple feature then says nothing of the class,
            in training as in testing, and the complex one is the signal.
        build: the architecture; two hidden layers where None.
        recipe: of the training.
        seed: of features, weights and training.
    """

    num_slabs: int = 5
    num_complex: int = 1
    num_noise: int = 6
    num: int = 1000
    num_train: int = 4000
    simple: bool = True
    build: Build | None = None
    recipe: Recipe = RECIPE
    seed: int = 0

    def run(self) -> SlabMaps:
        """Train, and draw fresh examples."""
        if self.num_slabs < 3 or self.num_slabs % 2 == 0:
            raise OptionError(
                "slabs of both ends must belong to one class",
                got=str(self.num_slabs),
                expected="an odd number, at least 3",
            )
        at_least("num_complex", self.num_complex, 1)
        at_least("num_noise", self.num_noise, 0)
        at_least("num", self.num, 2)
        at_least("num_train", self.num_train, 2)
        generator = torch.Generator().manual_seed(self.seed)
        (x, labels), (test, test_labels) = (
            self.draw(n, generator) for n in (self.num_train, self.num)
        )
        build = perceptron if self.build is None else self.build
        module = fitted(build, x, labels, 2, self.recipe, seed=self.seed)
        hard = torch.arange(1, 1 + self.num_complex)
        no_simple = shuffled(test, torch.tensor([0]), generator)
        no_complex = shuffled(test, hard, generator)
        first, second = torch.zeros(2, *test.shape, dtype=torch.bool)
        first[:, 0], second[:, 1] = True, True
        cut = (no_simple, no_complex) if self.simple else (no_complex, no_simple)
        return SlabMaps(
            net=open_net(module, test[:2]),
            inputs=test,
            labels=test_labels,
            signal=first if self.simple else second,
            distractor=second if self.simple else first,
            gate=Gate.measure(module, test_labels, test, *cut),
            area=_area(module, test, test_labels),
            area_simple=_area(module, no_simple, test_labels),
            area_complex=_area(module, no_complex, test_labels),
        )

    def draw(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Examples, their classes in equal shares: (num, feature) and (num,)."""
        labels = torch.randperm(num, generator=generator) % 2
        told = labels if self.simple else labels[torch.randperm(num, generator=generator)]
        size = MARGIN + (1 - MARGIN) * torch.rand(num, generator=generator)
        parts = [(2 * told - 1) * size]
        parts += [self._slabs(labels, generator) for _ in range(self.num_complex)]
        noise = 2 * torch.rand(num, self.num_noise, generator=generator) - 1
        return torch.cat([torch.stack(parts, 1), noise], 1), labels

    def _slabs(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """A complex feature: slabs 0, 2, 4, ... are of class 1."""
        drawn = torch.rand(2, len(labels), generator=generator)
        num_own = torch.where(labels == 1, self.num_slabs // 2 + 1, self.num_slabs // 2)
        slab = 2 * (drawn[0] * num_own).floor() + (labels == 0)
        width = 2 / self.num_slabs
        gap = MARGIN * width
        return -1 + slab * width + gap + (width - 2 * gap) * drawn[1]


def shuffled(x: Tensor, features: Tensor, generator: torch.Generator) -> Tensor:
    """Each of these features drawn anew from the examples, on its own."""
    made = x.clone()
    for feature in features.tolist():
        made[:, feature] = x[torch.randperm(len(x), generator=generator), feature]
    return made


def _area(module: nn.Module, x: Tensor, labels: Tensor) -> float:
    output = logits(module, x)
    return float(auc(output[:, 1] - output[:, 0], labels == 1))
