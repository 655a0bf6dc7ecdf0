"""Labels made from a part of images that are shown as they are.

No image is edited: what says the label was in it from the start.

- `BrightRegion`: images as they were taken; the label says whether one region is brighter than
  in most images. The truth is that region, and the distractor one of the same size that is about
  as bright and as rich in edges and goes little with the label. Networks may read neighbours
  that go with the region: the gate says whether this one does.
- `Lesions`: images drawn with a round and a square spot each, both bright; where and how large
  differs, and the label says whether the round one is large. The truth is that spot of that
  image. Both have the same area on average, so that brightness points at neither.

Source: task with a known source of signal in unaltered images, after "Explainable AI Methods for
Neuroimaging: Systematic Failures of Common Tools, the Need for Domain-Specific Validation, and a
Proposal for Safe Application" (anatomical region; lesions of one subject).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from patchclamp.core.errors import DataError, OptionError
from patchclamp.net import open as open_net
from patchclamp.truth.attribution.base import NUM_GATE, Build, Gate, PlantedMaps, at_least
from patchclamp.truth.attribution.blocks import images
from patchclamp.truth.attribution.edges import edge_strength
from patchclamp.truth.attribution.fitting import Recipe, anywhere, fitted, perceptron
from patchclamp.truth.attribution.glyphs import apart

PHOTOGRAPHED, DRAWN = Recipe(epochs=60), Recipe(epochs=8, rate=1e-2, decay=0.01)
"""Training of `BrightRegion` and of `Lesions`."""

SPOT = 9
"""Side of a spot's box."""

SMALL, LARGE = (1.0, 1.8), (2.4, 3.2)
"""Radii of the round spots of both classes; a square one has the area of a round one."""


@dataclass(frozen=True, kw_only=True)
class BrightRegion:
    """One network that tells whether a region is bright.

    Shapes: inputs (num, channel, size, size); masks (num, size, size).
    Units: pixels from 0 to 1.
    Randomness: by `seed`; the caller's random state is left as it was.
    Cost: 1 s of one core.
    Raises: OptionError for a region that is not in the image or leaves no room for another;
        DataError for data without labels or images, or for a region that is always the same.
    Fails when: neighbours say as much of the label as the region, so that the network reads
        them; the gate then does not hold.
    Source: see the module.

    Attributes:
        region: first row, first column, number of rows and of columns.
        data: a bundled dataset, or a file of images.
        size: side of the images; others are resized.
        gap: share of the images, nearest to the median, that is left out.
        num: images to look at, at most.
        build: the architecture; two hidden layers where None.
        recipe: of the training.
        shuffled: negative control: training labels that have nothing to do with the images.
        seed: of weights and training.
    """

    region: tuple[int, int, int, int] = (2, 2, 2, 2)
    data: str | PathLike[str] = "digits"
    size: int = 8
    gap: float = 0.4
    num: int = 360
    build: Build | None = None
    recipe: Recipe = PHOTOGRAPHED
    shuffled: bool = False
    seed: int = 0

    def run(self) -> PlantedMaps:
        """Label, train, and show the test images."""
        self._require()
        generator = torch.Generator().manual_seed(self.seed)
        (x, _), (test, _) = images(self.data, self.size, generator)
        bright = self._brightness(x, self.region)
        ends = torch.quantile(bright, torch.tensor([0.5 - self.gap / 2, 0.5 + self.gap / 2]))
        if not float(ends[0]) < float(bright.max()) or bright.min() == bright.max():
            raise DataError("the region is as bright in most images", got=str(self.region))
        x, labels = self._labelled(x, ends)
        test, test_labels = (t[: self.num] for t in self._labelled(test, ends))
        if min(len(labels.unique()), len(test_labels.unique())) < 2:
            raise DataError("the region's brightness leaves one class only", got=str(self.region))
        other = self._distractor(x, labels)
        if self.shuffled:
            labels = labels[torch.randperm(len(labels), generator=generator)]
        build = perceptron if self.build is None else self.build
        module = fitted(build, x, labels, 2, self.recipe, seed=self.seed)
        order = torch.randperm(len(test), generator=generator)
        signal, distractor = self._mask(len(test), self.region), self._mask(len(test), other)
        return PlantedMaps(
            net=open_net(module, test[:2]),
            inputs=test,
            labels=test_labels,
            signal=signal,
            distractor=distractor,
            gate=Gate.measure(
                module,
                test_labels,
                test,
                torch.where(signal[:, None], test[order], test),
                torch.where(distractor[:, None], test[order], test),
            ),
        )

    def _require(self) -> None:
        row, column, height, width = self.region
        inside = min(row, column) >= 0 and min(height, width) >= 1
        if not (inside and max(row + height, column + width) <= self.size):
            raise OptionError(
                "the region is not in the image",
                got=str(self.region),
                expected=f"row, column, height, width in {self.size} x {self.size}",
            )
        if 2 * height > self.size and 2 * width > self.size:
            raise OptionError("the region leaves no room for another", got=str(self.region))
        if not 0 <= self.gap < 1:
            raise OptionError("gap is a share", got=f"{self.gap:g}", expected="from 0, below 1")
        at_least("num", self.num, 2)

    def _mask(self, num: int, region: tuple[int, int, int, int]) -> Tensor:
        row, column, height, width = region
        mask = torch.zeros(num, self.size, self.size, dtype=torch.bool)
        mask[:, row : row + height, column : column + width] = True
        return mask

    def _brightness(self, x: Tensor, region: tuple[int, int, int, int]) -> Tensor:
        row, column, height, width = region
        return x[:, :, row : row + height, column : column + width].mean((1, 2, 3))

    def _labelled(self, x: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """The images that are clear enough, and whether the region is bright."""
        bright = self._brightness(x, self.region)
        dark = bright < ends[0] if self.gap else bright <= ends[0]
        kept = dark | (bright > ends[1])
        return x[kept], (bright[kept] > ends[1]).long()

    def _distractor(self, x: Tensor, labels: Tensor) -> tuple[int, int, int, int]:
        """The region of the same size, apart from the true one, that goes least with the label
        and is most like it in brightness and edges, which then point at neither."""
        row, column, height, width = self.region
        edges = edge_strength(x)
        like = [self._brightness(y, self.region).mean() for y in (x, edges)]
        found: list[tuple[float, tuple[int, int, int, int]]] = []
        for r in range(self.size - height + 1):
            for c in range(self.size - width + 1):
                bright = self._brightness(x, (r, c, height, width))
                spread = float(bright.std())
                if (abs(r - row) < height and abs(c - column) < width) or spread == 0:
                    continue
                means = [bright[labels == k].mean() for k in (0, 1)]
                unlike = float((means[1] - means[0]).abs()) / spread
                seen = (bright, self._brightness(edges, (r, c, height, width)))
                for y, wanted in zip(seen, like, strict=True):
                    unlike += float((y.mean() / wanted).log().abs())
                found.append((unlike, (r, c, height, width)))
        if not found:
            raise DataError("no other region of that size varies", got=str(self.region))
        return min(found)[1]


@dataclass(frozen=True, kw_only=True)
class Lesions:
    """One network that tells whether the round spot of an image is large.

    Shapes: inputs (num, 1, size, size); masks (num, size, size), SPOT x SPOT places each.
    Units: spots are 1, the background Gaussian noise of standard deviation `texture`.
    Randomness: by `seed`; the caller's random state is left as it was.
    Cost: 8 s of one core.
    Raises: OptionError for options that cannot be.
    Fails when: an architecture cannot learn it; the gate then does not hold.
    Source: see the module.

    Attributes:
        size: side of the image.
        texture: of the background.
        num, num_train: images to look at, and to train on.
        build: the architecture; three convolutions where None.
        recipe: of the training.
        shuffled: negative control: training labels that have nothing to do with the images.
        seed: of images, weights and training.
    """

    size: int = 20
    texture: float = 0.15
    num: int = 200
    num_train: int = 2000
    build: Build | None = None
    recipe: Recipe = DRAWN
    shuffled: bool = False
    seed: int = 0

    def run(self) -> PlantedMaps:
        """Train, and draw fresh images."""
        at_least("size", self.size, 2 * SPOT)
        at_least("num", self.num, 2)
        at_least("num_train", self.num_train, 2)
        at_least("texture", self.texture, 0)
        generator = torch.Generator().manual_seed(self.seed)
        train, labels, _ = self._draw(self.num_train, generator)
        test, test_labels, masks = self._draw(self.num, generator)
        if self.shuffled:
            labels = labels[torch.randperm(len(labels), generator=generator)]
        build = anywhere if self.build is None else self.build
        module = fitted(build, train.sum(0), labels, 2, self.recipe, seed=self.seed)
        inputs = test.sum(0)
        more, more_labels, _ = self._draw(NUM_GATE, generator)
        ground, disc, square = more
        return PlantedMaps(
            net=open_net(module, inputs[:2]),
            inputs=inputs,
            labels=test_labels,
            signal=masks[0],
            distractor=masks[1],
            gate=Gate.measure(module, more_labels, more.sum(0), ground + square, ground + disc),
        )

    def _draw(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Background and both spots (3, num, 1, size, size); labels; masks of the spots."""
        labels = torch.randperm(num, generator=generator) % 2
        kinds = [labels, torch.randperm(num, generator=generator) % 2]
        places = apart(num, self.size, SPOT, generator)
        noise = torch.randn(num, 1, self.size, self.size, generator=generator)
        layers, masks = [self.texture * noise], []
        grid = torch.arange(self.size)
        ends = torch.tensor([SMALL, LARGE])
        for kind, at, is_round in zip(kinds, places, (True, False), strict=True):
            low, high = ends[kind].unbind(1)
            radius = low + (high - low) * torch.rand(num, generator=generator)
            away = grid - (at[..., None] + SPOT // 2)  # (num, 2, size)
            down, across = away[:, 0, :, None].abs(), away[:, 1, None, :].abs()
            far = (down**2 + across**2).sqrt() if is_round else torch.maximum(down, across)
            end = radius if is_round else radius * math.sqrt(math.pi) / 2
            layers.append((end[:, None, None] + 0.5 - far).clamp(0, 1)[:, None])
            inside = away.abs() <= SPOT // 2
            masks.append(inside[:, 0, :, None] & inside[:, 1, None, :])
        return torch.stack(layers), labels, torch.stack(masks)
