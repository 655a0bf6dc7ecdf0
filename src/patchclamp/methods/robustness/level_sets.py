"""How far a network's answer stays as sure as it was: from a source to near any other image.

Level set traversal walks from a source image towards an image of another class and takes out of
every step what would lower the confidence, so that the walk stays on the set of equal confidence.
Where it arrives, the network is blind to all that changed. The straight line from the source to
the place found is looked at too, and the triangle between two such places: where all of these are
as sure as the source, the level set is star-shaped around it.

Source: Balasubramanian et al. 2023, arXiv 2303.07754 (Level Set Traversal). Here the step is the
projection onto the first-order half-space of points that are sure enough, which is the orthogonal
part of the way wherever the walk is at that level; the weakest place of the line is held up in the
same way; the stride adapts; and places count only where their line holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from patchclamp.core.errors import InputError, OptionError, TargetError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.methods.robustness.attacks.balls import Norm
from patchclamp.methods.robustness.attacks.base import task_of
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.confidence import (
    column,
    dot,
    limits_of,
    odds_at,
    uphill,
)
from patchclamp.methods.scoring import Passes

_WATCHED = 4
"""Places on the line that are run with every step; they move from step to step."""
_GOLDEN = 0.6180339887498949
_EVERY = 10
"""Steps between two looks at the whole line."""
_LEAST_STRIDE = 1e-3
_NEARLY = 1.0
"""Log-odds above the level within which the line's weakest place is held up."""
_NUM_PROJECTIONS = 3
"""Rounds of projections onto both half-spaces in turn."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Traversed:
    """Where the walks arrived. Shapes: points (n, *feature); line (n, num_places); others (n,).

    Attributes:
        classes: the network's answers at the sources.
        source_confidences: of these classes at the sources; confidences: at the points.
        target_confidences: at the targets, most often about 0.
        points: the nearest places to the targets whose whole line holds; the source where none.
        places: (num_places,), shares of the way from source to point; line: confidences there.
        rmse: root mean square of target minus point, as a share of the range of each element;
            start_rmse: of target minus source.
        num_steps: that each walk took.
        drop: by how much confidence was allowed to fall; near: the rmse that was asked for.
        passes: rows that went through the network.
    """

    classes: Tensor
    source_confidences: Tensor
    confidences: Tensor
    target_confidences: Tensor
    points: Tensor
    places: Tensor
    line: Tensor
    rmse: Tensor
    start_rmse: Tensor
    num_steps: Tensor
    drop: float
    near: float
    passes: Passes

    @property
    def falls(self) -> Tensor:
        """By how much the least sure place of each line is less sure than the source, (n,)."""
        return self.source_confidences - self.line.amin(1)

    @property
    def is_reached(self) -> Tensor:
        """As near as was asked for, with no place of the line below what was allowed: (n,)."""
        return (self.rmse <= self.near) & (self.falls <= self.drop)


@dataclass(frozen=True, kw_only=True)
class LevelSetTraversal:
    """Walk from sources towards targets without losing confidence.

    Each step goes a share of the way, is projected onto the points that to first order are sure
    enough (in log-odds), at the place itself and where its line was weakest, and is taken only
    where the place and five places of its line are in truth; else the share is halved. Every ten
    steps the whole line is looked at; where it does not hold the walk goes back to the last place
    where it did.

    Options: `num_steps` at most; `drop`, by how much confidence may fall; `near`, the root mean
    square distance at which a walk is done, as a share of the inputs' range; `stride`, the first
    share; `num_places` of the line.

    Shapes: sources, targets (n, *feature).
    Units: confidences are probabilities; distances are shares of the inputs' range.
    Randomness: none.
    Cost: per step and row 1 gradient, or 2 where the line is weak, 7 forwards, and num_places
        forwards in ten steps.
    Raises: OptionError without finite limits of inputs; InputError for shapes, NaN, or inputs
        outside the limits; TargetError where a target already has the source's answer.
    Fails when: gradients vanish or mislead: then the walk stops early. Statements on a line hold
        at its places, over floats; between them nothing is proved. A walk that does not arrive
        does not show that there is no way.
    Source: see the module.
    """

    num_steps: int = 200
    drop: float = 0.2
    near: float = 0.05
    stride: float = 0.1
    num_places: int = 21

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.num_places < 2:
            raise OptionError("a walk needs a step, and a line two places", got=f"{self}")
        if not (0 < self.drop < 1 and 0 < self.near < 1 and 0 < self.stride <= 1):
            raise OptionError("drop, near and stride are shares between 0 and 1", got=f"{self}")

    def run(
        self,
        classifier: Classifier,
        sources: Tensor,
        targets: Tensor,
        *,
        rows: Tensor | None = None,
        progress: Progress = SILENT,
    ) -> Traversed:
        """Walk from each source to its target.

        Args:
            rows: (n,) which example's other inputs each source goes with; 0..n-1 by default.
        """
        passes = classifier.passes
        before = replace(passes)
        walk = _Walk.of(self, classifier, sources, targets, rows)
        progress.start("level set traversal", self.num_steps, "steps")
        try:
            with torch.no_grad():
                for number in range(self.num_steps):
                    todo = walk.todo(self.near)
                    if not len(todo):
                        break
                    walk.step(todo, number)
                    walk.look(todo, whole=(number + 1) % _EVERY == 0, near=self.near)
                    progress.advance()
                walk.look(torch.arange(len(sources)), whole=True, near=self.near)
                return walk.found(Passes(passes.forwards, passes.backwards), before)
        finally:
            progress.finish()


@dataclass(eq=False)
class _Walk:
    """All walks at once; tensors have a row for each."""

    method: LevelSetTraversal
    classifier: Classifier
    sources: Tensor
    targets: Tensor
    rows: Tensor
    classes: Tensor
    start: Tensor
    x: Tensor = field(init=False)
    odds: Tensor = field(init=False)
    held: Tensor = field(init=False)
    held_odds: Tensor = field(init=False)
    is_new: Tensor = field(init=False)
    share: Tensor = field(init=False)
    weak: Tensor = field(init=False)
    steps: Tensor = field(init=False)

    @classmethod
    def of(
        cls,
        method: LevelSetTraversal,
        classifier: Classifier,
        sources: Tensor,
        targets: Tensor,
        rows: Tensor | None,
    ) -> _Walk:
        limits_of(classifier, "level set traversal")
        if sources.shape != targets.shape:
            raise InputError(
                "each source goes to one target",
                got=f"{tuple(sources.shape)} and {tuple(targets.shape)}",
            )
        zeros = torch.zeros(len(sources), dtype=torch.long)
        task_of(classifier, targets, zeros, 1.0, norm=Norm.L2, targets=None, rows=rows)
        task = task_of(classifier, sources, zeros, 1.0, norm=Norm.L2, targets=None, rows=rows)
        logits = classifier.answers(sources, task.rows)
        classes = logits.argmax(1)
        same = classifier.answers(targets, task.rows).argmax(1) == classes
        if bool(same.any()):
            raise TargetError(
                "a target already has the answer of its source, so there is nothing to walk past",
                got=f"row {int(same.nonzero()[0])}, class {int(classes[same][0])}",
            )
        odds = odds_at(classifier, sources, task.rows, classes)
        return cls(method, classifier, sources, targets, task.rows, classes, odds)

    def __post_init__(self) -> None:
        self.x, self.odds = self.sources.clone(), self.start.clone()
        self.held, self.held_odds = self.sources.clone(), self.start.clone()
        self.is_new = torch.zeros(len(self.sources), dtype=torch.bool)
        self.share = torch.full_like(self.start, self.method.stride)
        self.weak = torch.full_like(self.start, 0.5)
        self.steps = torch.zeros(len(self.sources), dtype=torch.long)

    @property
    def floor(self) -> Tensor:
        """Confidence that no place may fall below."""
        return torch.sigmoid(self.start) - self.method.drop

    def distance(self, x: Tensor, at: Tensor) -> Tensor:
        """Root mean square to the targets, as a share of the range of each element."""
        low, high = limits_of(self.classifier, "a distance")
        away = (self.targets[at].double() - x.double()) / (high - low).double()
        return away.flatten(1).square().mean(1).sqrt()

    def todo(self, near: float) -> Tensor:
        return (self.distance(self.held, torch.arange(len(self.x))) > near).nonzero().flatten()

    def step(self, todo: Tensor, number: int) -> None:
        """One step of some walks; those where it does not hold stay, with a shorter stride."""
        x, weak = self.x[todo], self.weak[todo][:, None]
        way = self._held_up(todo, column(self.share[todo], x) * (self.targets[todo] - x))
        low, high = limits_of(self.classifier, "a step")
        there = torch.minimum(torch.maximum(x + way, low), high)
        shift = (number * _GOLDEN) % 1
        moving = (torch.arange(_WATCHED, dtype=torch.float64) + shift) / _WATCHED
        places = torch.cat([moving.expand(len(todo), -1), weak, torch.ones_like(weak)], 1)
        found = self._along(there, todo, places)
        holds = (torch.sigmoid(found) >= self.floor[todo][:, None]).all(1)
        moved = todo[holds]
        self.x[moved], self.odds[moved] = there[holds], found[holds, -1]
        self.is_new[moved] = True
        self.weak[todo] = places.gather(1, found[:, :-1].argmin(1, keepdim=True))[:, 0]
        share = torch.where(holds, 1.5 * self.share[todo], self.share[todo] / 2)
        self.share[todo] = share.clamp(_LEAST_STRIDE, 1.0)
        self.steps[todo] += 1

    def _held_up(self, todo: Tensor, way: Tensor) -> Tensor:
        """The way, and what keeps it at the level to first order: at its end, and on the line.

        A change of the end by d changes the place at share u of the line by u d.
        """
        kept = torch.logit(torch.sigmoid(self.start[todo]) - self.method.drop / 2, eps=1e-12)
        weak = self.weak[todo]
        odds = self._along(self.x[todo], todo, weak[:, None])[:, 0]
        slopes = self._uphill(self.x[todo], todo, self.odds[todo])
        held = torch.zeros_like(slopes)
        near = (odds < kept + _NEARLY).nonzero().flatten()
        if len(near):
            places = self._between(self.x[todo[near]], todo[near], weak[near, None])
            held[near] = self._uphill(places, todo[near], odds[near])
        end = (torch.ones_like(weak), self.odds[todo], slopes)
        for share, at, way_up in ((weak, odds, held), end) * _NUM_PROJECTIONS:
            square = share.square() * dot(way_up, way_up)
            lacking = (kept - at - share * dot(way_up, way)).clamp(min=0)
            lift = torch.where(square > 0, share * lacking / square.clamp(min=1e-30), 0.0)
            way = way + column(lift, way) * way_up
        return way

    def _uphill(self, x: Tensor, at: Tensor, odds: Tensor) -> Tensor:
        return uphill(self.classifier, x, self.rows[at], self.classes[at], odds)

    def look(self, todo: Tensor, *, whole: bool, near: float) -> None:
        """At the whole line of those that arrived, or of all that moved."""
        is_due = self.is_new[todo]
        if not whole:
            is_due = is_due & (self.distance(self.x[todo], todo) <= near)
        due = todo[is_due]
        if not len(due):
            return
        places = self._places().expand(len(due), -1)
        line = torch.sigmoid(self._along(self.x[due], due, places))
        holds = line.amin(1) >= self.floor[due]
        is_nearer = self.distance(self.x[due], due) < self.distance(self.held[due], due)
        kept = due[holds & is_nearer]
        self.held[kept], self.held_odds[kept] = self.x[kept], self.odds[kept]
        back = due[~holds]
        self.x[back], self.odds[back] = self.held[back], self.held_odds[back]
        self.weak[due] = places[0, line.argmin(1)]
        self.is_new[due] = False

    def found(self, after: Passes, before: Passes) -> Traversed:
        at = torch.arange(len(self.x))
        places = self._places().expand(len(at), -1)
        line = torch.sigmoid(self._along(self.held, at, places))
        targets = odds_at(self.classifier, self.targets, self.rows, self.classes)
        return Traversed(
            classes=self.classes,
            source_confidences=torch.sigmoid(self.start),
            confidences=line[:, -1],
            target_confidences=torch.sigmoid(targets),
            points=self.held,
            places=self._places(),
            line=line,
            rmse=self.distance(self.held, at),
            start_rmse=self.distance(self.sources, at),
            num_steps=self.steps,
            drop=self.method.drop,
            near=self.method.near,
            passes=Passes(
                self.classifier.passes.forwards - before.forwards,
                self.classifier.passes.backwards - before.backwards,
            ),
        )

    def _places(self) -> Tensor:
        return torch.linspace(0, 1, self.method.num_places, dtype=torch.float64)

    def _between(self, x: Tensor, at: Tensor, places: Tensor) -> Tensor:
        """Points at shares (n, place) of the lines from the sources, (n x place, *feature)."""
        num = places.shape[1]
        shares = places.to(x.dtype).flatten()
        first, last = (y.repeat_interleave(num, 0) for y in (self.sources[at], x))
        low, high = limits_of(self.classifier, "a line")
        between = first + column(shares, first) * (last - first)
        between = torch.minimum(torch.maximum(between, low), high)
        # first + (last - first) may be an ulp beside last
        return torch.where(column(shares, first) == 1, last, between)

    def _along(self, x: Tensor, at: Tensor, places: Tensor) -> Tensor:
        """Log-odds there, (n, place)."""
        num = places.shape[1]
        rows, classes = (y[at].repeat_interleave(num) for y in (self.rows, self.classes))
        between = self._between(x, at, places)
        return odds_at(self.classifier, between, rows, classes).reshape(len(at), num)


@dataclass(frozen=True, kw_only=True, eq=False)
class Triangle:
    """Confidence on the triangle between a source and two places found from it.

    Attributes:
        weights: (place, 3), shares of source, first and second.
        confidences: (place,), of the source's class.
        drop: what was allowed.
    """

    weights: Tensor
    confidences: Tensor
    drop: float

    @property
    def fall(self) -> float:
        """By how much the least sure place is less sure than the source."""
        return float(self.confidences[0] - self.confidences.amin())

    @property
    def share(self) -> float:
        """Of the places, those within `drop` of the source's confidence."""
        return float((self.confidences >= self.confidences[0] - self.drop).double().mean())


def triangle(
    classifier: Classifier,
    source: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    row: int = 0,
    drop: float = 0.2,
    num_parts: int = 10,
) -> Triangle:
    """Look at the triangle between three points, each edge cut into `num_parts`.

    Shapes: source, first, second (*feature).
    Cost: (num_parts + 1)(num_parts + 2) / 2 forwards.
    """
    if num_parts < 1 or not source.shape == first.shape == second.shape:
        raise OptionError(
            "a triangle has three points of one shape, and a part", got=f"{num_parts}"
        )
    steps = [
        (num_parts - a - b, a, b) for a in range(num_parts + 1) for b in range(num_parts + 1 - a)
    ]
    weights = torch.tensor(steps, dtype=torch.float64) / num_parts
    corners = torch.stack([source, first, second])
    points = torch.einsum("pc,c...->p...", weights.to(source.dtype), corners)
    if classifier.within is not None:
        points = torch.minimum(torch.maximum(points, classifier.within[0]), classifier.within[1])
    rows = torch.full((len(points),), row)
    answer = classifier.answers(source[None], rows[:1]).argmax(1)
    odds = odds_at(classifier, points, rows, answer.expand(len(points)))
    return Triangle(weights=weights, confidences=torch.sigmoid(odds), drop=drop)
