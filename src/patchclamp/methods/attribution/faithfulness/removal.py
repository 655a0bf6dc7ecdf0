"""Ways to take part of an input away, none of which is neutral.

Every measure of faithfulness removes something and looks at the score. What is put in its
place decides the verdict as much as the map does, so measures run with several of these and
show where they disagree.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from patchclamp.core.errors import EngineError, InputError, OptionError
from patchclamp.methods.attribution.base import SPACE
from patchclamp.methods.attribution.draws import generator, keys
from patchclamp.methods.attribution.layer_masking import Masks
from patchclamp.methods.scoring import Scorer

Kept = Callable[[slice], Tensor]
"""Which places are kept of a slice of the rows: (n, *places), bool."""

Fill = Callable[[Tensor, Tensor], Tensor]
"""(rows, kept) -> the value there with the rest replaced: (n, *site)."""

_TOLERANCE, _MOST_STEPS, _COARSEST = 1e-3, 1000, 6


@dataclass(frozen=True, kw_only=True)
class Removal(ABC):
    """A way to remove places; a place goes through all channels."""

    @property
    def name(self) -> str:
        """Its class and what options it has, such as "constant (number=0.5)"."""
        listed = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        words = re.sub(r"(?<!^)(?=[A-Z])", " ", type(self).__name__).lower()
        return f"{words} ({listed})" if listed else words

    @abstractmethod
    def fill(self, scorer: Scorer) -> Fill:
        """What makes values with places removed, after whatever needs doing once.

        Raises:
            OptionError: it does not suit the axes of the value.
        """

    def scores(self, scorer: Scorer, kept: Kept, rows: Tensor) -> Tensor:
        """Scores of examples `rows` (n,) with what is not kept removed: (n,)."""
        filled = self.fill(scorer)
        return scorer.scores(lambda at: filled(rows[at], kept(at)), rows)


@dataclass(frozen=True, kw_only=True)
class Replacement(Removal):
    """Base of the removals that put a fixed value at each place."""

    @abstractmethod
    def value(self, scorer: Scorer) -> Tensor:
        """What is put at each place of each example: broadcasts to (num, *site)."""

    def fill(self, scorer: Scorer) -> Fill:
        """See `Removal.fill`."""
        value = self.value(scorer).expand_as(scorer.value)
        return lambda rows, kept: torch.where(
            broadcast(kept, scorer.axes), scorer.value[rows], value[rows]
        )


@dataclass(frozen=True, kw_only=True)
class Constant(Replacement):
    """One number everywhere."""

    number: float = 0.0

    def value(self, scorer: Scorer) -> Tensor:
        """See `Replacement.value`."""
        return scorer.value.new_tensor(self.number)


@dataclass(frozen=True, kw_only=True)
class Black(Replacement):
    """The smallest value that any of the examples has, channel by channel.

    Which is black for images that hold some black, whatever they were scaled to.
    """

    def value(self, scorer: Scorer) -> Tensor:
        """See `Replacement.value`."""
        places = [i for i, a in enumerate(scorer.axes) if i == 0 or a in SPACE]
        return scorer.value.amin(places if len(places) > 1 else 0, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Mean(Replacement):
    """Each example's mean over its places, channel by channel; the examples' mean of each
    feature where there is no space."""

    def value(self, scorer: Scorer) -> Tensor:
        """See `Replacement.value`."""
        places = [i for i, a in enumerate(scorer.axes) if a in SPACE]
        if not places and scorer.num < 2:
            raise InputError(
                "the mean over examples of a single one is that example: nothing is removed",
                hint="more examples, or Constant(number=...)",
            )
        return scorer.value.mean(places or [0], keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Blur(Replacement):
    """The example itself behind a Gaussian blur as wide as `width` of its longer side."""

    width: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:
            raise OptionError("width is a share of the side, above 0", got=str(self.width))

    def value(self, scorer: Scorer) -> Tensor:
        """See `Replacement.value`."""
        x, axes = scorer.value, _places(scorer, self.name)
        sigma = self.width * max(x.shape[i] for i in axes)
        for axis in axes:
            x = _blurred(x, axis, sigma)
        return x


@dataclass(frozen=True, kw_only=True)
class NoisyLinear(Removal):
    """Each removed place as a weighted mean of its eight neighbours, and a little noise.

    Neighbours beside and above weigh twice those across (1/6 and 1/12), all removed places at
    once: a linear system, solved by conjugate gradients. It removes what a place says without
    an edge that tells where it was. An example of which nothing is kept becomes its mean. The
    system is solved to a thousandth, well below the noise.

    Attributes:
        noise: standard deviation, as a share of the example's range.
        seed: of the noise, which depends on it, the example and the mask.

    Source: Rong et al. 2022, arXiv 2202.00449, section 4.
    """

    noise: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.noise < float("inf"):
            raise OptionError("noise is a share of the range, 0 or more", got=str(self.noise))

    def fill(self, scorer: Scorer) -> Fill:
        """See `Removal.fill`."""
        places = _places(scorer, self.name)
        if len(places) > 2 or places != list(
            range(scorer.value.ndim - len(places), scorer.value.ndim)
        ):
            raise OptionError(
                f"'{self.name}' needs rows and columns (or positions) as the last axes",
                got=", ".join(scorer.axes),
            )
        found, x = keys(scorer), scorer.value
        spread = (x.flatten(1).amax(1) - x.flatten(1).amin(1)) * self.noise

        def filled(rows: Tensor, kept: Tensor) -> Tensor:
            some = x[rows]
            made = _interpolated(some.flatten(1, -len(places) - 1), kept[:, None])
            made = made.reshape(some.shape)
            noise = torch.stack(
                [self._drawn(found[r], k, x) for r, k in zip(rows, kept, strict=True)]
            )
            scale = spread[rows].reshape(-1, *(1 for _ in x.shape[1:]))
            return torch.where(broadcast(kept, scorer.axes), some, made + scale * noise)

        return filled

    def _drawn(self, key: str, kept: Tensor, x: Tensor) -> Tensor:
        source = generator(key, self.seed, int(kept.sum()))
        return torch.randn(x.shape[1:], generator=source).to(x)


@dataclass(frozen=True, kw_only=True)
class LayerMasked(Removal):
    """Masked at every layer; see `layer_masking`. Only for the input of a network of images."""

    def fill(self, scorer: Scorer) -> Fill:
        """Not a value: removed places are marked while the network runs."""
        raise OptionError(
            "layer masking puts nothing in the place of what is removed",
            hint="this measure compares with the change of the input: use Black, Mean or Blur",
        )

    def scores(self, scorer: Scorer, kept: Kept, rows: Tensor) -> Tensor:
        """See `Removal.scores`."""
        if len(_places(scorer, self.name)) != scorer.value.ndim - 2 or scorer.axes[1] in SPACE:
            raise OptionError(
                "layer masking needs an input (batch, channel, rows, columns), or with positions",
                got=f"({', '.join(scorer.axes)})",
            )
        with Masks() as masks:

            def masked(at: slice) -> Tensor:
                x = scorer.value[rows[at]]
                masks.give(x, kept(at))
                return x

            return scorer.scores(masked, rows)


def broadcast(kept: Tensor, axes: tuple[str, ...]) -> Tensor:
    """(n, *places) in the axes of the value, with size 1 for all others."""
    space = [a for a in axes if a in SPACE]
    if not space:
        return kept
    sizes = dict(zip(space, kept.shape[1:], strict=True))
    return kept.reshape(len(kept), *(sizes.get(a, 1) for a in axes[1:]))


def _places(scorer: Scorer, name: str) -> list[int]:
    found = [i for i, a in enumerate(scorer.axes) if a in SPACE]
    if not found:
        raise OptionError(
            f"'{name}' needs rows and columns, or positions, which the input lacks",
            got=f"({', '.join(scorer.axes)})",
            expected="Black, Mean or Constant",
        )
    return found


def _blurred(x: Tensor, axis: int, sigma: float) -> Tensor:
    """Gaussian mean along one axis; at the borders over what is there."""
    n = x.shape[axis]
    at = torch.arange(n, dtype=x.dtype, device=x.device)
    weights = torch.exp(-(((at[:, None] - at) / sigma) ** 2) / 2)
    weights = weights / weights.sum(1, keepdim=True)
    return (x.movedim(axis, -1) @ weights.T).movedim(-1, axis)


def _interpolated(x: Tensor, kept: Tensor) -> Tensor:
    """Solve for removed places: x (n, channel, *places), kept (n, 1, *places)."""
    known = kept.to(x.dtype)
    unknown = 1 - known
    total = _neighbours(torch.ones_like(known[:1]))  # fewer at the border
    start = _first_guess(x, known) * unknown
    # (total - neighbours) is symmetric and positive where something is known.
    right = _neighbours(x * known) * unknown

    def applied(z: Tensor) -> Tensor:
        return (total * z - _neighbours(z)) * unknown

    solved, left = start, right - applied(start)
    left = left * known.flatten(1).any(1).reshape(-1, *(1 for _ in x.shape[1:]))
    towards, size = left, _dot(left, left)
    # Where all that is known around is 0, the solution is too: then the value sets the scale.
    scale = torch.maximum(_dot(right, right), _TOLERANCE**2 * _dot(x, x))
    enough = _TOLERANCE**2 * scale
    tiny = torch.finfo(x.dtype).tiny
    for _ in range(_MOST_STEPS):
        open_ = size > enough  # what is solved stays, so that rows do not depend on each other
        if not bool(open_.any()):
            break
        pushed = applied(towards)
        step = torch.where(open_, size / _dot(towards, pushed).clamp(min=tiny), 0.0)
        solved, left = solved + step * towards, left - step * pushed
        before, size = size, _dot(left, left)
        towards = left + size / before.clamp(min=tiny) * towards
    else:
        raise EngineError(
            f"the interpolation of removed places did not converge in {_MOST_STEPS} steps",
            hint="use Black, Mean or Blur",
        )
    return x * known + solved


def _first_guess(x: Tensor, known: Tensor) -> Tensor:
    """The solution at half the resolution, down to a few places, where it is the mean.

    Conjugate gradients need as many steps as a hole is wide; so only fine detail is left to do.
    """
    if min(x.shape[2:]) < _COARSEST:
        mean = (x * known).flatten(2).sum(2) / known.flatten(2).sum(2).clamp(min=1)
        mean = torch.where(known.flatten(1).any(1)[:, None], mean, x.flatten(2).mean(2))
        return mean.reshape(*mean.shape, *(1 for _ in x.shape[2:])).expand_as(x)
    pool = functional.avg_pool1d if x.ndim == 3 else functional.avg_pool2d
    share = pool(known, 2, ceil_mode=True)
    all_, some = (pool(z, 2, ceil_mode=True) for z in (x, x * known))
    coarse = torch.where(share > 0, some / share.where(share > 0, torch.ones_like(share)), all_)
    solved = _interpolated(coarse, share > 0)
    mode = "linear" if x.ndim == 3 else "bilinear"
    return functional.interpolate(solved, size=x.shape[2:], mode=mode, align_corners=False)


def _neighbours(x: Tensor) -> Tensor:
    """Weighted sum over neighbours: (n, channel, *places)."""
    if x.ndim == 3:
        weights = x.new_tensor([0.5, 0, 0.5])
        return functional.conv1d(x.flatten(0, 1)[:, None], weights[None, None], padding=1).reshape(
            x.shape
        )
    weights = x.new_tensor([[1, 2, 1], [2, 0, 2], [1, 2, 1]]) / 12
    made = functional.conv2d(x.flatten(0, 1)[:, None], weights[None, None], padding=1)
    return made.reshape(x.shape)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each row and channel, with its axes kept."""
    return (a * b).sum(tuple(range(2, a.ndim)), keepdim=True)
