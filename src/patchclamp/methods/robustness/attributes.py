"""What an object's size, place, turn and background do to a network's accuracy.

Each edit comes with its own null: the same steps without the attribute. An object that was mapped
is compared with one that was mapped there and back, so that resampling and what is cut off at the
image's edge count on both sides; a background of another class with one of the same class; an
adversarial texture with the noise that it grew from. Only the difference is the attribute's.

Source: ImageNet-E, Li et al. 2023, arXiv 2303.17096 (attributes, accuracy drop, adversarial
backgrounds); edits here are in closed form, see `scenes`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from patchclamp.core.errors import DataError, OptionError
from patchclamp.core.findings import Interval
from patchclamp.core.progress import SILENT, Progress
from patchclamp.methods.robustness.attacks.balls import Limits, Norm
from patchclamp.methods.robustness.attacks.base import task_of
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.attacks.losses import Loss
from patchclamp.methods.robustness.confidence import column, limits_of
from patchclamp.methods.robustness.scenes import Scenes, Warp, blurred
from patchclamp.methods.statistics import bootstrap_mean, wilson

_FEWEST = 10
"""Rows below which an interval says nothing."""


class Pair(NamedTuple):
    """Images with the attribute changed, and their null; (n, channel, row, column) each."""

    edited: Tensor
    null: Tensor


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What an edit may use: the network, labels (n,), rows (n,), draws, the limits of inputs."""

    classifier: Classifier
    labels: Tensor
    rows: Tensor
    generator: torch.Generator
    limits: Limits


@dataclass(frozen=True, kw_only=True)
class AttributeEdit(ABC):
    """One change of one attribute."""

    @property
    @abstractmethod
    def name(self) -> str:
        """By which it stands in a table."""

    @abstractmethod
    def made(self, scenes: Scenes, stage: Stage) -> Pair:
        """Edited images and their null."""


@dataclass(frozen=True, kw_only=True)
class ObjectEdit(AttributeEdit):
    """Size, position, rotation, direction: the object mapped, against mapped there and back."""

    warp: Warp

    @property
    def name(self) -> str:
        warp, parts = self.warp, []
        if warp.scale != 1:
            parts.append(f"size {warp.scale:g}")
        if warp.shift != (0.0, 0.0):
            parts.append(f"position {warp.shift[0]:+g}, {warp.shift[1]:+g}")
        if warp.degrees:
            parts.append(f"rotation {warp.degrees:+g}")
        if warp.mirrored:
            parts.append("direction")
        return "; ".join(parts) or "identity"

    def made(self, scenes: Scenes, stage: Stage) -> Pair:
        """See `AttributeEdit.made`."""
        return Pair(scenes.moved(self.warp), scenes.moved(self.warp, self.warp.back()))


class Behind(StrEnum):
    """What takes the background's place."""

    OTHER = "other class"
    """That of an image of another class; null: of another image of the same class."""
    BLUR = "blur"
    """Its own, blurred by `strength` pixels; null: its own."""
    FLAT = "flat"
    """Its own mean colour; null: its own."""
    NOISE = "noise"
    """Uniform in the limits of inputs; null: its own."""
    ADVERSARIAL = "adversarial"
    """Noise that gradients turned against the label; null: the same noise as it was."""


@dataclass(frozen=True, kw_only=True)
class BackgroundEdit(AttributeEdit):
    """The object stays, what is behind it changes. Options: see `Behind`; `num_steps` of ascent."""

    behind: Behind
    strength: float = 2.0
    num_steps: int = 10

    @property
    def name(self) -> str:
        return f"background {self.behind}"

    def made(self, scenes: Scenes, stage: Stage) -> Pair:
        """See `AttributeEdit.made`."""
        own = scenes.composed
        if self.behind is Behind.OTHER:
            other, same = _partners(stage.labels, stage.generator)
            plates = scenes.plates
            made = (scenes.with_plates(plates[index]).images for index in (other, same))
            return Pair(*made)
        if self.behind is Behind.BLUR:
            return Pair(scenes.with_plates(blurred(scenes.plates, self.strength)).images, own)
        if self.behind is Behind.FLAT:
            mean = scenes.plates.mean((2, 3), keepdim=True).expand_as(scenes.plates)
            return Pair(scenes.with_plates(mean).images, own)
        low, high = stage.limits
        share = torch.rand(scenes.plates.shape, generator=stage.generator).to(low)
        noise = low + (high - low) * share
        before = scenes.with_plates(noise)
        if self.behind is Behind.NOISE:
            return Pair(before.images, own)
        return Pair(self._turned(before, noise, stage), before.images)

    def _turned(self, scenes: Scenes, noise: Tensor, stage: Stage) -> Tensor:
        """The texture after steps by the signs of its gradients; the worst of the way."""
        low, high = stage.limits
        plates, worst = noise, scenes.images
        most = torch.full((len(noise),), -torch.inf, dtype=noise.dtype)
        for number in range(self.num_steps + 1):
            x = scenes.with_plates(plates).images
            seen = stage.classifier.slopes(x, stage.rows, Loss.MARGIN, stage.labels, None)
            is_worse = seen.losses > most
            worst = torch.where(column(is_worse, x).bool(), x, worst)
            most = torch.maximum(most, seen.losses)
            if number < self.num_steps:
                size = 0.5 * (high - low) * (1 - number / self.num_steps)
                step = size * (seen.slopes * (1 - scenes.masks)).sign()
                plates = torch.minimum(torch.maximum(plates + step, low), high)
        return worst


def standard_edits() -> tuple[AttributeEdit, ...]:
    """Sizes, positions, turns and backgrounds, one small set for a first look."""
    warps = (
        Warp(scale=0.75),
        Warp(scale=1.25),
        Warp(shift=(0.0, 0.15)),
        Warp(shift=(0.15, 0.0)),
        Warp(degrees=30),
        Warp(mirrored=True),
    )
    edits: list[AttributeEdit] = [ObjectEdit(warp=warp) for warp in warps]
    return (*edits, *(BackgroundEdit(behind=behind) for behind in Behind))


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """A share of rows that are right, with its 95% interval."""

    share: float
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class AttributeDrop:
    """One line of the table.

    Attributes:
        name: of the edit.
        num: rows.
        null, edited: accuracies.
        drop: null minus edited; interval: of it, over rows, 95%.
    """

    name: str
    num: int
    null: Accuracy
    edited: Accuracy
    drop: float
    interval: Interval

    @property
    def is_found(self) -> bool:
        """Whether the attribute costs accuracy beyond what its null does."""
        return self.interval.low > 0


@dataclass(frozen=True, kw_only=True)
class AttributeTable:
    """Attributes of one network. `plain`: accuracy on the images as they are."""

    plain: Accuracy
    drops: tuple[AttributeDrop, ...]

    def of(self, name: str) -> AttributeDrop:
        """One line; OptionError where there is none."""
        for drop in self.drops:
            if drop.name == name:
                return drop
        names = ", ".join(drop.name for drop in self.drops)
        raise OptionError(f"no attribute '{name}'", expected=f"one of {names}")


@dataclass(frozen=True, kw_only=True)
class AttributeBench:
    """Edit attributes one at a time and count what accuracy each costs beyond its null.

    Options: `edits`; `seed`.

    Shapes: scenes of n images; labels (n,).
    Units: accuracy.
    Randomness: partners and noise, by `seed`, for each edit the same whatever else is asked for.
    Cost: 2 forwards a row and edit; num_steps + 1 gradients for an adversarial background.
    Raises: DataError for fewer than 10 images, or (another class's background) a class with one
        image or no other class; OptionError without limits; InputError for images that do not
        fit; TargetError for labels out of range.
    Fails when: masks are rough: background then goes with the object, in edit and null alike.
        The interval is over these rows, not over edits.
    Source: see the module.
    """

    edits: tuple[AttributeEdit, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        names = [edit.name for edit in self.edits]
        if not names or len(set(names)) < len(names):
            raise OptionError("one or more edits of different names", got=", ".join(names))

    def run(
        self,
        classifier: Classifier,
        scenes: Scenes,
        labels: Tensor,
        *,
        progress: Progress = SILENT,
    ) -> AttributeTable:
        """Measure all edits; scenes go with the classifier's own rows, in order."""
        limits = limits_of(classifier, "a background of noise")
        num = len(scenes.images)
        if num < _FEWEST:
            raise DataError(f"{num} images give no interval", expected=f"{_FEWEST} or more")
        task = task_of(
            classifier, scenes.images, labels, 0.0, norm=Norm.L2, targets=None, rows=None
        )
        drops = []
        progress.start("attributes", len(self.edits), "edits")
        try:
            with torch.no_grad():
                plain = _right(classifier, scenes.images, task.rows, task.labels)
                for edit in self.edits:
                    stage = Stage(
                        classifier=classifier,
                        labels=task.labels,
                        rows=task.rows,
                        generator=torch.Generator().manual_seed(self.seed),
                        limits=limits,
                    )
                    pair = edit.made(scenes, stage)
                    drops.append(self._drop(edit.name, stage, pair))
                    progress.advance()
        finally:
            progress.finish()
        return AttributeTable(plain=_accuracy(plain), drops=tuple(drops))

    def _drop(self, name: str, stage: Stage, pair: Pair) -> AttributeDrop:
        low, high = stage.limits
        edited, null = (
            _right(
                stage.classifier,
                torch.minimum(torch.maximum(x, low), high),  # blending may leave them by an ulp
                stage.rows,
                stage.labels,
            )
            for x in pair
        )
        lost = null.double() - edited.double()
        return AttributeDrop(
            name=name,
            num=len(lost),
            null=_accuracy(null),
            edited=_accuracy(edited),
            drop=float(lost.mean()),
            interval=bootstrap_mean(lost, seed=self.seed),
        )


def _right(classifier: Classifier, x: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    return classifier.answers(x, rows).argmax(1) == labels


def _accuracy(right: Tensor) -> Accuracy:
    hits, num = int(right.sum()), len(right)
    return Accuracy(share=hits / num, interval=wilson(hits, num))


def _partners(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each row one of another class, and another one of its own class."""
    is_same = labels[:, None] == labels[None]
    is_self = torch.eye(len(labels), dtype=torch.bool)
    draws = torch.rand((2, *is_same.shape), generator=generator)
    found: Sequence[Tensor] = (~is_same, is_same & ~is_self)
    for allowed, what in zip(found, ("no other class", "one image of its class"), strict=True):
        if not bool(allowed.any(1).all()):
            row = int((~allowed.any(1)).nonzero()[0])
            raise DataError(
                f"the background of image {row} cannot be exchanged",
                got=what,
                hint="two images or more of two classes or more",
            )
    other, same = (
        draw.masked_fill(~allowed, -1.0).argmax(1)
        for draw, allowed in zip(draws, found, strict=True)
    )
    return other, same
