"""What every attack takes and gives: a classifier, rows, labels, a radius; the worst points found.

An attack is a frozen dataclass whose fields are its options, with `search`. `Attack.run`, which
all share, checks what is given, and holds whatever `search` gives against the live network once
more: only what a fresh run confirms, inside the radius and the limits, counts as broken.

Draws are made for all rows of a task, so that a seed gives the same search however many rows are
run at a time; what is left is the rounding of the network's own sums, which may differ with that.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from enum import Enum
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from patchclamp.core.errors import EngineError, InputError, OptionError, TargetError
from patchclamp.core.findings import Json
from patchclamp.core.progress import SILENT, Progress
from patchclamp.methods.robustness.attacks.balls import SLACK, Ball, Norm
from patchclamp.methods.robustness.attacks.classifier import Classifier, Seen
from patchclamp.methods.robustness.attacks.losses import Loss, margins
from patchclamp.methods.scoring import Passes

_NEAR_TIE = 1e-4
"""A margin below this share of the largest logit may be of another sign in a batch of one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What is attacked: rows, what they are defended as, and the points that may be used.

    Shapes: labels, rows and targets (n,); starts (n, *feature).

    Attributes:
        starts: points from which the first search by gradient goes, brought into the ball; by
            default a random one.
    """

    classifier: Classifier
    ball: Ball
    labels: Tensor
    rows: Tensor
    targets: Tensor | None = None
    starts: Tensor | None = None

    @property
    def num(self) -> int:
        """How many rows."""
        return len(self.labels)

    @property
    def points(self) -> Tensor:
        """The rows as they are."""
        return self.ball.centre

    def pick(self, index: Tensor) -> Task:
        """The same of some rows."""
        return Task(
            classifier=self.classifier,
            ball=self.ball.pick(index),
            labels=self.labels[index],
            rows=self.rows[index],
            targets=None if self.targets is None else self.targets[index],
            starts=None if self.starts is None else self.starts[index],
        )

    def start(self, generator: torch.Generator, *, first: bool) -> Tensor:
        """Where a search begins; the random point is drawn in any case."""
        drawn = self.ball.drawn(generator)
        return self.ball.project(self.starts) if first and self.starts is not None else drawn

    def margins(self, logits: Tensor) -> Tensor:
        """See `losses.margins`; of all rows of the task."""
        return margins(logits, self.labels, self.targets)

    def tried(self, x: Tensor) -> Tensor:
        """Margins at points, one for each row: (n,)."""
        return self.margins(self.classifier.answers(x, self.rows))

    def slopes(self, x: Tensor, loss: Loss, aims: Tensor | None) -> Seen:
        """Losses and slopes at points, one for each row; aims default to the targets."""
        aims = self.targets if aims is None else aims
        return self.classifier.slopes(x, self.rows, loss, self.labels, aims)


@dataclass(eq=False)
class Best:
    """The worst point of each row so far. Shapes: points (n, *feature); margins (n,)."""

    points: Tensor
    margins: Tensor

    @classmethod
    def of(cls, task: Task) -> Best:
        """The rows themselves."""
        return cls(task.points.clone(), task.tried(task.points))

    @classmethod
    def unseen(cls, task: Task) -> Best:
        """The rows themselves, not run yet: for attacks that begin at them."""
        start = torch.full((task.num,), torch.inf, dtype=task.points.dtype)
        return cls(task.points.clone(), start.to(task.points.device))

    def see(self, index: Tensor, x: Tensor, found: Tensor) -> None:
        """Keep points of some rows where their margins are lower than what there was."""
        is_worse = found < self.margins[index]
        chosen = index[is_worse]
        self.points[chosen] = x[is_worse]
        self.margins[chosen] = found[is_worse].to(self.margins)

    @property
    def todo(self) -> Tensor:
        """Which rows are not broken yet."""
        return (self.margins >= 0).nonzero().flatten()


@dataclass(frozen=True, kw_only=True, eq=False)
class Attacked:
    """The worst points that an attack found; what counts was confirmed by a fresh run.

    Shapes: points (n, *feature); all others (n,).

    Attributes:
        attack: its name; options: it was run with.
        norm, radius: the points allowed.
        labels, targets: the classes to be left and, for targeted attacks, to be reached.
        points: within the radius and the limits.
        margins: there, of the fresh run; negative where the attack succeeded.
        is_broken: whether another class (or the target) stands strictly above all others.
        classes: the network's answers there.
        distances: from the rows, in the norm.
        passes: rows that went through the network.
        num_unconfirmed: rows that the search took for broken and a fresh run did not.
    """

    attack: str
    options: dict[str, Json]
    norm: Norm
    radius: Tensor
    labels: Tensor
    targets: Tensor | None
    points: Tensor
    margins: Tensor
    is_broken: Tensor
    classes: Tensor
    distances: Tensor
    passes: Passes
    num_unconfirmed: int

    @property
    def accuracy(self) -> float:
        """The share of rows not broken: an upper bound of what a better attack would leave."""
        return 1.0 - float(self.is_broken.double().mean())


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """A search for the worst point. Its fields are its options.

    Attributes:
        name: by which it is asked for.
        source: the paper.
        norms: that it can keep to.
        needs_gradient: whether it fails on a network without a gradient.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    norms: ClassVar[tuple[Norm, ...]]
    needs_gradient: ClassVar[bool] = True

    @abstractmethod
    def search(self, task: Task) -> Best:
        """The worst points, within the ball. Gradients are off unless turned on."""

    def check(self, task: Task) -> None:
        """Raise OptionError where the attack cannot do what is asked for.

        Subclasses add to it what is their own.
        """
        if task.ball.norm not in self.norms:
            raise OptionError(
                f"the attack '{self.name}' does not keep to {task.ball.norm}",
                expected=" or ".join(self.norms),
            )

    def run(
        self,
        classifier: Classifier,
        points: Tensor,
        labels: Tensor,
        radius: Tensor | float,
        *,
        norm: Norm = Norm.LINF,
        targets: Tensor | None = None,
        rows: Tensor | None = None,
        progress: Progress = SILENT,
    ) -> Attacked:
        """Attack rows.

        Args:
            points: (n, *feature).
            labels: (n,) classes to be left.
            radius: one, or one for each row; for L0 a number of elements.
            targets: (n,) classes to be reached; without, any class but the label will do.
            rows: (n,) which example's other inputs each point goes with; 0..n-1 by default.

        Raises:
            InputError: points of the wrong shape, NaN, or outside the limits.
            TargetError: labels out of range; no gradient, for an attack that needs one.
            OptionError: a radius or a norm that cannot be.
            EngineError: the search left the ball, which would be an error in it.
        """
        task = task_of(classifier, points, labels, radius, norm=norm, targets=targets, rows=rows)
        self.check(task)
        with timed(progress, self.name, task.num):
            return self.judged(task)

    def judged(self, task: Task) -> Attacked:
        """Search, then judge the points by a fresh run."""
        passes = task.classifier.passes
        before = dataclasses.replace(passes)
        with torch.no_grad():
            best = self.search(task)
            found = judge(task, best)
        spent = Passes(passes.forwards - before.forwards, passes.backwards - before.backwards)
        return Attacked(
            attack=self.name,
            options=self.options(),
            norm=task.ball.norm,
            radius=task.ball.radius,
            labels=task.labels,
            targets=task.targets,
            points=best.points,
            margins=found.margins,
            is_broken=found.margins < 0,
            classes=found.classes,
            distances=found.distances,
            passes=spent,
            num_unconfirmed=int(((best.margins < 0) & (found.margins >= 0)).sum()),
        )

    def options(self) -> dict[str, Json]:
        """The fields, for records."""
        return {f.name: _json(getattr(self, f.name)) for f in fields(self)}


class Judged(NamedTuple):
    """Of points, by a fresh run: margins, answers and distances, (n,) each."""

    margins: Tensor
    classes: Tensor
    distances: Tensor


def judge(task: Task, best: Best) -> Judged:
    """Run points afresh, those close to a tie once more one at a time; the larger margin counts.

    Raises:
        EngineError: a point outside the radius or the limits.
    """
    ball, points = task.ball, best.points
    distances = ball.distance(points)
    is_out = (distances > ball.radius + SLACK) | (points != ball.clamped(points)).flatten(1).any(1)
    if bool(is_out.any()):
        row = int(is_out.nonzero()[0])
        raise EngineError(
            f"the attack left the ball of row {row}",
            got=f"distance {float(distances[row]):g}",
            expected=f"at most {float(ball.radius[row]):g}, within the limits",
        )
    logits = task.classifier.answers(points, task.rows)
    found = task.margins(logits)
    near = (found.abs() <= _NEAR_TIE * logits.abs().amax(1)).nonzero().flatten()
    if len(near):
        alone = task.classifier.answers(points[near], task.rows[near], at_once=1)
        single = task.pick(near).margins(alone)
        chosen = near[single > found[near]]
        logits[near] = torch.where((single > found[near])[:, None], alone, logits[near])
        found[chosen] = single[single > found[near]]
    return Judged(found, logits.argmax(1), distances)


def task_of(
    classifier: Classifier,
    points: Tensor,
    labels: Tensor,
    radius: Tensor | float,
    *,
    norm: Norm,
    targets: Tensor | None,
    rows: Tensor | None,
) -> Task:
    """A checked task; see `Attack.run`."""
    like = classifier.value
    if points.shape[1:] != like.shape[1:] or points.dtype != like.dtype or not len(points):
        raise InputError(
            f"points are not those of '{classifier.site}' of {classifier.net.name}",
            got=f"{points.dtype} of shape {tuple(points.shape)}",
            expected=f"{like.dtype} of shape (n, {', '.join(map(str, like.shape[1:]))})",
        )
    if not bool(torch.isfinite(points).all()):
        raise InputError("points hold NaN or infinity")
    n = len(points)
    if rows is None:
        rows = torch.arange(n, device=points.device)
    if tuple(rows.shape) != (n,) or int(rows.min()) < 0 or int(rows.max()) >= classifier.num:
        raise InputError(
            "rows say for each point which example's other inputs it goes with",
            got=f"shape {tuple(rows.shape)}, {int(rows.min())} to {int(rows.max())}",
            expected=f"({n},), 0 to {classifier.num - 1}",
        )
    labels = _classes(labels, "labels", n, classifier)
    if targets is not None:
        targets = _classes(targets, "targets", n, classifier)
        if bool((targets == labels).any()):
            raise TargetError(
                "a target is the label itself",
                got=f"row {int((targets == labels).nonzero()[0])}",
            )
    ball = Ball.of(norm, points.detach(), radius, classifier.within)
    return Task(classifier=classifier, ball=ball, labels=labels, rows=rows, targets=targets)


def _classes(given: Tensor, what: str, num: int, classifier: Classifier) -> Tensor:
    whole = not (given.is_floating_point() or given.dtype is torch.bool)
    if tuple(given.shape) != (num,) or not whole:
        raise TargetError(
            f"{what} are one class for each row",
            got=f"{given.dtype} of shape {tuple(given.shape)}",
            expected=f"whole numbers ({num},)",
        )
    if int(given.min()) < 0 or int(given.max()) >= classifier.num_classes:
        raise TargetError(
            f"{what} are not classes of {classifier.net.name}",
            got=f"{int(given.min())} to {int(given.max())}",
            expected=f"0 to {classifier.num_classes - 1}",
        )
    return given.to(classifier.value.device, torch.int64)


@contextmanager
def timed(progress: Progress, name: str, num: int) -> Iterator[None]:
    """Tell a progress of rows that are attacked all at once."""
    progress.start(f"attack: {name}", num, "rows")
    try:
        yield
        progress.advance(num)
    finally:
        progress.finish()


def _json(x: object) -> Json:
    if isinstance(x, Enum):
        return str(x.value)
    if isinstance(x, (bool, int, float, str)) or x is None:
        return x
    if isinstance(x, (tuple, list)):
        return [_json(y) for y in x]
    return type(x).__name__
