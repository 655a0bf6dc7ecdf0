"""The points that an attack may use: those near a row, within the limits of inputs.

Everything here is rounded towards the row itself, so that no point leaves the ball, over floats
too. L0 counts elements of the input: one channel of one pixel is one element.

Source: for L2 within limits, the scale of the perturbation at which it reaches the radius once
its largest elements are held at the limits, by fixed point from below; for L0, Croce & Hein
2019, arXiv 1909.05040 (the largest k elements are kept).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from patchclamp.core.errors import InputError, OptionError

SLACK = 1e-6
"""By how much a perturbation may exceed its radius, or a row its limits, before it is refused."""

_NUM_SCALINGS = 12
_SHRINK = 1.0 - 1e-12


class Norm(StrEnum):
    """How the size of a perturbation is measured."""

    LINF = "linf"
    L2 = "l2"
    L0 = "l0"


Limits = tuple[Tensor, Tensor]
"""The smallest and the largest value of every element, each of the shape of one input."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ball:
    """All points that may be used, one set for each row; make one with `Ball.of`.

    Shapes: centre, lower, upper (n, *feature); radius (n,), float64.

    Attributes:
        norm: of the perturbation.
        centre: the rows themselves.
        radius: the size of the largest perturbation.
        lower, upper: the limits of inputs and, for L-inf, the ball; they hold the centre.
    """

    norm: Norm
    centre: Tensor
    radius: Tensor
    lower: Tensor
    upper: Tensor

    @classmethod
    def of(cls, norm: Norm, centre: Tensor, radius: Tensor | float, within: Limits | None) -> Ball:
        """The ball around rows.

        Raises:
            OptionError: a radius that is negative, not finite, or for L0 not whole; L0 without
                limits.
            InputError: rows outside the limits by more than 1e-6.
        """
        size = _radii(norm, centre, radius)
        lower, upper = torch.full_like(centre, -math.inf), torch.full_like(centre, math.inf)
        if within is not None:
            low, high = (side.to(centre).expand_as(centre) for side in within)
            if bool((centre < low - SLACK).any() | (centre > high + SLACK).any()):
                raise InputError(
                    "rows lie outside the limits that were given for inputs",
                    got=f"values from {float(centre.min()):g} to {float(centre.max()):g}",
                    expected=f"values from {float(low.min()):g} to {float(high.max()):g}",
                )
            lower, upper = torch.minimum(low, centre), torch.maximum(high, centre)
        elif norm is Norm.L0:
            raise OptionError(
                "without limits an L0 perturbation of one element may be of any size",
                hint="give the classifier the limits of its inputs: within=(low, high)",
            )
        if norm is Norm.LINF:
            r = _as_column(size, centre)
            lower = torch.maximum(lower, _inward(centre.double() - r, centre))
            upper = torch.minimum(upper, _inward(centre.double() + r, centre))
        return cls(norm=norm, centre=centre, radius=size, lower=lower, upper=upper)

    def pick(self, index: Tensor) -> Ball:
        """The balls of some rows."""
        return Ball(
            norm=self.norm,
            centre=self.centre[index],
            radius=self.radius[index],
            lower=self.lower[index],
            upper=self.upper[index],
        )

    def clamped(self, x: Tensor) -> Tensor:
        """Within the limits (and for L-inf the ball)."""
        return torch.minimum(torch.maximum(x, self.lower), self.upper)

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the ball, to rounding: (n, *feature)."""
        if self.norm is Norm.L2:
            return self._scaled(x)
        x = self.clamped(x)
        if self.norm is Norm.LINF:
            return x
        moved = (x.double() - self.centre.double()).abs()
        return torch.where(self._largest(moved), x, self.centre)

    def distance(self, x: Tensor) -> Tensor:
        """Of points from their rows, (n,) in float64."""
        d = (x.double() - self.centre.double()).abs().flatten(1)
        if self.norm is Norm.LINF:
            return d.amax(1)
        return (d > 0).double().sum(1) if self.norm is Norm.L0 else d.norm(dim=1)

    def step(self, x: Tensor, slopes: Tensor, size: Tensor) -> Tensor:
        """Up the steepest way of the norm, and back into the ball.

        L-inf goes by the signs of the slopes, L2 along them. L0 does not go in steps: the k
        elements that gain most to first order, from their own value to a limit, jump there.

        Args:
            slopes: of what is to grow, (n, *feature); where all are 0 nothing moves.
            size: of the step as a share of the radius, (n,); not read for L0.
        """
        if self.norm is Norm.L0:
            aim = torch.where(slopes > 0, self.upper, self.lower)
            gain = slopes * (aim - self.centre)
            return torch.where(self._largest(gain) & (gain > 0), aim, self.centre)
        length = _as_column(size.to(self.radius) * self.radius, x).to(x.dtype)
        if self.norm is Norm.LINF:
            return self.project(x + length * slopes.sign())
        largest = slopes.flatten(1).abs().amax(1).clamp(min=torch.finfo(x.dtype).tiny)
        way = slopes / _as_column(largest, x)  # so that squares of tiny slopes do not vanish
        norms = way.flatten(1).norm(dim=1).clamp(min=1.0)
        return self.project(x + length * way / _as_column(norms, x))

    def drawn(self, generator: torch.Generator) -> Tensor:
        """A random point of each ball, (n, *feature).

        L-inf: uniform. L2: uniform in the ball, then into the limits. L0: k random elements,
        each at a random limit.
        """
        shape = tuple(self.centre.shape)
        if self.norm is Norm.LINF:
            share = torch.rand(shape, generator=generator).to(self.centre)
            return self.clamped(self.lower + (self.upper - self.lower) * share)
        if self.norm is Norm.L0:
            order = torch.rand(shape, generator=generator).to(self.centre)
            side = torch.rand(shape, generator=generator).to(self.centre) < 0.5
            corner = torch.where(side, self.lower, self.upper)
            return torch.where(self._largest(order), corner, self.centre)
        way = torch.randn(shape, generator=generator, dtype=torch.float64)
        way = way / _as_column(way.flatten(1).norm(dim=1), way)
        num = max(1, math.prod(shape[1:]))
        share = torch.rand(shape[0], generator=generator, dtype=torch.float64) ** (1 / num)
        length = _as_column(share.to(self.radius) * self.radius, self.centre)
        offset = length * way.to(self.centre.device)
        return self.project((self.centre.double() + offset).to(self.centre))

    # ---- parts ----------------------------------------------------------------

    def _largest(self, amount: Tensor) -> Tensor:
        """Where the k largest of each row are, k being its radius: (n, *feature)."""
        flat = amount.flatten(1)
        most = min(flat.shape[1], int(self.radius.max())) if len(flat) else 0
        kept = torch.zeros_like(flat, dtype=torch.bool)
        if most:
            order = flat.topk(most, 1).indices
            counts = torch.arange(most, device=flat.device)[None] < self.radius[:, None]
            kept.scatter_(1, order, counts)
        return kept.reshape(amount.shape)

    def _scaled(self, x: Tensor) -> Tensor:
        """Into the L2 ball: one scale for the perturbation, elements held at their limits.

        From a scale that is small enough, the next is the one that would be right if no more
        elements reached their limits; as more do, that is still small enough.
        """
        centre, r = self.centre.double(), self.radius[:, None]
        d = (x.double() - centre).flatten(1)
        amount = d.abs()
        room = torch.where(
            d > 0,
            (self.upper.double() - centre).flatten(1),
            (centre - self.lower.double()).flatten(1),
        )
        norms = amount.norm(dim=1, keepdim=True)
        scale = (r / norms.clamp(min=1e-300)).clamp(max=1.0)
        for _ in range(_NUM_SCALINGS):
            is_held = scale * amount >= room
            if bool((scale == 1).all()) or not bool(is_held.any()):
                break
            held = torch.where(is_held, room, 0.0).square().sum(1, keepdim=True)
            free = torch.where(is_held, 0.0, amount).square().sum(1, keepdim=True)
            left = (r.square() - held).clamp(min=0.0)
            wider = torch.where(free > 0, (left / free.clamp(min=1e-300)).sqrt(), 1.0)
            wider = torch.maximum(wider.clamp(max=1.0), scale)
            if bool((wider <= scale * (1 + 1e-9)).all()):
                break
            scale = wider
        scale = torch.where(scale < 1, scale * _SHRINK, scale)
        z = d.sign() * torch.minimum(scale * amount, room)
        return self.clamped(_inward(centre + z.reshape(centre.shape), self.centre))


def _inward(values: Tensor, centre: Tensor) -> Tensor:
    """Values in the precision of the centre, rounded towards it."""
    made = values.to(centre.dtype)
    middle = centre.double()
    is_over = (made.double() - middle).abs() > (values - middle).abs()
    return torch.where(is_over, torch.nextafter(made, centre), made)


def _as_column(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(-1, *(1,) * (like.ndim - 1))


def _radii(norm: Norm, centre: Tensor, radius: Tensor | float) -> Tensor:
    made = torch.as_tensor(radius, dtype=torch.float64, device=centre.device)
    if made.ndim > 1 or (made.ndim == 1 and len(made) != len(centre)):
        raise OptionError(
            "a radius is one number, or one for each row",
            got=f"shape {tuple(made.shape)}",
            expected=f"({len(centre)},)",
        )
    if not bool(torch.isfinite(made).all()) or bool((made < 0).any()):
        raise OptionError(
            "a radius is a finite number that is not negative", got=str(made.flatten().tolist()[:4])
        )
    if norm is Norm.L0 and bool((made != made.round()).any()):
        raise OptionError(
            "an L0 radius is a number of elements", got=str(made.flatten().tolist()[:4])
        )
    return made.expand(len(centre))
