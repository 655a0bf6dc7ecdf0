"""Do the places that a map marks tell the label, and does the map itself?

New networks are trained on images of which only the places with the largest attributions are
left, and others on those with the smallest. If a map marks what tells classes apart the first
ones are better: the difference of accuracies is the score.

The mask alone may tell the label: attributions of the class that is true are shaped by it, and
a network may read the shape and not the pixels. So the same is measured with masks for images;
what pixels give beyond them is reported beside the difference.

Source: Shah et al. 2021, arXiv 2102.12781 (DiffROAR), on Hooker et al. 2019, arXiv 1806.10758.
Mask-only accuracy is the project's own addition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.core.errors import InputError, OptionError
from patchclamp.methods.attribution.base import Attribution, Explainer
from patchclamp.net import Net
from patchclamp.truth.attribution.base import Build, Score, at_least, checked, logits
from patchclamp.truth.attribution.fitting import Recipe, fitted, perceptron

RECIPE = Recipe()
"""Of networks that see parts of images."""

LEAK = 0.05
"""A mask tells the label if it is above chance by more than this, interval and all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PredictivePower:
    """Accuracies on test images, averaged over rounds, with bootstrap intervals over images.

    Attributes:
        whole: of networks that see whole images.
        top, bottom: that see places with the largest, and the smallest attributions.
        mask_top, mask_bottom: that see which places these are and nothing else.
        difference: top - bottom; chance is 0.
        beyond_mask: the difference less that of the masks: what pixels say, not their places.
        share: of places that were left.
    """

    whole: Score
    top: Score
    bottom: Score
    mask_top: Score
    mask_bottom: Score
    difference: Score
    beyond_mask: Score
    share: float

    @property
    def mask_leaks(self) -> bool:
        """Whether a mask alone tells the label; the difference then shows little."""
        return any(m.interval.low > m.chance + LEAK for m in (self.mask_top, self.mask_bottom))


@dataclass(frozen=True, kw_only=True)
class DiffRoar:
    """Retrain on what a map marks, and on what it does not.

    Shapes: images (num, *feature); labels (num,); maps (num, *space).
    Units: accuracy.
    Randomness: by `seed`; ties among places are broken at random.
    Cost: 5 x rounds trainings; 0.5 s of one core each on the bundled digits.
    Raises: OptionError for options that cannot be; InputError for maps of the wrong shape, NaN
        or an all-zero map.
    Fails when: the mask alone tells the label (`mask_leaks`), or images can be told apart by any
        few of their places, so that top and bottom do alike.
    Source: Shah et al. 2021, arXiv 2102.12781.

    Attributes:
        share: of places that are left, from 0 to 1.
        rounds: trainings of each kind, from different first weights.
        build: the architecture; two hidden layers where None.
        recipe: of the training.
        seed: of weights and ties.
    """

    share: float = 0.25
    rounds: int = 3
    build: Build | None = None
    recipe: Recipe = RECIPE
    seed: int = 0

    def run(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        train_maps: Attribution | Tensor,
        test_maps: Attribution | Tensor,
    ) -> PredictivePower:
        """Accuracies for these maps of these images."""
        if not 0 < self.share < 1:
            raise OptionError("share is between 0 and 1", got=f"{self.share:g}")
        at_least("rounds", self.rounds, 1)
        generator = torch.Generator().manual_seed(self.seed)
        fill = float(train[0].mean())
        seen: dict[str, list[Tensor]] = {"whole": [train[0], test[0]]}
        for maps, (x, labels) in ((train_maps, train), (test_maps, test)):
            for name, mask in self._masks(maps, x, labels, generator).items():
                seen.setdefault(name, []).append(torch.where(mask, x, fill))
                seen.setdefault(f"mask_{name}", []).append(mask.to(x.dtype))
        num_classes = int(torch.cat([train[1], test[1]]).max()) + 1
        chance = int(test[1].bincount().max()) / len(test[1])
        rows = {
            name: self._right(inputs[0], train[1], inputs[1], test[1], num_classes)
            for name, inputs in seen.items()
        }
        difference = rows["top"] - rows["bottom"]
        beyond = difference - (rows["mask_top"] - rows["mask_bottom"])
        return PredictivePower(
            **{name: Score.of(right, chance) for name, right in rows.items()},
            difference=Score.of(difference, 0.0),
            beyond_mask=Score.of(beyond, 0.0),
            share=self.share,
        )

    def of_method(
        self, method: Explainer, net: Net, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
    ) -> PredictivePower:
        """Accuracies for a method's maps of the class that the network predicts."""
        maps = [method.run(net, x, logits(net.module, x).argmax(1)) for x, _ in (train, test)]
        return self.run(train, test, maps[0], maps[1])

    def _masks(
        self, maps: Attribution | Tensor, x: Tensor, labels: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Which places are left, (num, 1, *space) or (num, *feature)."""
        heat = maps.heat() if isinstance(maps, Attribution) else maps
        space = x.shape[2:] if x.ndim == heat.ndim + 1 else x.shape[1:]
        if heat.shape != (len(x), *space) or len(labels) != len(x):
            raise InputError(
                "maps, images and labels do not fit",
                got=f"maps {tuple(heat.shape)}, images {tuple(x.shape)}, {len(labels)} labels",
                expected="one number for each place of each image",
            )
        heat, _ = checked(heat, heat, "the map")
        flat = heat.flatten(1)
        kept = round(self.share * flat.shape[1])
        if not 0 < kept <= flat.shape[1] // 2:
            raise OptionError(
                "top and bottom must be different places",
                got=f"{kept} of {flat.shape[1]}",
                expected=f"from 1 to {flat.shape[1] // 2}",
                hint="another share",
            )
        ties = torch.rand(flat.shape, generator=generator).argsort(1)
        order = ties.gather(1, flat.gather(1, ties).argsort(dim=1, stable=True))
        made = {}
        for name, places in (("top", order[:, -kept:]), ("bottom", order[:, :kept])):
            mask = torch.zeros(flat.shape, dtype=torch.bool).scatter(1, places, True)
            mask = mask.reshape(heat.shape)
            made[name] = mask.unsqueeze(1) if x.ndim == heat.ndim + 1 else mask
        return made

    def _right(
        self, x: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, num_classes: int
    ) -> Tensor:
        """How often each test image's class is right, as a share of the rounds: (num,)."""
        build = perceptron if self.build is None else self.build
        hits = []
        for number in range(self.rounds):
            seed = self.seed * 1000 + number
            module = fitted(build, x, labels, num_classes, self.recipe, seed=seed)
            hits.append(logits(module, test).argmax(1) == test_labels)
        return torch.stack(hits).double().mean(0)
