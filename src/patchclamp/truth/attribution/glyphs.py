"""A glyph that says the label, and its mirror image that says nothing.

Every image holds one glyph, turned in one of four ways: that is the label. Elsewhere it holds
the mirror image of a glyph, turned in a way that has nothing to do with the label. A mirror
image has the same ink, the same edges and the same area, so that whatever looks at the image
alone (Sobel, brightness) gives both the same, by construction. Only the network treats them
differently, and the gate measures that it does: `Gate`.

Source: the project's own; equal-area distractors for what Adebayo et al. 2018 (arXiv
1810.03292) show, that edges alone pass for explanations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.net import open as open_net
from patchclamp.truth.attribution.base import NUM_GATE, Build, Gate, PlantedMaps, at_least
from patchclamp.truth.attribution.fitting import Recipe, anywhere, fitted

GLYPH = ("#####", "#....", "###..", "#....", "#....")
"""Four turns of it and four of its mirror image are eight different drawings."""

RECIPE = Recipe(epochs=10, rate=1e-2, decay=0.01)
"""Of the training."""

NUM_CLASSES = 4
BOX = len(GLYPH) + 2
"""Side of a mask: the glyph, and the pixel around it in which its edges are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawings:
    """Images in layers, each (num, 1, size, size), with labels and the masks of both boxes."""

    noise: Tensor
    glyphs: Tensor
    mirrored: Tensor
    labels: Tensor
    signal: Tensor
    distractor: Tensor

    @property
    def images(self) -> Tensor:
        """All layers together."""
        return self.noise + self.glyphs + self.mirrored


@dataclass(frozen=True, kw_only=True)
class Glyphs:
    """One network on images of a glyph and a mirrored one.

    Shapes: inputs (num, 1, size, size); masks (num, size, size), BOX x BOX places each.
    Units: a glyph is 1, the background Gaussian noise of standard deviation `noise`.
    Randomness: by `seed`; the caller's random state is left as it was.
    Cost: epochs x num_train forward-backwards: 8 s of one core.
    Raises: OptionError for options that cannot be.
    Fails when: an architecture cannot learn it, e.g. a perceptron; the gate then does not hold.
    Source: the project's own.

    Attributes:
        size: side of the image.
        num, num_train: images to look at, and to train on.
        noise: of the background.
        distractors: False leaves them out everywhere; the signal is then scored against the
            rest of the image.
        build: the architecture; three convolutions where None.
        recipe: of the training.
        shuffled: negative control: training labels that have nothing to do with the images.
        seed: of images, weights and training.
    """

    size: int = 16
    num: int = 200
    num_train: int = 2000
    noise: float = 0.1
    distractors: bool = True
    build: Build | None = None
    recipe: Recipe = RECIPE
    shuffled: bool = False
    seed: int = 0

    def run(self) -> PlantedMaps:
        """Train, and draw fresh images."""
        at_least("size", self.size, 2 * BOX)
        at_least("num", self.num, 1)
        at_least("num_train", self.num_train, 1)
        at_least("noise", self.noise, 0)
        generator = torch.Generator().manual_seed(self.seed)
        sizes = (self.num_train, self.num, NUM_GATE)
        train, test, more = (self.draw(n, generator) for n in sizes)
        labels = train.labels
        if self.shuffled:
            labels = labels[torch.randperm(len(labels), generator=generator)]
        build = anywhere if self.build is None else self.build
        module = fitted(build, train.images, labels, NUM_CLASSES, self.recipe, seed=self.seed)
        return PlantedMaps(
            net=open_net(module, test.images[:2]),
            inputs=test.images,
            labels=test.labels,
            signal=test.signal,
            distractor=test.distractor if self.distractors else None,
            gate=Gate.measure(
                module,
                more.labels,
                more.images,
                more.noise + more.mirrored,
                more.noise + more.glyphs if self.distractors else None,
            ),
        )

    def draw(self, num: int, generator: torch.Generator) -> Drawings:
        """Fresh images, their classes in equal shares."""
        labels = torch.randperm(num, generator=generator) % NUM_CLASSES
        other = torch.randint(NUM_CLASSES, (num,), generator=generator)
        first, second = apart(num, self.size, BOX, generator)
        glyphs, signal = self._placed(turns(), labels, first)
        mirrored, distractor = self._placed(turns().flip(-1), other, second)
        if not self.distractors:
            mirrored = torch.zeros_like(mirrored)
        noise = self.noise * torch.randn(num, 1, self.size, self.size, generator=generator)
        return Drawings(
            noise=noise,
            glyphs=glyphs,
            mirrored=mirrored,
            labels=labels,
            signal=signal,
            distractor=distractor,
        )

    def _placed(self, shapes: Tensor, which: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """The shapes in an empty image, and the masks of their boxes."""
        image = torch.zeros(len(at), 1, self.size, self.size)
        mask = torch.zeros(len(at), self.size, self.size, dtype=torch.bool)
        for n, (row, column) in enumerate(at.tolist()):
            image[n, 0, row + 1 : row + BOX - 1, column + 1 : column + BOX - 1] = shapes[which[n]]
            mask[n, row : row + BOX, column : column + BOX] = True
        return image, mask


def turns() -> Tensor:
    """The glyph turned by 0, 90, 180 and 270 degrees: (4, 5, 5)."""
    glyph = torch.tensor([[float(c == "#") for c in row] for row in GLYPH])
    return torch.stack([glyph.rot90(k) for k in range(NUM_CLASSES)])


def apart(num: int, size: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Upper left corners of two boxes that do not overlap, (num, 2) each; both alike in law."""
    made = torch.zeros(2, num, 2, dtype=torch.long)
    left = torch.arange(num)
    while left.numel():
        shape = (2, left.numel(), 2)
        made[:, left] = torch.randint(size - side + 1, shape, generator=generator)
        left = left[((made[0, left] - made[1, left]).abs() < side).all(1)]
    return made[0], made[1]
