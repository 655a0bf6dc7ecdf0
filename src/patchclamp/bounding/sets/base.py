"""The contract of a set, and what all sets share.

Shapes: N sets side by side; *shape is that of one value. Every tensor of a set has N, or 1 for
all alike, as its first axis.

Rounding: `hull` is rounded outwards. `minimum` may be wrong by what a plain sum of A . x over
the hull may be, which the caller allows for; a set whose formula can lose more than that
subtracts it itself.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from patchclamp.core.errors import BoundError
from patchclamp.rules.base import Interval, Shape, gamma

Set = TypeVar("Set", bound="PerturbedSet")


class PerturbedSet(ABC):
    """N sets of values of one shape, side by side."""

    @abstractmethod
    def hull(self) -> Interval:
        """A box around each set, the smallest where the set says so: (N, *shape) each."""

    @abstractmethod
    def minimum(self, A: Tensor) -> Tensor:
        """A lower bound of A . x over each set: A (N or 1, R, *shape) -> (N, R)."""

    def mapped(self: Set, change: Callable[[Tensor], Tensor]) -> Set:
        """The same kind of set with every tensor changed."""
        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]  # sets are dataclasses
        tensors = {name: change(x) for name, x in held.items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **tensors)  # type: ignore[type-var]  # as above

    def to(self: Set, dtype: torch.dtype) -> Set:
        """With real numbers of this precision."""
        return self.mapped(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def example(self: Set, number: int) -> Set:
        """The set of one example, N = 1."""
        return self.mapped(lambda x: x if x.shape[0] == 1 else x[number : number + 1])


@dataclass(frozen=True, eq=False)
class Shaped(PerturbedSet):
    """A set whose values are seen in another shape with the same elements in the same order."""

    inner: PerturbedSet
    shape: Shape

    def hull(self) -> Interval:
        return Interval(*(side.reshape(-1, *self.shape) for side in self.inner.hull()))

    @cached_property
    def _own_shape(self) -> Shape:
        return tuple(self.inner.hull().lower.shape[1:])

    def minimum(self, A: Tensor) -> Tensor:
        return self.inner.minimum(A.reshape(*A.shape[:2], *self._own_shape))


def require_finite(name: str, **tensors: Tensor) -> None:
    """Raise BoundError for NaN or infinity in what a set is made of."""
    for what, x in tensors.items():
        if not bool(torch.isfinite(x).all()):
            raise BoundError(
                f"the {what} of {name} must be finite", got="a number that is infinite or NaN"
            )


def require_order(name: str, lower: Tensor, upper: Tensor) -> None:
    """Raise BoundError where a box has sides of different shape, is infinite or empty."""
    if lower.shape != upper.shape:
        raise BoundError(
            f"the sides of {name} differ in shape",
            got=f"{tuple(lower.shape)} and {tuple(upper.shape)}",
        )
    if not bool(torch.isfinite(lower).all() and torch.isfinite(upper).all()):
        raise BoundError(f"{name} must be finite", got="a side that is infinite or NaN")
    if bool((lower > upper).any()):
        place = tuple((lower > upper).nonzero()[0].tolist())
        raise BoundError(
            f"{name} is empty",
            got=f"lower {float(lower[place])} above upper {float(upper[place])} at {list(place)}",
        )


def allowance(size: Tensor, num_terms: int) -> Tensor:
    """What rounding can do to a sum of this many terms of this total size."""
    return gamma(num_terms + 16, size.dtype) * size + torch.finfo(size.dtype).tiny


def outward_sum(x: Tensor, y: Tensor, sign: int) -> Tensor:
    """x + y rounded up (sign 1) or down (-1); exact where y is 0."""
    limit = torch.full_like(x, sign * math.inf)
    total = x + y
    return torch.where(y == 0, x, torch.nextafter(total, limit))
