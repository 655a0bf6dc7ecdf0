"""Values of a site as rows of units: what methods on single neurons and channels share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from patchclamp.core.errors import SiteError
from patchclamp.core.sites import Tap
from patchclamp.model.inputs import BATCH


def unit_values(
    value: Tensor, tap: Tap, position: int | None = None
) -> tuple[Float[Tensor, "row place unit"], Callable[[Tensor], Tensor]]:
    """A site's value as (row, place, unit), and how to put such values back in its place.

    Places are positions, or rows x columns of an image; one if there are none, or if
    `position` picks one.

    Raises:
        SiteError: the site has no batch axis, or not exactly one axis that counts units.
    """
    unit, axes = tap.unit_axis, tap.axes
    if unit is None or BATCH not in axes or "head" in axes:
        raise SiteError(
            f"site '{tap.label}' is not a layer of neurons",
            got=f"axes {', '.join(axes)}",
            expected="a batch axis and one unit or channel axis, such as mlp.0.post",
        )
    if position is not None and "position" not in axes:
        raise SiteError(f"site '{tap.label}' has no positions", got=f"axes {', '.join(axes)}")
    places = [i for i, a in enumerate(axes) if a not in (BATCH, unit)]
    order = [axes.index(BATCH), *places, axes.index(unit)]
    back = _inverse(order)
    moved = value.permute(order)
    if position is None:
        seen = moved.flatten(1, -2) if places else moved[:, None]
        return seen, lambda new: new.reshape(moved.shape).permute(back)
    along = order.index(axes.index("position"))
    at = position % moved.shape[along]
    part = moved.narrow(along, at, 1)

    def put(new: Tensor) -> Tensor:
        whole = moved.slice_scatter(new.reshape(part.shape), along, at, at + 1)
        return whole.permute(back)

    return part.flatten(1, -2), put


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(i) for i in range(len(order))]
