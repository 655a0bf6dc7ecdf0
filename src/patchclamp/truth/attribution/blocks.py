"""Images of two blocks: one holds a digit, the other always the same thing.

The block with the digit is the only one that says anything of the label; which of the two it is
changes from image to image. The other, the *null block*, is chosen among the training digits
and transposed: the one whose ink and whose edges come nearest to those of the average digit,
so that brightness and edges alone point at neither block.

In the standard network gradients are about as large in the null block as in the digit's; where
the digit is always on top, or where the network was trained on adversaries, they are not. A
method whose maps do not tell these three apart is not looking at what the network does.

Source: Shah et al. 2021, arXiv 2102.12781 (BlockMNIST). Added here: the choice of the null
block; theirs is a drawing. Digits are the bundled ones of 8 x 8 pixels unless a file is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from os import PathLike

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from patchclamp.core.errors import DataError, OptionError
from patchclamp.data import load_data
from patchclamp.net import open as open_net
from patchclamp.truth.attribution.base import Build, Gate, PlantedMaps, at_least
from patchclamp.truth.attribution.edges import edge_strength
from patchclamp.truth.attribution.fitting import Recipe, fitted, perceptron

RECIPE = Recipe(radius=1.0)
"""Adversaries may move pixels, of which there are 128 from 0 to 1, by 1 in L2."""

TEST_SHARE = 0.2
"""Of a file, which has no split of its own."""


class Variant(StrEnum):
    """What is done to the images or to the training."""

    STANDARD = "standard"
    """The digit is on top in half of the images."""
    TOP = "top"
    """It always is."""
    ROBUST = "robust"
    """As standard, trained on adversaries."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """One network on images of two blocks.

    Shapes: inputs (num, channel, 2 x size, size); masks (num, 2 x size, size), half each.
    Units: pixels from 0 to 1; radius is L2.
    Randomness: by `seed`; the caller's random state is left as it was.
    Cost: about 1 s of one core for the perceptron, 4 s for the convolutional network; with
        adversaries four to five times that.
    Raises: OptionError for options that cannot be; DataError for data without labels or images.
    Fails when: the network's accuracy is poor: what it then reads is not the digit. The gate
        says so. Without the null block the image is none that the network was trained on; the
        gate measures what that costs.
    Source: Shah et al. 2021, arXiv 2102.12781.

    Attributes:
        variant: of the three.
        data: a bundled dataset, or a file of labelled images.
        size: side of a block; other images are resized.
        num: test images at most.
        copies: how often each training image is shown, with a place of its own.
        build: the architecture; two hidden layers where None.
        recipe: of the training; the radius counts for `Variant.ROBUST` only.
        shuffled: negative control: training labels that have nothing to do with the images.
        seed: of places, weights and training.
    """

    variant: Variant = Variant.STANDARD
    data: str | PathLike[str] = "digits"
    size: int = 8
    num: int = 360
    copies: int = 2
    build: Build | None = None
    recipe: Recipe = RECIPE
    shuffled: bool = False
    seed: int = 0

    def run(self) -> PlantedMaps:
        """Train, and show the test images."""
        at_least("size", self.size, 4)
        at_least("num", self.num, 1)
        at_least("copies", self.copies, 1)
        if self.variant is Variant.ROBUST and self.recipe.radius == 0:
            raise OptionError("a robust network needs adversaries", got="recipe.radius=0")
        generator = torch.Generator().manual_seed(self.seed)
        (x, labels), (test, test_labels) = images(self.data, self.size, generator)
        num_classes = int(torch.cat([labels, test_labels]).max()) + 1
        null = null_block(x)
        x, labels = x.repeat(self.copies, 1, 1, 1), labels.repeat(self.copies)
        if self.shuffled:
            labels = labels[torch.randperm(len(labels), generator=generator)]
        test, test_labels = test[: self.num], test_labels[: self.num]
        top, test_top = self._places(len(x), generator), self._places(len(test), generator)
        radius = self.recipe.radius if self.variant is Variant.ROBUST else 0.0
        recipe = Recipe(**(vars(self.recipe) | {"radius": radius}))
        build = perceptron if self.build is None else self.build
        module = fitted(build, blocks(x, null, top), labels, num_classes, recipe, seed=self.seed)
        inputs = blocks(test, null, test_top)
        empty = torch.zeros_like(null)
        rows = torch.arange(2 * self.size) < self.size
        signal = (rows == test_top[:, None])[..., None].expand(-1, -1, self.size).contiguous()
        return PlantedMaps(
            net=open_net(module, inputs[:2]),
            inputs=inputs,
            labels=test_labels,
            signal=signal,
            distractor=~signal,
            gate=Gate.measure(
                module,
                test_labels,
                inputs,
                blocks(null.expand_as(test), null, test_top),
                blocks(test, empty, test_top),
            ),
        )

    def _places(self, num: int, generator: torch.Generator) -> Tensor:
        """Whether the digit is on top, (num,)."""
        drawn = torch.rand(num, generator=generator) < 0.5
        return torch.ones_like(drawn) if self.variant is Variant.TOP else drawn


def blocks(digits: Tensor, null: Tensor, top: Tensor) -> Tensor:
    """Digits (n, channel, size, size) and the null block (channel, size, size), stacked."""
    first = top.reshape(-1, 1, 1, 1)
    null = null.expand_as(digits)
    return torch.cat([torch.where(first, digits, null), torch.where(first, null, digits)], 2)


def null_block(digits: Tensor) -> Tensor:
    """The training digit with the most average ink and edges, transposed."""
    parts = [digits.flatten(1).sum(1), edge_strength(digits).flatten(1).sum(1)]
    away = torch.stack([(p / p.mean() - 1) ** 2 for p in parts]).sum(0)
    return digits[away.argmin()].transpose(-1, -2).contiguous()


def images(
    data: str | PathLike[str], size: int, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels for training and for testing; the test images in random order."""
    if str(data) == "digits":
        sets = [load_data(data, split=s) for s in ("train", "test")]
    else:
        sets = [load_data(data)]
    made = []
    for found in sets:
        if found.labels is None or found.inputs.ndim != 4:
            raise DataError(f"'{data}' has no labelled images", got=str(found.kind))
        x = found.inputs
        if x.shape[2:] != (size, size):
            x = interpolate(x, size=(size, size), mode="bilinear", antialias=True)
        order = torch.randperm(len(x), generator=generator)
        made.append((x[order], found.labels[order]))
    if len(made) == 1:
        (x, labels), cut = made[0], int(len(made[0][0]) * TEST_SHARE)
        if cut < 1:
            raise DataError(f"'{data}' has too few images", got=str(len(x)))
        made = [(x[cut:], labels[cut:]), (x[:cut], labels[:cut])]
    return made[0], made[1]
