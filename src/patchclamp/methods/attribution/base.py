"""What every attribution method takes and gives: a network, inputs, a target, a site; a map.

A method is a frozen dataclass whose fields are its options, with `run`. Its map says how much
of the target's score is laid to every element of the value at the site.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from patchclamp.core.errors import InputError
from patchclamp.core.findings import Json
from patchclamp.core.progress import SILENT, Progress
from patchclamp.engine.targets import Metric, Target
from patchclamp.methods.scoring import Passes
from patchclamp.net import Net

if TYPE_CHECKING:
    import xarray

SPACE = ("depth", "row", "column", "position")
"""Axes that a map is looked at along; all others but the batch are added up."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribution:
    """Maps of one method, and how far they may be trusted as far as the method itself can tell.

    Shapes: values (num, *site); all others (num,) or None.

    Attributes:
        method: its name.
        options: it was run with.
        site: where.
        axes: of `values`.
        values: signed; units as in the method's docstring.
        scores: the target on the inputs.
        baseline_scores: the target on the baseline, for methods that have one.
        error: |sum of values - (score - baseline score)| / |score - baseline score|, for
            methods whose maps should add up to that; infinite where the denominator is 0.
        bias: the part of the score that was laid to biases, for methods that keep it apart.
        passes: rows that went through the network, in the unit of one example.
    """

    method: str
    options: dict[str, Json]
    site: str
    axes: tuple[str, ...]
    values: Tensor
    scores: Tensor
    baseline_scores: Tensor | None = None
    error: Tensor | None = None
    bias: Tensor | None = None
    passes: Passes

    @property
    def num(self) -> int:
        """How many examples."""
        return len(self.values)

    def heat(self, *, signed: bool = False) -> Tensor:
        """One number per place: (num, *space), channels added up; absolute values by default."""
        rest = [i for i, a in enumerate(self.axes) if i > 0 and a not in SPACE]
        if len(rest) == self.values.ndim - 1:  # no space at all: every element is a place
            return self.values if signed else self.values.abs()
        x = self.values if signed else self.values.abs()
        return x.sum(rest) if rest else x

    def to_xarray(self) -> xarray.DataArray:
        """The values with named axes."""
        import xarray

        values = self.values.detach().cpu().float().numpy()
        return xarray.DataArray(values, dims=self.axes, name=self.method)


@dataclass(frozen=True, kw_only=True)
class Explainer(ABC):
    """A method. Its fields are its options.

    Attributes:
        name: by which it is asked for.
        needs_space: the value at the site must have rows and columns (or positions), and the
            map is laid over the input.
        is_signed: what speaks against the target gets less than 0; otherwise only the size of
            a value counts.
        source: the paper.
    """

    name: ClassVar[str]
    needs_space: ClassVar[bool] = False
    is_signed: ClassVar[bool] = True
    source: ClassVar[str]

    @abstractmethod
    def run(
        self,
        net: Net,
        inputs: object,
        target: Metric | Target,
        *,
        at: str | None = None,
        progress: Progress = SILENT,
    ) -> Attribution:
        """Maps of all examples.

        Args:
            inputs: as for `Net.run`.
            target: a class (one, or one for each example), or a function of the principal
                output that gives one scalar per row.
            at: "input", or a site: of a layer, of heads, of units. By default what suits
                the method.

        Raises:
            InputError, SiteError, TargetError: before anything is measured.
        """

    def options(self) -> dict[str, Json]:
        """The fields, for records."""
        return {f.name: _json(getattr(self, f.name)) for f in fields(self)}


def _json(x: object) -> Json:
    if x is None or (isinstance(x, (bool, int, float, str)) and not isinstance(x, Enum)):
        return x
    if isinstance(x, Enum):
        return str(x.value)
    if isinstance(x, Tensor):
        return f"tensor {tuple(x.shape)}" if x.numel() > 1 else float(x)
    if isinstance(x, (tuple, list)):
        return [_json(y) for y in x]
    if is_dataclass(x):
        return {f.name: _json(getattr(x, f.name)) for f in fields(x)}
    return type(x).__name__


def completeness_error(values: Tensor, scores: Tensor, baseline_scores: Tensor) -> Tensor:
    """|sum - difference| / |difference| of each example, in float64: (num,)."""
    difference = scores.double() - baseline_scores.double()
    missed = (values.double().flatten(1).sum(1) - difference).abs()
    return torch.where(missed == 0, missed, missed / difference.abs())


def baseline_like(value: Tensor, baseline: Tensor | float) -> Tensor:
    """A baseline in the shape of the value (num, *site).

    Args:
        baseline: a number, one baseline for all examples (*site), or one for each (num, *site).

    Raises:
        InputError: another shape, NaN, or a baseline equal to an example's own value.
    """
    made = torch.as_tensor(baseline, dtype=value.dtype, device=value.device)
    if tuple(made.shape) not in ((), tuple(value.shape[1:]), tuple(value.shape)):
        raise InputError(
            "the baseline has the wrong shape",
            got=str(tuple(made.shape)),
            expected=f"a number, {tuple(value.shape[1:])} or {tuple(value.shape)}",
        )
    if not bool(torch.isfinite(made).all()):
        raise InputError("the baseline holds NaN or infinity")
    made = made.expand_as(value)
    same = (made == value).flatten(1).all(1)
    if bool(same.any()):
        raise InputError(
            f"example {int(same.nonzero()[0])} equals its baseline: nothing is left to attribute",
            hint="another baseline (an all-zero input needs one that is not 0), or drop the row",
        )
    return made
