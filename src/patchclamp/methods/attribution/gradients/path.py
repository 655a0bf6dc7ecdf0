"""One example's way from its baseline, in panels of which the worst is halved first.

Gradients of large inputs are not all kept. A panel whose gradients were dropped is closed: it
is in the total already. Should it turn out to be by far the worst, its ends are computed again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

_NARROWEST = 2.0**-20
"""Panels are halved down to this share of the path: below, float32 cannot tell their ends."""

_REOPENED = 4.0
"""A closed panel is halved only if it is so many times as bad as the worst open one: that costs
three gradients, and not one. On EfficientNet-Lite0, 8 gradients kept then do nearly as well as
all of them."""


@dataclass(frozen=True, slots=True)
class Point:
    """A point along the way.

    Attributes:
        at: share of the way, 0 at the baseline.
        score: there.
        slope: of the score along the way, by the gradient.
    """

    at: float
    score: float
    slope: float


@dataclass(frozen=True, slots=True)
class Panel:
    """What lies between two points."""

    left: Point
    right: Point

    @property
    def width(self) -> float:
        """Share of the way."""
        return self.right.at - self.left.at

    @property
    def middle(self) -> float:
        """Where it is halved."""
        return (self.left.at + self.right.at) / 2

    @property
    def missed(self) -> float:
        """How far the trapezoid rule is off the change of the score."""
        change = self.right.score - self.left.score
        return abs(change - self.width * (self.left.slope + self.right.slope) / 2)

    @property
    def can_halve(self) -> bool:
        """Whether halving may make it better."""
        return self.missed > 0 and self.width >= 2 * _NARROWEST


@dataclass(eq=False)
class Path:
    """One example's way from its baseline, panel by panel, the worst halved first.

    Attributes:
        total: integral of the gradient over closed panels, (*site).
        kept: how many gradients may be held.
        num: gradients taken.
        open: panels whose gradients are held.
        closed: panels that are in `total`.
        first: score of the baseline.
    """

    row: int
    total: Tensor
    kept: int
    num: int = 0
    open: list[Panel] = field(default_factory=list)
    closed: list[Panel] = field(default_factory=list)
    first: float = 0.0
    _last: Point | None = None
    _halved: Panel | None = None
    _change: float = 0.0
    _grads: dict[float, Tensor] = field(default_factory=dict)

    def add(self, point: Point, grad: Tensor) -> None:
        """A point that was wanted: the first ones from the baseline on, then as `refined` says."""
        self.num += 1
        self._grads[point.at] = grad
        halved, last = self._halved, self._last
        if halved is None:
            if last is None:
                self.first = point.score
            else:
                self.open.append(Panel(last, point))
            self._last = point
        elif point.at == halved.middle:
            if halved in self.closed:
                self.closed.remove(halved)
                self._count(halved, -1)
            else:
                self.open.remove(halved)
            self.open += [Panel(halved.left, point), Panel(point, halved.right)]
            self._halved = None
        self._drop()

    def refined(self, tolerance: float, most: int) -> list[float]:
        """Where points are wanted next; none when the path is done, and all panels closed."""
        last, self._last = self._last, None
        self._change = self._change if last is None else abs(last.score - self.first)
        if self.unresolved > tolerance * self._change:
            for panel in self._worst():
                ends = [p.at for p in (panel.left, panel.right) if p.at not in self._grads]
                if self.num + len(ends) < most:
                    self._halved = panel
                    return [*ends, panel.middle]
        while self.open:
            self._close(self.open[-1])
        self._grads.clear()
        return []

    @property
    def unresolved(self) -> float:
        """Sum over all panels of what they miss."""
        return sum(p.missed for p in (*self.open, *self.closed))

    def _worst(self) -> list[Panel]:
        """The panel to halve, and the one to halve if there are too few gradients left for it."""
        bad = [
            max(some, key=lambda p: p.missed)
            for some in ([p for p in panels if p.can_halve] for panels in (self.open, self.closed))
            if some
        ]
        is_shut = len(bad) == 2 and bad[1].missed > _REOPENED * bad[0].missed
        return bad[::-1] if is_shut else bad

    def _drop(self) -> None:
        """Close the best panels until no more gradients are held than may be."""
        while True:
            needed = {p.at for panel in self.open for p in (panel.left, panel.right)}
            needed |= set() if self._last is None else {self._last.at}
            if self._halved is not None:
                needed |= {self._halved.left.at, self._halved.right.at}
            for at in [at for at in self._grads if at not in needed]:
                del self._grads[at]
            spare = [p for p in self.open if p is not self._halved]
            if len(self._grads) <= self.kept or not spare:
                return
            self._close(min(spare, key=lambda p: p.missed))

    def _close(self, panel: Panel) -> None:
        self.open.remove(panel)
        self.closed.append(panel)
        self._count(panel, 1)

    def _count(self, panel: Panel, times: int) -> None:
        for point in (panel.left, panel.right):
            self.total.add_(self._grads[point.at], alpha=times * panel.width / 2)
