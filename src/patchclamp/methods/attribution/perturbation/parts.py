"""What is taken away, and what is put in its place.

A value has axes; parts of it lie along some of them (rows and columns, positions, channels,
heads) and go through all the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor

from patchclamp.core.errors import OptionError, nearest
from patchclamp.methods.attribution.base import SPACE, baseline_like
from patchclamp.methods.scoring import Scorer

_PER_SIDE = 7
"""By default a side of an image is cut into so many: 32 of 224 pixels."""


class Fill(StrEnum):
    """A baseline made from the example itself."""

    MEAN = "mean"
    """The example's mean over rows and columns (or positions), channel by channel; its mean
    over everything where the site has no space."""


def replacement(scorer: Scorer, baseline: Tensor | float | Fill) -> Tensor:
    """What is put in the place of what is taken away: (num, *site).

    Raises:
        InputError: another shape, NaN, or the same as an example's own value.
    """
    if not isinstance(baseline, Fill):
        return baseline_like(scorer.value, baseline)
    space = [i for i, name in enumerate(scorer.axes) if i > 0 and name in SPACE]
    dims = space or list(range(1, scorer.value.ndim))
    return baseline_like(
        scorer.value, scorer.value.mean(dims, keepdim=True).expand_as(scorer.value)
    )


def axes_along(axes: Sequence[str], along: Sequence[str] | None) -> list[int]:
    """Which axes of a value the parts lie along: its space by default, else all but the batch.

    Raises:
        OptionError: no such axis, the batch, or none at all.
    """
    if along is None:
        space = [i for i, name in enumerate(axes) if i > 0 and name in SPACE]
        return space or list(range(1, len(axes)))
    for name in along:
        if name not in axes[1:]:
            raise OptionError(
                f"the site has no axis '{name}'",
                expected=f"some of {', '.join(axes[1:])}",
                nearest=nearest(name, axes[1:]),
            )
    if not along:
        raise OptionError("along names no axis", expected=f"some of {', '.join(axes[1:])}")
    return sorted({axes.index(name) for name in along})


def sizes_along(
    scorer: Scorer, dims: Sequence[int], wanted: int | Sequence[int] | None, what: str
) -> list[int]:
    """The size of a part along each of these axes.

    By default a seventh of each side of an image, and 1 along positions, channels, heads, units.

    Raises:
        OptionError: another number of sizes, or one that is not in 1 .. size of the axis.
    """
    whole = [scorer.value.shape[d] for d in dims]
    if wanted is None:
        is_area = sum(scorer.axes[d] in SPACE for d in dims) > 1
        wide = [is_area and scorer.axes[d] in SPACE for d in dims]
        return [-(-n // _PER_SIDE) if w else 1 for n, w in zip(whole, wide, strict=True)]
    made = [wanted] * len(dims) if isinstance(wanted, int) else list(wanted)
    if len(made) != len(dims) or not all(1 <= m <= n for m, n in zip(made, whole, strict=True)):
        names = ", ".join(f"{scorer.axes[d]} ({n})" for d, n in zip(dims, whole, strict=True))
        raise OptionError(
            f"the {what} does not fit '{scorer.site}'",
            got=str(wanted),
            expected=f"sizes along {names}",
        )
    return made


def segments_of(
    scorer: Scorer,
    segments: Tensor | None,
    patch: int | Sequence[int] | None,
    along: Sequence[str] | None,
) -> Tensor:
    """Which segment each element belongs to, numbered 0, 1, ... in each example: (num, *site).

    Args:
        segments: integers, for the site (*site), for each example (num, *site), or along the
            axes that segments lie along only: (row, column), say.
        patch: without `segments`: sizes of the tiles that the axes are cut into.

    Raises:
        OptionError: segments of another shape or not of integers; as `sizes_along`.
    """
    shape, dims = scorer.value.shape, axes_along(scorer.axes, along)
    kept = tuple(shape[d] for d in dims)
    if segments is None:
        sizes = sizes_along(scorer, dims, patch, "patch")
        segments = torch.zeros(kept, dtype=torch.long)
        for i, (n, size) in enumerate(zip(kept, sizes, strict=True)):
            number = torch.arange(n) // size
            number = number.reshape([-1 if j == i else 1 for j in range(len(kept))])
            segments = segments * (-(-n // size)) + number
    whole = tuple(segments.shape) in (tuple(shape[1:]), tuple(shape))
    if segments.is_floating_point() or not (whole or tuple(segments.shape) == kept):
        raise OptionError(
            f"the segments do not fit '{scorer.site}'",
            got=f"{segments.dtype} of shape {tuple(segments.shape)}",
            expected=f"integers {tuple(shape[1:])}, {tuple(shape)} or {kept}",
        )
    if not whole:
        segments = segments.reshape([n if d in dims else 1 for d, n in enumerate(shape)][1:])
    full = segments.to(scorer.value.device).expand(shape)
    if tuple(segments.shape) != tuple(shape):  # one map for all: number it once
        return _numbered(full[0]).expand(shape)
    return torch.stack([_numbered(one) for one in full])


def _numbered(segments: Tensor) -> Tensor:
    numbers: Tensor = torch.unique(segments, return_inverse=True)[1]
    return numbers
