"""How far inputs may move before the class can change: proved from below, attacked from above."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchclamp.bounding.ways import Method
from patchclamp.core.errors import BoundError, EngineError, InputError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.methods.bounds.margins import HOLDS, Classifier, around, limits_of
from patchclamp.methods.bounds.nearest_attack import NearestAttack
from patchclamp.methods.bounds.search.limits import Limits
from patchclamp.net import Net
from patchclamp.rules.base import Interval

_MAX_ROWS = 64
_SECONDS_AT_ONCE = 0.02
"""Rows are bounded side by side as long as one is this cheap: more gains nothing then."""

Margin = Callable[[Tensor], Tensor]
"""Radii (N,) -> a lower bound of the smallest margin at each, (N,)."""


@dataclass(frozen=True, kw_only=True)
class Radius:
    """What is known of one row.

    Attributes:
        label: the class that it is about; predicted: the class that the live network gives.
        certified: no input within this radius is of another class; None where not even the
            row itself is proved to be of its class.
        attacked: at this radius an input of another class lies, 0 for the row itself; None
            where none was found.
        method: what proved the radius; "" where the row alone is proved, or nothing.
        searched: whether there was time to attack it.
    """

    label: int
    predicted: int
    certified: float | None
    attacked: float | None
    method: str = ""
    searched: bool = True

    @property
    def is_right(self) -> bool:
        """Whether the live network gives the label."""
        return self.label == self.predicted


@dataclass(frozen=True, kw_only=True, eq=False)
class RadiusResult:
    """All rows.

    Attributes:
        rows: one each.
        points: row -> the attacked input, (*input).
        max_radius: how far was looked.
        left_out: method -> how many rows there was no time for.
        holds: what the certified radii hold over.
    """

    rows: tuple[Radius, ...]
    points: Mapping[int, Tensor]
    max_radius: float
    left_out: Mapping[str, int] = field(default_factory=dict)
    holds: str = HOLDS


@dataclass(frozen=True, kw_only=True)
class CertifiedRadius:
    """The largest L-inf radius at which a row's class is proved, and the smallest that changes it.

    Each method in turn looks for the largest radius in float32 and proves it in float64 with
    bounds rounded outwards; a radius counts if its own box was proved. Beside it stands the
    distance of the nearest input of another class that an attack found. In between, and where
    neither exists, nothing is known.

    Options: `methods`, from the cheapest to the tightest; `max_radius`, how far is looked;
    `tolerance`, how close the search comes to what a method can prove, as a share of it;
    `attack`.

    Shapes: inputs (batch, *input) of real numbers, labels (batch,).
    Units: those of the network's input.
    Randomness: of the attack, by `attack.seed`.
    Cost: the attack, then about ten bounds in float32 and two in float64 a row and method.
        Methods stop where the time is up, rows in order; `left_out` says how many are missing.
    Raises: InputError, CaptureError for a network that is no classifier of real numbers;
        BoundError for an operator without a rule; EngineError where a proof and an attack
        contradict each other, which would be an error in the bounds.
    Fails when: relaxations are loose (deep or wide networks, attention): the certified radius
        is then much smaller than the true one.
    Source: Weng et al. 2018, arXiv 1804.09699; Zhang et al. 2018, arXiv 1811.00866.
    """

    methods: tuple[Method, ...] = (
        Method.INTERVAL,
        Method.FORWARD_CROWN,
        Method.CROWN,
        Method.ALPHA,
    )
    max_radius: float = 1.0
    tolerance: float = 0.02
    attack: NearestAttack = field(default_factory=NearestAttack)

    def run(
        self,
        net: Net,
        inputs: object,
        *,
        labels: Tensor | None = None,
        within: tuple[Tensor, Tensor] | None = None,
        seconds: float = math.inf,
        progress: Progress = SILENT,
    ) -> RadiusResult:
        """Radii of every row.

        Args:
            labels: the class that each row should have; the network's own by default.
            within: limits of inputs that exist, such as those of pixels; tensors that
                broadcast to one input.
            seconds: wall time; two fifths of it at most for the attack.
        """
        network = Classifier(net, net.call(inputs))
        work = _Work(self, network, labels, within, Limits(seconds, progress=progress))
        with torch.no_grad():
            return work.done()


@dataclass(eq=False)
class _Work:
    """One run. All tensors have a number for each row."""

    options: CertifiedRadius
    network: Classifier
    labels: Tensor | None
    within: tuple[Tensor, Tensor] | None
    limits: Limits

    def __post_init__(self) -> None:
        self.points = self.network.points()
        self.limit = limits_of(self.points, self.within)
        self.predicted = self.network.live(self.points)
        self.classes = self.predicted if self.labels is None else self.labels.to(torch.int64)
        if self.classes.shape != self.predicted.shape:
            raise InputError(
                "labels must be one number for each row",
                got=f"shape {tuple(self.classes.shape)}",
                expected=f"({len(self.points)},)",
            )
        last = self.network.num_classes - 1
        if bool((self.classes < 0).any()) or bool((self.classes > last).any()):
            raise InputError(
                f"labels must be classes that {self.network.net.name} has",
                got=f"{int(self.classes.min())} to {int(self.classes.max())}",
                expected=f"0 to {last}",
            )
        num = len(self.points)
        self.certified = torch.full((num,), math.nan, dtype=torch.float64)
        self.attacked = torch.full((num,), math.inf, dtype=torch.float64)
        self.margin = torch.zeros(num, dtype=torch.float64)
        """A lower bound of the smallest margin at the certified radius."""
        self.found = self.points.clone()
        self.searched = torch.zeros(num, dtype=torch.bool)
        self.method = [""] * num
        self.left_out: dict[str, int] = {}

    def done(self) -> RadiusResult:
        """Everything that there is time for."""
        self._rows_alone()
        self._attack()
        for method in self.options.methods:
            self._prove_all(Method(method))
        self._check()
        rows = [
            Radius(
                label=int(self.classes[i]),
                predicted=int(self.predicted[i]),
                certified=None if bool(self.certified[i].isnan()) else float(self.certified[i]),
                attacked=None if bool(self.attacked[i].isinf()) else float(self.attacked[i]),
                method=self.method[i],
                searched=bool(self.searched[i]),
            )
            for i in range(len(self.points))
        ]
        shape = self.points.shape[2:] if self.network.varying else self.points.shape[1:]
        points = {i: self.found[i].reshape(shape) for i, r in enumerate(rows) if r.attacked}
        return RadiusResult(
            rows=tuple(rows),
            points=points,
            max_radius=self.options.max_radius,
            left_out=self.left_out,
        )

    def _rows_alone(self) -> None:
        """Radius 0, proved like any other; a row of another class is an attack of itself."""
        x = self.points.double()
        margins = self.network.bound(
            Interval(x, x), self.network.rows(self.classes), Method.INTERVAL
        )
        self.margin = margins.lower.amin(1)
        right = (self.predicted == self.classes) & (self.margin > 0)
        self.certified[right] = 0.0
        wrong = (self.predicted != self.classes) & (margins.upper < 0).any(1)
        self.attacked[wrong] = 0.0
        self.searched = ~right

    def _attack(self) -> None:
        rows = (self.certified == 0).nonzero().flatten()
        limits = Limits(0.4 * self.limits.left)
        self.limits.progress.start("attacks", len(rows), "rows")
        for at in rows.split(_MAX_ROWS):
            if limits.left <= 0:
                self.left_out["attack"] = self.left_out.get("attack", 0) + len(at)
                continue
            distance, found = self.options.attack.run(
                self.network,
                self.points[at],
                self.classes[at],
                self.options.max_radius,
                self.limit,
                limits,
            )
            self.attacked[at], self.found[at], self.searched[at] = distance, found, True
            self.limits.progress.advance(len(at))
        self.limits.progress.finish()

    def _prove_all(self, method: Method) -> None:
        rows = (self.certified >= 0).nonzero().flatten()
        each = self.network.seconds(method)
        self.limits.progress.start(f"radii by {method}", len(rows), "rows")
        one_pass = self.network.seconds(Method.CROWN) if method is Method.ALPHA else each
        for at in rows.split(max(1, min(_MAX_ROWS, int(_SECONDS_AT_ONCE / one_pass)))):
            if self.limits.left <= 3 * each:
                self.left_out[str(method)] = self.left_out.get(str(method), 0) + len(at)
                continue
            self._prove(method, at)
            self.limits.progress.advance(len(at))
        self.limits.progress.finish()

    def _prove(self, method: Method, at: Tensor) -> None:
        """A larger radius for some rows, if this method has one."""
        low, margin = self.certified[at], self.margin[at]
        high = self.attacked[at].clamp(max=self.options.max_radius)
        fast = self._margin(method, at, rounded=False)
        near = torch.where(low > 0, torch.minimum(4 * low, high), high)  # boxes of use are small
        guess, at_guess = self._largest(fast, low, margin, near, 12)
        if bool(((guess == near) & (near < high)).any()):
            guess, _ = self._largest(fast, guess, at_guess, high, 12)
        exact = self._margin(method, at, rounded=True)
        found, margin = self._largest(exact, low, margin, guess, 8)
        for i, row in enumerate(at.tolist()):
            if found[i] > self.certified[row]:
                self.certified[row], self.margin[row] = found[i], margin[i]
                self.method[row] = str(method)

    def _margin(self, method: Method, at: Tensor, *, rounded: bool) -> Margin:
        points, rows = self.points[at], self.network.rows(self.classes[at])

        def margin(radius: Tensor) -> Tensor:
            box = around(points, radius, self.limit)
            try:
                return self.network.bound(box, rows, method, rounded=rounded).lower.amin(1).double()
            except BoundError:  # a function is not defined, or overflows, on boxes this large
                return torch.full_like(radius, -math.inf)

        return margin

    def _largest(
        self, bound: Margin, low: Tensor, margin: Tensor, high: Tensor, num_steps: int
    ) -> tuple[Tensor, Tensor]:
        """The largest radius in (low, high] whose margin is found to be positive.

        False position as in Dowell & Jarratt 1971 (Illinois): where one end stays, its value
        is halved. A linear network is done in two steps.
        """
        if bool((high <= low).all()):
            return low, margin
        at_high = bound(high)
        reached = at_high > 0
        low, margin = torch.where(reached, high, low), torch.where(reached, at_high, margin)
        weight_low, weight_high = margin.clone(), at_high
        side = torch.zeros_like(low)
        for _ in range(num_steps):
            gap = high - low
            if self.limits.left <= 0 or bool((gap <= self.options.tolerance * high).all()):
                break
            at = low + gap * weight_low / (weight_low - weight_high)
            gain = torch.where(gap <= 0.5 * high, at - low, gap)
            if bool((gain <= self.options.tolerance * high).all()):
                break
            at = torch.where(torch.isfinite(at), at, low + gap / 2)
            at = torch.maximum(torch.minimum(at, high * (1 - 1e-7)), low + 0.02 * gap)
            value = bound(at)
            good = value > 0
            low, margin = torch.where(good, at, low), torch.where(good, value, margin)
            high = torch.where(good, high, at)
            weight_low = torch.where(good, value, torch.where(side < 0, weight_low / 2, weight_low))
            weight_high = torch.where(
                good, torch.where(side > 0, weight_high / 2, weight_high), value
            )
            side = torch.where(good, 1.0, -1.0)
        return low, margin

    def _check(self) -> None:
        """A proof that an attack contradicts would be a wrong bound."""
        bad = (self.certified >= self.attacked).nonzero().flatten()
        if len(bad):
            row = int(bad[0])
            raise EngineError(
                f"row {row} was proved to keep its class where an attack changed it, so a bound "
                f"of {self.network.net.name} is wrong",
                got=f"certified {float(self.certified[row])!r} by {self.method[row]}, "
                f"attacked {float(self.attacked[row])!r}",
                expected="a certified radius below the attacked one",
                hint="report it, with the network and the input",
            )
