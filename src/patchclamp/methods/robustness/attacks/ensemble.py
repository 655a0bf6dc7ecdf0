"""Several attacks one after another, and for every row the worst that any of them found.

Source: Croce & Hein 2020, arXiv 2003.01690 (AutoAttack): attacks that fail for different
reasons, cheap ones first, each on the rows that are left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError, TargetError
from patchclamp.core.findings import Json
from patchclamp.core.progress import SILENT, Progress
from patchclamp.methods.robustness.attacks.apgd import APGD
from patchclamp.methods.robustness.attacks.balls import Norm
from patchclamp.methods.robustness.attacks.base import (
    Attack,
    Attacked,
    Task,
    task_of,
    timed,
)
from patchclamp.methods.robustness.attacks.boundary import Boundary
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.attacks.losses import Loss
from patchclamp.methods.robustness.attacks.pgd import PGD
from patchclamp.methods.robustness.attacks.sparse import SparseSearch
from patchclamp.methods.robustness.attacks.square import Square
from patchclamp.methods.scoring import Passes

CLEAN = "none needed"
"""What broke a row that the network gets wrong as it is."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What one attack of the ensemble did.

    Attributes:
        attack: its name, with what tells it from others of that name.
        options: it was run with.
        num_rows: that were left for it; num_broken: of these.
        num_unconfirmed: that it took for broken and a fresh run did not.
        passes: rows that went through the network.
        refused: why it could not be run, where it could not: no gradient, for one.
    """

    attack: str
    options: dict[str, Json]
    num_rows: int
    num_broken: int
    num_unconfirmed: int
    passes: Passes
    refused: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        row: its number.
        label: the class to be left; clean: the network's answer on the row as it is; answer: at
            the worst point.
        broken_by: the attack that broke it; "none needed" where the row itself is broken; None
            where nothing did.
        margin: at the worst point; distance: of that point.
    """

    row: int
    label: int
    clean: int
    answer: int
    broken_by: str | None
    margin: float
    distance: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Combined:
    """The worst over the ensemble.

    Attributes:
        norm, radius: the points allowed.
        points: (n, *feature), the worst of each row.
        table: a line for each row.
        tried: an entry for each attack, in order.
        clean_accuracy: the share of rows that are right as they are.
        passes: of everything.
    """

    norm: Norm
    radius: Tensor
    points: Tensor
    table: tuple[Row, ...]
    tried: tuple[Tried, ...]
    clean_accuracy: float
    passes: Passes

    @property
    def is_broken(self) -> Tensor:
        """(n,)."""
        return torch.tensor([row.broken_by is not None for row in self.table])

    @property
    def accuracy(self) -> float:
        """The share of rows that nothing broke: an upper bound of the robust accuracy."""
        return sum(row.broken_by is None for row in self.table) / len(self.table)


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Attacks in order, each on the rows that those before it did not break.

    Options: `attacks`; `Ensemble.standard` gives those of AutoAttack without FAB.

    Shapes: points (n, *feature), labels (n,).
    Units: those of the input.
    Randomness: of the attacks, by their own seeds.
    Cost: the sum of the attacks on the rows that are left.
    Raises: as `Attack.run`; TargetError only where no attack at all could be run. An attack
        that needs a gradient is entered as refused where there is none.
    Fails when: all attacks do; a row that is left may still be broken.
    Source: Croce & Hein 2020, arXiv 2003.01690.
    """

    attacks: tuple[Attack, ...]

    def __post_init__(self) -> None:
        if not self.attacks:
            raise OptionError("an ensemble of no attacks", hint="Ensemble.standard")

    @classmethod
    def standard(
        cls,
        norm: Norm,
        num_classes: int,
        *,
        targeted: bool = False,
        num_steps: int = 50,
        num_queries: int = 1000,
        seed: int = 0,
    ) -> Ensemble:
        """Attacks with and without gradients, with losses that fail for different reasons.

        Args:
            norm: L-inf and L2: APGD on CE, APGD on DLR, APGD on DLR aimed at single classes,
                Square; for L2 the boundary attack too. L0: PGD on CE and on the margin, and
                sparse search.
            num_classes: where there are too few for DLR the margin takes its place.
            targeted: for attacks with targets, which are not aimed at other classes.
        """
        if norm is Norm.L0:
            return cls(
                attacks=(
                    PGD(num_steps=num_steps, momentum=0.75, seed=seed),
                    PGD(num_steps=num_steps, momentum=0.75, seed=seed, loss=Loss.MARGIN),
                    SparseSearch(num_queries=num_queries, seed=seed),
                )
            )
        ratio = Loss.DLR if num_classes >= (4 if targeted else 3) else Loss.MARGIN
        attacks: list[Attack] = [
            APGD(num_steps=num_steps, seed=seed),
            APGD(num_steps=num_steps, seed=seed, loss=ratio),
        ]
        if num_classes >= 4 and not targeted:
            num = min(9, num_classes - 1)
            attacks.append(APGD(num_steps=num_steps, seed=seed, loss=ratio, num_targets=num))
        attacks.append(Square(num_queries=num_queries, seed=seed))
        if norm is Norm.L2:
            attacks.append(Boundary(num_steps=max(1, num_queries // 2), seed=seed))
        return cls(attacks=tuple(attacks))

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
    ) -> Combined:
        """Attack rows; arguments as in `Attack.run`."""
        task = task_of(classifier, points, labels, radius, norm=norm, targets=targets, rows=rows)
        return self.judged(task, progress=progress)

    def judged(self, task: Task, *, progress: Progress = SILENT) -> Combined:
        """The same of a checked task."""
        for attack in self.attacks:
            attack.check(task)
        work = _Work.of(task)
        refusals: list[TargetError] = []
        for attack in self.attacks:
            if not len(work.todo):
                break
            with timed(progress, attack.name, len(work.todo)):
                refusal = work.attacked(attack)
            if refusal is not None:
                refusals.append(refusal)
        if len(refusals) == len(self.attacks):
            raise refusals[0]
        return work.combined()


def label_of(attack: Attack) -> str:
    """The attack's name with its loss, where it has one, and whether it aims at classes."""
    options = attack.options()
    parts = [attack.name]
    if "loss" in options:
        parts.append(str(options["loss"]))
    if options.get("num_targets"):
        parts.append("aimed")
    return " ".join(parts)


@dataclass(eq=False)
class _Work:
    """The rows in the course of a run; all tensors have an entry for each."""

    task: Task
    before: Passes
    clean: Tensor
    points: Tensor
    margins: Tensor
    answers: Tensor
    distances: Tensor
    broken_by: list[str | None]
    tried: list[Tried]

    @classmethod
    def of(cls, task: Task) -> _Work:
        passes = task.classifier.passes
        before = Passes(passes.forwards, passes.backwards)
        logits = task.classifier.answers(task.points, task.rows)
        margins, answers = task.margins(logits), logits.argmax(1)
        return cls(
            task=task,
            before=before,
            clean=answers,
            points=task.points.clone(),
            margins=margins,
            answers=answers.clone(),
            distances=torch.zeros(task.num, dtype=torch.float64, device=margins.device),
            broken_by=[CLEAN if m < 0 else None for m in margins.tolist()],
            tried=[],
        )

    @property
    def todo(self) -> Tensor:
        left = [i for i, by in enumerate(self.broken_by) if by is None]
        return torch.tensor(left, dtype=torch.long, device=self.points.device)

    def attacked(self, attack: Attack) -> TargetError | None:
        """Run one attack; gives back why it was refused, where it was."""
        todo, name = self.todo, label_of(attack)
        passes = self.task.classifier.passes
        before = Passes(passes.forwards, passes.backwards)
        try:
            found = attack.judged(self.task.pick(todo))
        except TargetError as error:
            if not attack.needs_gradient:
                raise
            spent = _since(passes, before)
            self.tried.append(_tried(name, attack, len(todo), None, spent, error.what))
            return error
        self.tried.append(_tried(name, attack, len(todo), found, found.passes, None))
        is_worse = found.margins < self.margins[todo]
        chosen = todo[is_worse]
        self.points[chosen] = found.points[is_worse]
        self.margins[chosen] = found.margins[is_worse]
        self.answers[chosen] = found.classes[is_worse]
        self.distances[chosen] = found.distances[is_worse]
        for index in todo[found.is_broken].tolist():
            self.broken_by[index] = name
        return None

    def combined(self) -> Combined:
        """The result."""
        task = self.task
        columns = zip(
            task.labels.tolist(),
            self.clean.tolist(),
            self.answers.tolist(),
            self.broken_by,
            self.margins.tolist(),
            self.distances.tolist(),
            strict=True,
        )
        table = tuple(
            Row(row=i, label=y, clean=c, answer=a, broken_by=by, margin=m, distance=d)
            for i, (y, c, a, by, m, d) in enumerate(columns)
        )
        return Combined(
            norm=task.ball.norm,
            radius=task.ball.radius,
            points=self.points,
            table=table,
            tried=tuple(self.tried),
            clean_accuracy=float((self.clean == task.labels).double().mean()),
            passes=_since(task.classifier.passes, self.before),
        )


def _since(now: Passes, before: Passes) -> Passes:
    return Passes(now.forwards - before.forwards, now.backwards - before.backwards)


def _tried(
    name: str, attack: Attack, num: int, found: Attacked | None, passes: Passes, why: str | None
) -> Tried:
    return Tried(
        attack=name,
        options=attack.options(),
        num_rows=num,
        num_broken=0 if found is None else int(found.is_broken.sum()),
        num_unconfirmed=0 if found is None else found.num_unconfirmed,
        passes=passes,
        refused=why,
    )
