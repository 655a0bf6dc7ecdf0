"""Can an edit change the class of any input in a box? And by how much can it move a margin?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchclamp.bounding.ways import Method
from patchclamp.core.edits import Edit
from patchclamp.core.errors import EditError, EngineError, InputError
from patchclamp.core.findings import Interval as Span
from patchclamp.core.findings import Verdict
from patchclamp.core.progress import SILENT, Progress
from patchclamp.methods.bounds.margins import HOLDS, Classifier, around, limits_of
from patchclamp.methods.bounds.nearest_attack import NearestAttack
from patchclamp.methods.bounds.search.limits import Limits
from patchclamp.net import Net
from patchclamp.rules.base import Interval

_SPAN = "linear bounds in float64, rounded outwards"


@dataclass(frozen=True, kw_only=True)
class EditedBox:
    """What is proved of one row's box.

    Attributes:
        label: the class that it is about.
        radius: of the box.
        plain, edited: lower bounds of the smallest margin of the class over the box, without
            the edit and with it; the class is proved where both are positive.
        shift: within which every margin changes by the edit, over the box.
        verdict: holds: neither network gives another class anywhere in the box. Does not hold:
            an input was found at which only the edited one does.
    """

    label: int
    radius: float
    plain: float
    edited: float
    shift: Span
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, eq=False)
class EditResult:
    """All rows that there was time for, by number.

    Attributes:
        boxes: row -> what is proved of it.
        points: row -> the input whose class the edit changes, where one was found.
        left_out: rows that there was no time for.
        holds: what the bounds hold over.
    """

    boxes: dict[int, EditedBox]
    points: dict[int, Tensor]
    left_out: tuple[int, ...] = ()
    holds: str = HOLDS

    @property
    def largest_shift(self) -> float:
        """How much the edit can change any margin in any of the boxes, at most."""
        return max((max(-b.shift.low, b.shift.high) for b in self.boxes.values()), default=0.0)


@dataclass(frozen=True, kw_only=True)
class CertifiedEdit:
    """Bounds of the plain and the edited network's margins, and of their difference, on boxes.

    Both networks are bounded together, so that what lies before the edit is shared; behind it
    each has relaxations of its own, and even an edit of nothing has a shift there.

    Options: `method`, how they are bounded; `attack`, which looks for an input at which the
    edit changes the class.

    Shapes: inputs (batch, *input), radii one number or (batch,).
    Units: logits.
    Randomness: of the attack, by `attack.seed`.
    Cost: one bound in float64 of the network and of what lies behind the edit, a row.
    Raises: InputError, CaptureError as CertifiedRadius; EditError for an edit that has no
        rule; BoundError for an operator without one, or a site that is not captured;
        EngineError where a proof and an input that was found contradict each other.
    Fails when: relaxations are loose; the verdict is then unknown.
    Source: Zhang et al. 2018, arXiv 1811.00866; Paulsen et al. 2020, arXiv 2001.03662, for
        differences of networks.
    """

    method: Method = Method.CROWN
    attack: NearestAttack = field(default_factory=NearestAttack)

    def run(
        self,
        net: Net,
        inputs: object,
        radii: Tensor | float,
        edits: Sequence[Edit],
        *,
        labels: Tensor | None = None,
        within: tuple[Tensor, Tensor] | None = None,
        seconds: float = math.inf,
        progress: Progress = SILENT,
    ) -> EditResult:
        """Bounds on the box of every row; see CertifiedRadius for labels and within."""
        if not edits:
            raise EditError("no edits to certify", hint="give at least one")
        network = Classifier(net, net.call(inputs), tuple(edits))
        points = network.points()
        radius = torch.as_tensor(radii, dtype=torch.float64).expand(len(points))
        if not bool((radius >= 0).all()) or bool(radius.isinf().any()):
            raise InputError("radii must be finite and not negative", got=str(radius.tolist()))
        classes = network.live(points) if labels is None else labels.to(torch.int64)
        limits = Limits(seconds, progress=progress)
        limit = limits_of(points, within)
        boxes: dict[int, EditedBox] = {}
        found: dict[int, Tensor] = {}
        progress.start("certified edits", len(points), "rows")
        with torch.no_grad():
            for row in range(len(points)):
                if limits.left <= 2 * network.seconds(self.method):
                    break
                at = slice(row, row + 1)
                one = _Row(self, network, points[at], classes[at], radius[at], limit, limits)
                point = one.changed()
                if point is not None:
                    found[row] = point.reshape(network.call.tensors()[0].shape[1:])
                boxes[row] = one.box(is_changed=point is not None)
                progress.advance()
        progress.finish()
        left_out = tuple(range(len(boxes), len(points)))
        return EditResult(boxes=boxes, points=found, left_out=left_out)


@dataclass(eq=False)
class _Row:
    """One row, N = 1."""

    options: CertifiedEdit
    network: Classifier
    point: Tensor
    label: Tensor
    radius: Tensor
    limit: Interval | None
    limits: Limits

    def box(self, *, is_changed: bool) -> EditedBox:
        """What is proved of its box."""
        C = torch.cat(
            [
                self.network.rows(self.label),
                self.network.rows(self.label, plain=0.0, edited=1.0),
                self.network.rows(self.label, plain=-1.0, edited=1.0),
            ],
            1,
        )
        found = self.network.bound(
            around(self.point, self.radius, self.limit), C, self.options.method
        )
        plain, edited, low = found.lower[0].reshape(3, -1)
        high = found.upper[0].reshape(3, -1)[2]
        both = _least_sum(plain, low)  # the edited margin is the plain one and its change
        edited = torch.maximum(edited, both)
        holds = bool((plain > 0).all()) and bool((edited > 0).all())
        if holds and is_changed:
            raise EngineError(
                "an edit was proved to change no class where an input was found that it changes",
                hint="a bound is wrong: report it, with the network and the input",
            )
        verdict = Verdict.HOLDS if holds else Verdict.UNKNOWN
        return EditedBox(
            label=int(self.label),
            radius=float(self.radius),
            plain=float(plain.amin()),
            edited=float(edited.amin()),
            shift=Span(low=float(low.amin()), high=float(high.amax()), level=1.0, method=_SPAN),
            verdict=Verdict.DOES_NOT_HOLD if is_changed else verdict,
        )

    def changed(self) -> Tensor | None:
        """An input of the box whose class the edit changes, or None."""
        K = self.network.num_classes
        generator = torch.Generator().manual_seed(self.options.attack.seed)
        near = self.options.attack.descend(
            lambda x: self.network.logits(x)[:, K:],
            self.point,
            self.label,
            self.radius,
            self.limit,
            generator,
            self.limits,
        )
        for point in (self.point, near):
            if self._is_changed(point):
                return point
        return None

    def _is_changed(self, point: Tensor) -> bool:
        """Proved over the reals, and so on the live module."""
        x = point.double()
        C = torch.cat(
            [
                self.network.rows(self.label),
                self.network.rows(self.label, plain=0.0, edited=1.0),
            ],
            1,
        )
        margins = self.network.bound(Interval(x, x), C, Method.INTERVAL)
        num = self.network.num_classes - 1
        proved = bool((margins.lower[0, :num] > 0).all() and (margins.upper[0, num:] < 0).any())
        if not proved:
            return False
        plain = self.network.live(point)
        edited = self.network.live(point, self.network.edits)
        return bool(plain == self.label) and bool(edited != self.label)


def _least_sum(a: Tensor, b: Tensor) -> Tensor:
    """a + b, rounded down."""
    return torch.nextafter(a + b, torch.full_like(a, -math.inf))
