"""Whether gradients can be believed: signs that an attack by gradient fails for its own reasons.

A network whose gradients vanish, are noise or point nowhere looks robust to attacks that follow
them, and is not. Each sign is one number held against a threshold; one sign is enough to say
that the accuracy under gradient attacks is not to be called robust.

Source: Athalye et al. 2018, arXiv 1802.00420 (one-step better than many-step, score-based better
than gradient, larger radius without effect); Carlini et al. 2019, arXiv 1902.06705; Croce & Hein
2020, arXiv 2003.01690 (scale of the logits).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError, TargetError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.methods.robustness.attacks.balls import Norm
from patchclamp.methods.robustness.attacks.base import Attack, Task, task_of, timed
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.attacks.fgsm import FGSM
from patchclamp.methods.robustness.attacks.losses import Loss
from patchclamp.methods.robustness.attacks.pgd import PGD
from patchclamp.methods.robustness.attacks.sparse import SparseSearch
from patchclamp.methods.robustness.attacks.square import Square
from patchclamp.methods.scoring import Passes

_LEAST_ROWS = 10
_LEAST_GAP = 2
"""Rows by which one attack must break more than another before that is a sign."""
_TINY_STEP = 1e-3
_FEW = 64
"""Elements that are moved to look for stairs."""
_PLAIN = "many steps"
_WIDE = 32.0
"""Without limits, the large radius is this many times the radius."""


class Verdict(StrEnum):
    """What the signs say together."""

    MASKED = "masked"
    NO_SIGN = "no sign"
    UNKNOWN = "unknown"
    """Too few rows that are right to begin with, or nothing could be measured."""


@dataclass(frozen=True, kw_only=True)
class Sign:
    """One measurement.

    Attributes:
        name: of the sign.
        measured: the number; None where it could not be measured.
        threshold: above it the sign is there.
        meaning: of the number.
    """

    name: str
    measured: float | None
    threshold: float
    meaning: str

    @property
    def is_there(self) -> bool:
        """Whether the number is above the threshold."""
        return self.measured is not None and self.measured > self.threshold


@dataclass(frozen=True, kw_only=True)
class Masking:
    """What was found.

    Attributes:
        verdict: of all signs.
        signs: all that were looked for.
        gradient_accuracy: the share of all rows that plain PGD on the cross-entropy left right,
            which is what is commonly reported; None where no gradient reaches the input.
        lowest_accuracy: that all attacks run here left right together.
        num_rows: that are right as they are, which all signs are measured on.
        passes: rows that went through the network.
    """

    verdict: Verdict
    signs: tuple[Sign, ...]
    gradient_accuracy: float | None
    lowest_accuracy: float
    num_rows: int
    passes: Passes

    @property
    def found(self) -> tuple[Sign, ...]:
        """The signs that are there."""
        return tuple(sign for sign in self.signs if sign.is_there)

    @property
    def statement(self) -> str:
        """The accuracy under gradient attacks and how it may be read."""
        if self.gradient_accuracy is None:
            return "no gradient reaches the input: attacks by gradient say nothing"
        text = f"accuracy under PGD {self.gradient_accuracy:.2f}"
        if self.verdict is Verdict.MASKED:
            why = ", ".join(sign.name for sign in self.found)
            return f"{text}: an upper bound only, not robust accuracy (gradients masked: {why})"
        if self.verdict is Verdict.UNKNOWN:
            return f"{text}: an upper bound only (too little was measured to look for masking)"
        return f"{text}: an upper bound of robust accuracy (no sign of masked gradients)"


@dataclass(frozen=True, kw_only=True)
class MaskingCheck:
    """Looks for masked gradients on rows that the network gets right.

    Options: `num_steps` of the gradient attacks; `num_queries` of the one without gradients;
    `gap`, by how much an attack that should be weaker may break more, as a share of the rows;
    `share`, of rows with gradients or answers that cannot be used; `noise`, by how much two runs
    of the same rows may differ, as a share of the largest logit; `scale`, of margins, at which
    the cross-entropy in float32 has lost the label's own slope (2^-24 is e^-16.6) for most rows;
    `left`, the accuracy that may be left at a radius as wide as the limits; `seed`.

    Shapes: points (n, *feature), labels (n,).
    Units: those of the input for the radius; shares for all signs but the scale.
    Randomness: of the attacks, by `seed`.
    Cost: about 4 num_steps forwards and backwards and num_queries + 20 forwards a row.
    Raises: as `Attack.run`.
    Fails when: rows are few (the verdict is then unknown), the radius is so large that
        everything breaks at once, or gradients are masked in a way that fools all these attacks.
    Source: see the module.
    """

    num_steps: int = 20
    num_queries: int = 500
    gap: float = 0.05
    share: float = 0.1
    noise: float = 1e-4
    scale: float = 16.6
    left: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 2 or self.num_queries < 1:
            raise OptionError("masking is looked for with two steps and a query", got=f"{self}")

    def run(
        self,
        classifier: Classifier,
        points: Tensor,
        labels: Tensor,
        radius: float,
        *,
        norm: Norm = Norm.LINF,
        rows: Tensor | None = None,
        progress: Progress = SILENT,
    ) -> Masking:
        """Measure all signs; arguments as in `Attack.run`."""
        task = task_of(classifier, points, labels, radius, norm=norm, targets=None, rows=rows)
        passes = classifier.passes
        before = Passes(passes.forwards, passes.backwards)
        with torch.no_grad(), timed(progress, "masking", task.num):
            right = (task.tried(task.points) > 0).nonzero().flatten()
            measure = _Measure(self, task.pick(right), radius) if len(right) else None
            signs = measure.signs() if measure is not None else ()
        by_gradient = measure.by_gradient() if measure is not None else 0
        lowest = measure.left() if measure is not None else 0
        spent = Passes(passes.forwards - before.forwards, passes.backwards - before.backwards)
        return Masking(
            verdict=_verdict(signs, len(right), radius),
            signs=signs,
            gradient_accuracy=None if by_gradient is None else by_gradient / task.num,
            lowest_accuracy=lowest / task.num,
            num_rows=len(right),
            passes=spent,
        )


def _verdict(signs: tuple[Sign, ...], num: int, radius: float) -> Verdict:
    if num < _LEAST_ROWS or radius == 0:
        return Verdict.UNKNOWN
    if any(sign.is_there for sign in signs):
        return Verdict.MASKED
    is_known = all(sign.measured is not None for sign in signs)
    return Verdict.NO_SIGN if is_known else Verdict.UNKNOWN


class _Measure:
    """The signs of one task, whose rows are all right as they are."""

    def __init__(self, options: MaskingCheck, task: Task, radius: float) -> None:
        self.options, self.task, self.radius = options, task, radius
        self.has_gradient = True
        self.broken: dict[str, Tensor] = {}

    def signs(self) -> tuple[Sign, ...]:
        """All of them."""
        start = (self._noise(), self._scale(), self._flat())
        o = self.options
        attacks: dict[str, Attack] = {
            "one step": FGSM(),
            _PLAIN: PGD(num_steps=o.num_steps, seed=o.seed),
            "margin": PGD(num_steps=o.num_steps, seed=o.seed, loss=Loss.MARGIN),
            "scores": SparseSearch(num_queries=o.num_queries, seed=o.seed)
            if self.task.ball.norm is Norm.L0
            else Square(num_queries=o.num_queries, seed=o.seed),
        }
        for name, attack in attacks.items():
            self._attack(name, attack)
        return (*start, self._zero(), self._gradient(), *self._gaps(), self._wide())

    def by_gradient(self) -> int | None:
        """Rows that plain PGD left right."""
        broken = self.broken.get(_PLAIN)
        return None if broken is None else int((~broken).sum())

    def left(self) -> int:
        """Rows that no attack broke."""
        return int((~torch.stack(list(self.broken.values())).any(0)).sum())

    def _attack(self, name: str, attack: Attack) -> None:
        if attack.needs_gradient and not self.has_gradient:
            return
        try:
            self.broken[name] = attack.judged(self.task).is_broken
        except TargetError:
            if not attack.needs_gradient:
                raise
            self.has_gradient = False

    # ---- of the network as it is ------------------------------------------------

    def _noise(self) -> Sign:
        task = self.task
        size = len(task.points) if task.num < 32 else 32
        runs = [task.classifier.answers(task.points, task.rows, at_once=size) for _ in range(2)]
        apart = float((runs[0] - runs[1]).abs().max() / runs[0].abs().max().clamp(min=1e-30))
        return Sign(
            name="nondeterminism",
            measured=apart,
            threshold=self.options.noise,
            meaning="difference of two runs of the same rows, as a share of the largest logit",
        )

    def _scale(self) -> Sign:
        margin = self.task.tried(self.task.points).median()
        return Sign(
            name="logit scale",
            measured=float(margin),
            threshold=self.options.scale,
            meaning="median margin; above it the cross-entropy is saturated in float32",
        )

    def _flat(self) -> Sign:
        """Rows whose answer moves with a step and not at all with a tiny part of it.

        Both are steps of a few elements, from a random point: data often lie on the very edges
        of stairs, and of very many elements some always cross one.
        """
        task = self.task
        generator = torch.Generator().manual_seed(self.options.seed)
        start, far = task.ball.drawn(generator), task.ball.drawn(generator)
        order = torch.rand(start.flatten(1).shape, generator=generator).argsort(1).argsort(1)
        chosen = (order < _FEW).reshape(start.shape).to(start.device)
        step = torch.where(chosen, far - start, 0.0)
        steps = (torch.zeros_like(step), step, _TINY_STEP * step)
        here, there, near = (task.classifier.answers(start + s, task.rows) for s in steps)
        is_flat = (near == here).all(1) & (there != here).any(1)
        return Sign(
            name="staircase",
            measured=float(is_flat.double().mean()),
            threshold=self.options.share,
            meaning="rows whose logits a step moves and a thousandth of it leaves exactly alone",
        )

    def _zero(self) -> Sign:
        """At the rows and at a random point of each ball."""
        measured = None
        if self.has_gradient:
            generator = torch.Generator().manual_seed(self.options.seed)
            zero = [
                (self.task.slopes(x, Loss.CE, None).slopes == 0).flatten(1).all(1)
                for x in (self.task.points, self.task.ball.drawn(generator))
            ]
            measured = float(torch.cat(zero).double().mean())
        return Sign(
            name="zero gradients",
            measured=measured,
            threshold=self.options.share,
            meaning="rows and random points near them at which the gradient of CE is exactly 0",
        )

    def _gradient(self) -> Sign:
        return Sign(
            name="no gradient",
            measured=0.0 if self.has_gradient else 1.0,
            threshold=0.5,
            meaning="1 where no finite gradient reaches the input",
        )

    # ---- of attacks -------------------------------------------------------------

    def _gaps(self) -> tuple[Sign, ...]:
        pairs = (
            ("one step beats many", "one step", _PLAIN),
            ("margin beats cross-entropy", "margin", _PLAIN),
            ("scores beat gradients", "scores", _PLAIN),
        )
        return tuple(self._gap(*pair) for pair in pairs)

    def _gap(self, name: str, weak: str, strong: str) -> Sign:
        threshold = max(self.options.gap, (_LEAST_GAP - 0.5) / self.task.num)
        measured = None
        if weak in self.broken and strong in self.broken:
            gap = self.broken[weak].double().mean() - self.broken[strong].double().mean()
            measured = float(gap)
        return Sign(
            name=name,
            measured=measured,
            threshold=threshold,
            meaning=f"rows broken by '{weak}' less those by '{strong}', as a share",
        )

    def _wide(self) -> Sign:
        """What many steps leave at a radius at which nothing should be left."""
        measured = None
        if self.has_gradient:
            task, within = self.task, self.task.classifier.within
            radius = _WIDE * self.radius
            if task.ball.norm is Norm.L0:
                radius = float(task.points[0].numel())
            elif within is not None:
                size = (within[1] - within[0]).double().flatten()
                radius = float(size.max() if task.ball.norm is Norm.LINF else size.norm())
            attack = PGD(num_steps=self.options.num_steps, seed=self.options.seed)
            found = attack.run(
                task.classifier,
                task.points,
                task.labels,
                radius,
                norm=task.ball.norm,
                rows=task.rows,
            )
            measured = found.accuracy
        return Sign(
            name="large radius without effect",
            measured=measured,
            threshold=self.options.left,
            meaning="rows that many steps leave right where the whole range is allowed",
        )
