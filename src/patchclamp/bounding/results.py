"""The result of a bound request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from patchclamp.bounding.ways import Linear, Method
from patchclamp.rules.base import Interval

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True, eq=False)
class Bounds:
    """What every row of an output lies between.

    Attributes:
        tensors: lower and upper bounds as tensors.
        axes: their names: those of the output's site, or ("batch", "row").
        below, above: linear bounds in what is perturbed, by name, where they were asked for:
            rows (batch, row, *perturbed), constants (batch, row). Rows of a whole site count
            its elements in their flat order.
        method: how they were found.
        holds: what they hold over.
        constants: values that forward mode knows by their intervals only, by address.
    """

    tensors: Interval
    axes: tuple[str, ...]
    below: Linear | None
    above: Linear | None
    method: Method
    holds: str
    constants: tuple[str, ...] = ()

    @property
    def lower(self) -> xarray.DataArray:
        """Lower bounds as a labelled array."""
        return self._array(self.tensors.lower, "lower")

    @property
    def upper(self) -> xarray.DataArray:
        """Upper bounds as a labelled array."""
        return self._array(self.tensors.upper, "upper")

    def _array(self, x: Tensor, name: str) -> xarray.DataArray:
        import xarray

        return xarray.DataArray(
            x.numpy(), dims=self.axes, name=name, attrs={"holds": self.holds, "method": self.method}
        )
