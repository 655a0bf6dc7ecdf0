"""Networks whose use of the input is known, and how well a map shows it.

A *planted map* is a trained network with examples of which it is known where the label comes
from (`signal`) and where, in as many places, something lies that looks alike and says nothing
of the label (`distractor`). Whether the network really reads the signal is measured first, by
taking each of the two away (`Gate`): a map cannot be blamed for a network that reads
something else.

Scores are of absolute maps, one for each example; at chance they are what a map gets that
knows nothing of the network.
Source: gate and distractor as the project's own; the signal's share after Shah et al. 2021,
arXiv 2102.12781; the pointing game after Zhang et al. 2016, arXiv 1608.00507.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from patchclamp.core.errors import InputError, OptionError
from patchclamp.core.findings import Interval
from patchclamp.methods.attribution.base import Attribution
from patchclamp.methods.statistics import bootstrap_mean, wilson
from patchclamp.net import Net

RIGHT, LOST, KEPT = 0.95, 0.05, 0.02
"""Of the gate: least accuracy, most above chance without the signal, most lost without the
distractor."""

NUM_GATE = 2000
"""Examples that a gate is measured on where they can be drawn: of 200 at chance, one gate in
twelve would fail by bad luck."""

_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of examples, with its interval."""

    value: float
    interval: Interval
    num: int

    @classmethod
    def of(cls, hits: Tensor) -> Share:
        """Of a boolean for each example, (n,)."""
        count, num = int(hits.sum()), hits.numel()
        return cls(value=count / num, interval=wilson(count, num), num=num)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Whether the network uses the signal and nothing but the signal.

    Attributes:
        accuracy: as they are; on the examples, or on more that were drawn in the same way.
        without_target: accuracy where the signal was taken out.
        without_distractor: accuracy where the distractor was; None where there is none.
        chance: accuracy of the most frequent class.
    """

    accuracy: Share
    without_target: Share
    without_distractor: Share | None
    chance: float

    @classmethod
    def measure(
        cls,
        module: nn.Module,
        labels: Tensor,
        plain: Tensor,
        without_target: Tensor,
        without_distractor: Tensor | None,
    ) -> Gate:
        """Run the network on the examples and on both of their cut versions."""
        return cls(
            accuracy=right(module, plain, labels),
            without_target=right(module, without_target, labels),
            without_distractor=(
                None if without_distractor is None else right(module, without_distractor, labels)
            ),
            chance=int(labels.bincount().max()) / len(labels),
        )

    @property
    def failures(self) -> tuple[str, ...]:
        """What does not hold, in words; empty where the gate holds."""
        said = []
        if self.accuracy.value < RIGHT:
            said.append(f"accuracy is {self.accuracy.value:.3f}, below {RIGHT:.2f}")
        most = self.chance + LOST
        if self.without_target.value > most:
            said.append(
                f"without the signal accuracy is {self.without_target.value:.3f}, above {most:.3f}"
            )
        least = self.accuracy.value - KEPT
        if self.without_distractor is not None and self.without_distractor.value < least:
            said.append(
                f"without the distractor accuracy is {self.without_distractor.value:.3f}, "
                f"below {least:.3f}"
            )
        return tuple(said)

    @property
    def holds(self) -> bool:
        """Whether the network is right, needs the signal and does not need the distractor."""
        return not self.failures


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """One number for each example, (num,), their mean with its interval, and what chance gives."""

    rows: Tensor
    mean: float
    interval: Interval
    chance: float

    @classmethod
    def of(cls, rows: Tensor, chance: float, seed: int = 0) -> Score:
        """With a bootstrap interval over examples."""
        interval = bootstrap_mean(rows, seed=seed)
        return cls(rows=rows, mean=float(rows.double().mean()), interval=interval, chance=chance)


@dataclass(frozen=True, kw_only=True, eq=False)
class MapScores:
    """How well maps show the signal.

    Attributes:
        signal_mass: see `signal_mass`.
        pointing: share of examples whose largest place is of the signal; ties count in part.
        area: area under the ROC curve of signal places against all others.
        num_empty: all-zero maps, which score chance; 0 unless they were allowed.
    """

    signal_mass: Score
    pointing: Score
    area: Score
    num_empty: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class PlantedMaps:
    """A trained network and examples with known truth.

    Shapes: inputs (num, *feature); labels (num,); masks boolean (num, *space), where space are
        the feature's axes without channels.

    Attributes:
        net: the network, in eval mode.
        signal: where the label comes from.
        distractor: what looks alike and has nothing to do with the label; None where there is
            nothing of the kind.
        gate: whether the network uses the signal.
    """

    net: Net
    inputs: Tensor
    labels: Tensor
    signal: Tensor
    distractor: Tensor | None
    gate: Gate

    def __post_init__(self) -> None:
        num = len(self.inputs)
        masks = {"signal": self.signal}
        if self.distractor is not None:
            masks["distractor"] = self.distractor
        for name, mask in masks.items():
            if mask.dtype != torch.bool or mask.ndim < 2 or mask.shape != self.signal.shape:
                raise InputError(
                    f"the masks of the {name} have the wrong shape or type",
                    got=f"{mask.dtype} {tuple(mask.shape)}",
                    expected=f"bool {tuple(self.signal.shape)}",
                )
            if not bool(mask.flatten(1).any(1).all()):
                raise InputError(f"an example's mask of the {name} is empty")
        if len(self.signal) != num or self.labels.shape != (num,):
            raise InputError(
                "inputs, labels and masks are of different examples",
                got=f"{num} inputs, {tuple(self.labels.shape)} labels, {len(self.signal)} masks",
            )
        if self.distractor is not None and bool((self.signal & self.distractor).any()):
            raise InputError("signal and distractor overlap")
        if bool(self.signal.flatten(1).all(1).any()):
            raise InputError("an example is all signal: no map could miss it")

    @property
    def num(self) -> int:
        """How many examples."""
        return len(self.inputs)

    @property
    def moving(self) -> bool:
        """Whether the signal is elsewhere in some examples than in others; if not, another
        example's map is as good as the right one, and no control."""
        return bool((self.signal != self.signal[:1]).any())

    def scores(self, maps: Attribution | Tensor, *, allow_empty: bool = False) -> MapScores:
        """Score the maps of these examples.

        Args:
            maps: of a method, or (num, *space).
            allow_empty: all-zero maps score chance instead of being refused.

        Raises:
            InputError: maps of another shape, NaN or infinity, or an all-zero map.
        """
        x, name = (maps.heat(), maps.method) if isinstance(maps, Attribution) else (maps, "the map")
        x, empty = checked(x, self.signal, name, allow_empty=allow_empty)
        other = ~self.signal if self.distractor is None else self.distractor
        share = self.signal.flatten(1).double().mean(1)
        point = pointing_game(x, self.signal)
        area = signal_area(x, self.signal)
        return MapScores(
            signal_mass=Score.of(signal_mass(x, self.signal, other), 0.5),
            pointing=Score.of(point, float(share.mean())),
            area=Score.of(area, 0.5),
            num_empty=int(empty.sum()),
        )


class Build(Protocol):
    """An architecture: from one example's shape and the number of classes to fresh weights."""

    def __call__(self, shape: tuple[int, ...], num_classes: int, /) -> nn.Module:
        """Weights from torch's own random state, which the bench sets and puts back."""
        ...


def checked(
    maps: Tensor, signal: Tensor, name: str, *, allow_empty: bool = False
) -> tuple[Tensor, Tensor]:
    """Absolute maps in float64, (num, *space), and which of them are all zero, (num,)."""
    if maps.shape != signal.shape:
        raise InputError(
            f"{name} is not one number for each place of each example",
            got=str(tuple(maps.shape)),
            expected=str(tuple(signal.shape)),
            hint="Attribution.heat() adds channels up; maps at the input have its rows and columns",
        )
    x = maps.detach().double().abs()
    bad = (~torch.isfinite(x)).flatten(1).any(1)
    if bool(bad.any()):
        raise InputError(
            f"{name} holds NaN or infinity",
            got=f"{int(bad.sum())} such maps, the first of example {int(bad.nonzero()[0])}",
        )
    empty = (x == 0).flatten(1).all(1)
    if bool(empty.any()) and not allow_empty:
        raise InputError(
            f"{name} is zero everywhere",
            got=f"{int(empty.sum())} such maps, the first of example {int(empty.nonzero()[0])}",
            hint="allow_empty=True scores them as chance and counts them",
        )
    return x, empty


def signal_mass(maps: Tensor, signal: Tensor, other: Tensor) -> Tensor:
    """Share of the map that lies in the signal, of what lies in the signal or in `other`: (num,).

    Each is divided by its area, so that a map that knows nothing gets .5 on average; where
    areas are equal this is the plain share. A map that is zero in both gets .5.
    """
    inside, outside = (
        (maps * m).flatten(1).double().sum(1) / m.flatten(1).sum(1) for m in (signal, other)
    )
    total = inside + outside
    return torch.where(total > 0, inside / total.where(total > 0, torch.ones_like(total)), 0.5)


def pointing_game(maps: Tensor, signal: Tensor) -> Tensor:
    """Whether the largest place is of the signal; where several tie, the share that is: (num,)."""
    x, inside = maps.flatten(1), signal.flatten(1)
    top = x == x.amax(1, keepdim=True)
    return (top & inside).sum(1).double() / top.sum(1)


def signal_area(maps: Tensor, signal: Tensor) -> Tensor:
    """Area under the ROC curve of signal places against all others, ties counting half: (num,)."""
    return torch.stack([auc(x, y) for x, y in zip(maps.flatten(1), signal.flatten(1), strict=True)])


def auc(values: Tensor, positive: Tensor) -> Tensor:
    """Chance that a positive is above a negative, ties counting half: one number.

    Shapes: values (n,), positive boolean (n,), with both kinds among them.
    """
    yes, no = values[positive], values[~positive].sort().values
    if not yes.numel() or not no.numel():
        raise InputError("an area under the ROC curve needs positives and negatives")
    below = torch.searchsorted(no, yes, side="left") + torch.searchsorted(no, yes, side="right")
    return below.double().mean() / (2 * no.numel())


def right(module: nn.Module, inputs: Tensor, labels: Tensor) -> Share:
    """Share of examples whose class is right."""
    return Share.of(logits(module, inputs).argmax(1) == labels)


def logits(module: nn.Module, inputs: Tensor) -> Tensor:
    """Outputs of all examples, some at a time, without gradients."""
    with torch.no_grad():
        parts = [module(x) for x in inputs.split(_ROWS)]
    return torch.cat(parts)


def at_least(what: str, value: float, least: float) -> None:
    """Raise an OptionError for a number below its least value."""
    if not value >= least:
        raise OptionError(f"{what} is too small", got=f"{value:g}", expected=f"at least {least:g}")
