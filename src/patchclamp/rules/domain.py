"""Where a function is defined: refusals by name, and the room that rounding needs.

The linear bounds of the rules hold over the reals: the inequality between the exact function
and a line with the computed coefficients is true in exact arithmetic. `ULPS` times eps times
the sizes that met covers what the computing of a coefficient can have lost. The elementary
functions of torch and their derivatives here were measured to be within 2 eps of the exact
value in both precisions; a test checks this again wherever it runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from patchclamp.core.errors import BoundError
from patchclamp.rules.base import Interval

ULPS = 8.0
"""Times eps: the relative error that is allowed for in a value of an elementary function."""


def refuse(rule: object, box: Interval, bad: Tensor, expected: str) -> None:
    """Raise for the first element where `bad`, saying which box and element it is.

    Raises:
        BoundError: if anything is bad.
    """
    if not bool(bad.any()):
        return
    at = [int(i) for i in bad.nonzero()[0]]
    lower, upper = (float(side.expand_as(bad)[tuple(at)].detach()) for side in box)
    num = int(bad.flatten(1).any(1).sum())
    raise BoundError(
        f"{type(rule).__name__} cannot be bounded on an interval of box {at[0]}"
        f" ({num} of {bad.shape[0]} boxes are bad)",
        got=f"[{lower:g}, {upper:g}] at element {tuple(at[1:])}",
        expected=expected,
        hint="a smaller perturbed set, or a split of it, gives smaller intervals",
    )


def require_finite(rule: object, box: Interval, *results: Tensor) -> None:
    """Refuse boxes that are infinite, NaN, or on which a result overflows.

    Raises:
        BoundError: if a result is not finite.
    """
    total = results[0]
    for result in results[1:]:
        total = total + result
    # one sum of everything first: NaN and infinity survive it, and it reads memory once
    if bool(torch.isfinite(total.detach().sum())):
        return
    refuse(rule, box, ~torch.isfinite(total), "a finite interval with finite results")


def outward(
    lower: Tensor,
    upper: Tensor,
    rest: float = 0.0,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Computed bounds, moved apart by `ULPS`.

    Args:
        rest: what is added to the sizes, where a value near zero comes from larger terms.
        within: the range of the exact function.
    """
    info = torch.finfo(lower.dtype)
    eps = ULPS * info.eps
    low = lower - (lower.abs() + rest) * eps - info.tiny
    high = upper + (upper.abs() + rest) * eps + info.tiny
    return Interval(low.clamp(*within), high.clamp(*within))


def middle(lower: Tensor, upper: Tensor) -> Tensor:
    """Halfway, without overflow."""
    return lower + (upper - lower) / 2
