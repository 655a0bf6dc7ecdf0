"""Fooling images: inputs that a network is all but certain of and that show nothing.

Two searches, by evolution and by gradient ascent, and a check that what they find is in truth
not what the network says: by a nearest neighbour among real images, and by a second network that
was trained on its own. The check gives no verdict where real images fail it, or where wrong
classes or noise pass it.

Source: Nguyen et al. 2015, arXiv 1412.1897 (MAP-Elites over classes, direct and indirect
encodings, gradient ascent with and without an L2 penalty).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.methods.robustness.attacks.balls import Limits, Norm
from patchclamp.methods.robustness.attacks.base import task_of
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.confidence import (
    checked_classes,
    column,
    dot,
    limits_of,
    log_odds,
    odds_at,
    uphill,
)
from patchclamp.methods.robustness.patterns import Genomes, Patterns, Pixels
from patchclamp.methods.scoring import Passes

CERTAIN = 0.9999
"""The confidence that counts as fooled."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fooled:
    """The image found for each class, with confidences of a fresh run of one row at a time.

    Shapes: points (n, *feature); all others (n,).

    Attributes:
        method: by which they were found.
        classes: that were asked for.
        points: within the limits of inputs.
        confidences: of the classes at the points; start_confidences: where the search began.
        num_rounds: generations or steps until the confidence was reached, or all.
        wanted: the confidence that was asked for.
        passes: rows that went through the network.
    """

    method: str
    classes: Tensor
    points: Tensor
    confidences: Tensor
    start_confidences: Tensor
    num_rounds: Tensor
    wanted: float
    passes: Passes

    @property
    def is_fooled(self) -> Tensor:
        """Whether the confidence was reached, (n,)."""
        return self.confidences >= self.wanted


@dataclass(frozen=True, kw_only=True)
class FoolByGradient:
    """Gradient ascent of a class's log-odds, from the mean of the examples or from anywhere.

    Steps are along the gradient, `step` long as a share of the limits' diagonal, and shrink
    linearly. With a `penalty` what grows is the log-odds less penalty x mean square of the
    distance from mid-range, in shares of the range: all steps are then taken and the best point
    among those that are sure enough is kept.

    Options: `num_steps`; `step`; `penalty`; `confidence` that is wanted.

    Shapes: classes (n,); starts (n, *feature).
    Units: log-odds in nats.
    Randomness: none.
    Cost: a row and step 2 forwards and 1 backward at most, and 3 forwards.
    Raises: OptionError without finite limits; TargetError for classes out of range, or where
        no gradient reaches the input; InputError for starts that do not fit.
    Fails when: gradients vanish or mislead; evolution needs none.
    Source: Nguyen et al. 2015, section 3.6; penalty of Simonyan et al. 2013, arXiv 1312.6034.
    """

    num_steps: int = 400
    step: float = 0.1
    penalty: float = 0.0
    confidence: float = CERTAIN

    def __post_init__(self) -> None:
        _check_confidence(self.confidence)
        if self.num_steps < 1 or not 0 < self.step <= 1 or not 0 <= self.penalty < float("inf"):
            raise OptionError("a step, its length a share, a penalty of 0 or more", got=f"{self}")

    def run(
        self,
        classifier: Classifier,
        classes: Tensor,
        *,
        starts: Tensor | None = None,
        row: int = 0,
        progress: Progress = SILENT,
    ) -> Fooled:
        """Climb for each class.

        Args:
            starts: by default the mean of the rows that the classifier was opened with.
            row: which example's other inputs all images go with.
        """
        low, high = limits_of(classifier, "a fooling image")
        aims = checked_classes(classifier, classes)
        before, rows = dataclasses.replace(classifier.passes), torch.full((len(aims),), row)
        if starts is None:
            starts = classifier.points.mean(0, keepdim=True).expand(len(aims), *low.shape).clone()
        task_of(classifier, starts, aims, 0.0, norm=Norm.L2, targets=None, rows=rows)
        x = torch.minimum(torch.maximum(starts, low), high)
        length = self.step * float((high - low).double().norm())
        start = odds_at(classifier, x, rows, aims)
        best, worth = x.clone(), torch.full_like(start, -torch.inf)
        took = torch.full((len(aims),), self.num_steps)
        goal = torch.logit(torch.tensor(self.confidence, dtype=torch.float64))
        progress.start("fooling by gradient", self.num_steps, "steps")
        try:
            for number in range(self.num_steps + 1):
                odds = odds_at(classifier, x, rows, aims)
                sure = odds >= goal
                took[sure] = took[sure].clamp(max=number)
                value = self._worth(x, odds, sure, (low, high))
                better = value > worth
                best[better], worth[better] = x[better], value[better]
                todo = torch.arange(len(x)) if self.penalty else (~sure).nonzero().flatten()
                if not len(todo) or number == self.num_steps:
                    break
                way = uphill(classifier, x[todo], rows[todo], aims[todo], odds[todo])
                way = _inward(way - self._pull(x[todo], (low, high)), x[todo], (low, high))
                norm = dot(way, way).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
                size = length * (1 - number / self.num_steps) / norm
                moved = (x[todo].double() + column(size, way.double()) * way.double()).to(x)
                x[todo] = torch.minimum(torch.maximum(moved, low), high)
                progress.advance()
        finally:
            progress.finish()
        name = "gradient, penalised" if self.penalty else "gradient"
        return _fooled(name, classifier, aims, best, rows, start, took, self.confidence, before)

    def _worth(self, x: Tensor, odds: Tensor, sure: Tensor, limits: Limits) -> Tensor:
        """By which points are kept: those that are sure enough first, then the less penalised."""
        if not self.penalty:
            return odds
        shares = (x - (limits[0] + limits[1]) / 2) / (limits[1] - limits[0])
        penalised = odds - self.penalty * shares.double().flatten(1).square().mean(1)
        return torch.where(sure, 1e12 + penalised, odds)

    def _pull(self, x: Tensor, limits: Limits) -> Tensor:
        """The slope of the penalty."""
        low, high = limits
        pull: Tensor = 2 * self.penalty * (x - (low + high) / 2) / (high - low).square()
        return pull / x[0].numel()


def _inward(way: Tensor, x: Tensor, limits: Limits) -> Tensor:
    """Without what leads out of the limits, so that no part of a step is lost there."""
    leads_out = ((x <= limits[0]) & (way < 0)) | ((x >= limits[1]) & (way > 0))
    return way.masked_fill(leads_out, 0.0)


class Encoding(StrEnum):
    """What evolves."""

    DIRECT = "direct"
    """The elements themselves."""
    INDIRECT = "indirect"
    """Small networks that paint an image from the places of its pixels: regular patterns."""


@dataclass(frozen=True, kw_only=True)
class FoolByEvolution:
    """Evolution with one champion for each class; a child may win any class.

    Each generation mutates champions drawn at random and lets every child compete for every
    class that is wanted, by its log-odds. A class that is reached stays in the race as a parent.

    Direct: an element changes with chance `rate` (one at least), by polynomial mutation.
    Indirect: see `patterns.Patterns`; weights and kinds evolve, the wiring is fixed.

    Options: `encoding`; `num_rounds`, generations; `num_children` of each; `rate`;
    `confidence` that is wanted; `seed`.

    Shapes: classes (n,).
    Randomness: everything, by `seed`; the same for any number of rows at a time.
    Cost: num_rounds x num_children forwards at most, no gradient.
    Raises: OptionError without finite limits, or for indirect encoding of what is no image;
        TargetError for classes out of range.
    Fails when: confidence is flat around everything that mutation reaches.
    Source: Nguyen et al. 2015, section 2.2 (MAP-Elites; they evolve the wiring of CPPNs too).
    """

    encoding: Encoding = Encoding.DIRECT
    num_rounds: int = 2000
    num_children: int = 32
    rate: float = 0.1
    confidence: float = CERTAIN
    seed: int = 0

    def __post_init__(self) -> None:
        _check_confidence(self.confidence)
        if self.num_rounds < 1 or self.num_children < 1 or not 0 < self.rate <= 1:
            raise OptionError("a generation, a child, and a rate up to 1", got=f"{self}")

    def run(
        self,
        classifier: Classifier,
        classes: Tensor,
        *,
        row: int = 0,
        progress: Progress = SILENT,
    ) -> Fooled:
        """Evolve an image for each class.

        Args:
            row: which example's other inputs all images go with.
        """
        limits = limits_of(classifier, "a fooling image")
        aims = checked_classes(classifier, classes)
        if not 0 <= row < classifier.num:
            raise OptionError(f"no row {row}", expected=f"0 to {classifier.num - 1}")
        before, num = dataclasses.replace(classifier.passes), len(aims)
        generator = torch.Generator().manual_seed(self.seed)
        pool = self._pool(limits, num, generator)
        goal = torch.logit(torch.tensor(self.confidence, dtype=torch.float64))
        odds = _table(classifier, pool.images(limits), aims, row).diagonal().clone()
        start, took = odds.clone(), torch.full((num,), self.num_rounds)
        progress.start("fooling by evolution", self.num_rounds, "generations")
        try:
            for number in range(self.num_rounds + 1):
                sure = odds >= goal
                took[sure] = took[sure].clamp(max=number)
                if bool(sure.all()) or number == self.num_rounds:
                    break
                parents = torch.randint(num, (self.num_children,), generator=generator)
                children = pool.mutated(parents, self.rate, generator)
                found, child = _table(classifier, children.images(limits), aims, row).max(0)
                won = (found > odds).nonzero().flatten()
                pool.put(won, children, child[won])
                odds[won] = found[won]
                progress.advance()
        finally:
            progress.finish()
        rows = torch.full((num,), row)
        best = pool.images(limits)
        return _fooled(
            self.encoding.value, classifier, aims, best, rows, start, took, self.confidence, before
        )

    def _pool(self, limits: Limits, num: int, generator: torch.Generator) -> Genomes:
        kind = Pixels if self.encoding is Encoding.DIRECT else Patterns
        return kind.drawn(num, tuple(limits[0].shape), generator)


def _table(classifier: Classifier, x: Tensor, aims: Tensor, row: int) -> Tensor:
    """Log-odds of every wanted class for every image, (image, class)."""
    logits = classifier.answers(x, torch.full((len(x),), row))
    columns = [log_odds(logits, aim.expand(len(x))) for aim in aims]
    return torch.stack(columns, 1)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise OptionError("a confidence is between 0 and 1", got=f"{confidence:g}")


def _fooled(
    name: str,
    classifier: Classifier,
    aims: Tensor,
    points: Tensor,
    rows: Tensor,
    start: Tensor,
    took: Tensor,
    wanted: float,
    before: Passes,
) -> Fooled:
    fresh = torch.sigmoid(odds_at(classifier, points, rows, aims, at_once=1))
    passes = classifier.passes
    return Fooled(
        method=name,
        classes=aims,
        points=points,
        confidences=fresh,
        start_confidences=torch.sigmoid(start),
        num_rounds=took,
        wanted=wanted,
        passes=Passes(passes.forwards - before.forwards, passes.backwards - before.backwards),
    )
