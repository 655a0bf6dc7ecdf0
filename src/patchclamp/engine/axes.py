"""Names for axes, from symbolic shapes and the kind of module that makes the value.

The rules are few and by rank; attention (engine/attention.py) and the
adapters name their axes exactly and win over these.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from patchclamp.model.inputs import BATCH, LENGTH

Dims = tuple[int | str, ...]

_CHANNEL_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.PixelShuffle,
)

_SPACE = {3: ("position",), 4: ("row", "column"), 5: ("depth", "row", "column")}


def channel_first(module: nn.Module | None) -> bool:
    """Whether this kind of module has its channels on axis 1."""
    return isinstance(module, _CHANNEL_FIRST)


def name_axes(shape: Dims, *, channels: bool = False) -> tuple[str, ...]:
    """Axis names of a value of this symbolic shape.

    Args:
        shape: sizes, "batch" and "length" (or expressions of them) where symbolic.
        channels: the value comes from a module with channels on axis 1.
    """
    rank = len(shape)
    if rank == 0:
        return ()
    batch_at = shape.index(BATCH) if BATCH in shape else 0
    rest = [d for i, d in enumerate(shape) if i != batch_at]
    names = _rest(rest, channels or (rank == 4 and LENGTH not in shape) or rank == 5)
    if not any(_mentions(d, BATCH) for d in shape) and shape:
        return _unbatched(shape)
    names.insert(batch_at, BATCH)
    return tuple(names)


def _rest(rest: Sequence[int | str], channels: bool) -> list[str]:
    rank = len(rest) + 1
    if rank == 1:
        return []
    if rank == 2:
        return ["position"] if _mentions(rest[0], LENGTH) else ["unit"]
    if channels and rank in _SPACE:
        return ["channel", *_SPACE[rank]]
    if rank == 3:
        return ["unit", "position"] if _only_second(rest) else ["position", "unit"]
    if rank == 4:
        if _mentions(rest[1], LENGTH) and _mentions(rest[2], LENGTH):
            return ["head", "query", "key"]
        if _mentions(rest[0], LENGTH):
            return ["position", "head", "unit"]
        return ["head", "position", "unit"]
    return [f"axis{i + 1}" for i in range(rank - 2)] + ["unit"]


def _unbatched(shape: Dims) -> tuple[str, ...]:
    """A value that does not depend on the batch: positions, then units."""
    names = [f"axis{i}" for i in range(len(shape))]
    names[-1] = "unit"
    for i, d in enumerate(shape):
        if _mentions(d, LENGTH) and "position" not in names:
            names[i] = "position"
    return tuple(names)


def _mentions(size: int | str, name: str) -> bool:
    return isinstance(size, str) and name in size


def _only_second(rest: Sequence[int | str]) -> bool:
    return not _mentions(rest[0], LENGTH) and _mentions(rest[1], LENGTH)
