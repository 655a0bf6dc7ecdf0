"""What each activation's increments satisfy, and the quadratic form of a whole chain.

Every activation here has the same form. Between any two inputs that differ by u, its
outputs differ by

    keep u + lift w,   with  |w_g|^2 <= cross_g v_g . w_g + square_g |v_g|^2,  v = probe u

for every group g of units: what is known exactly is kept, and only what is not becomes
a new variable w. A unit with slopes in [a, b] has w = its output's increment and
(w - a u)(b u - w) >= 0. Sorting a group keeps its sum and does not lengthen what is left:
keep is the mean, w the output without its mean, |w| <= |u without its mean|. A Householder
reflection keeps everything across v and does not lengthen what is along v. A unit whose
slope is known has no variable at all.

Pauli et al. write the same facts with free multipliers for the kept part; putting the
equalities in, as here, leaves nothing to choose and is never looser.

With the increments of the input x and all w as variables, a chain is the map
(x, w) -> (v, y), and sum_i d_i x_i^2 >= |y|^2 follows from the constraints if for some
multipliers m >= 0

    rho diag(d) on x  -  Y^T Y  +  sum_g m_g (|w_g|^2 - cross v_g . w_g - square |v_g|^2)

is positive semidefinite; linear in rho and m, as y enters by the constant Y^T Y.

Source: Fazlyab et al. 2019 (LipSDP); Pauli et al. 2024, arXiv 2401.14033. Constraints that
couple different units' multipliers (the published LipSDP-Network) are not sound and not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from patchclamp.core.errors import InputError
from patchclamp.methods.bounds.lipschitz.layers import (
    Activation,
    Chain,
    Elementwise,
    GroupSort,
    Householder,
    Layer,
    Linear,
    Residual,
)
from patchclamp.methods.bounds.lipschitz.rounding import UNIT, Rounded, computed

Ranges = Sequence[tuple[Tensor, Tensor]]
"""Lower and upper bounds of every activation's input, in the order of `Chain.activations`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Increment:
    """An activation's increments; see the module docstring.

    Shapes: keep (unit, unit); lift (unit, k); probe (k, unit); square, cross, group (k,).
    `group` counts from 0 and never falls.
    """

    keep: Rounded
    lift: Rounded
    probe: Rounded
    square: Rounded
    cross: Rounded
    group: Tensor

    def centred(self) -> Increment:
        """The same with |w_g| <= |v_g|: w = cross / 2 v + radius w'."""
        half = Rounded(self.cross.value / 2)  # exact
        radius = (self.square.largest + self.cross.largest.square() / 4).sqrt() * (1 + 8 * UNIT)
        radius = radius + self.cross.slack  # covers that the exact centre is not `half`
        return Increment(
            keep=self.keep + self.lift @ self.probe.rows_times(half),
            lift=self.lift.transposed().rows_times(Rounded(radius)).transposed(),
            probe=self.probe,
            square=Rounded(torch.ones_like(radius)),
            cross=Rounded(torch.zeros_like(radius)),
            group=self.group,
        )


def increment(
    activation: Activation, width: int, bounds: tuple[Tensor, Tensor] | None = None
) -> Increment:
    """What is known of an activation, everywhere or where its inputs are within bounds.

    Args:
        width: number of units.
        bounds: lower and upper, (unit,) each.

    Raises:
        InputError: bounds of the wrong shape, NaN, or with lower above upper.
    """
    if bounds is not None:
        _check_bounds(bounds, width)
    match activation:
        case Elementwise():
            return _elementwise(activation, width, bounds)
        case GroupSort():
            return _group_sort(activation, width, bounds)
        case Householder():
            return _householder(activation, width)
    raise InputError(
        f"no quadratic constraint for activation {type(activation).__name__}",
        expected="Elementwise, GroupSort or Householder",
    )


def _check_bounds(bounds: tuple[Tensor, Tensor], width: int) -> None:
    lower, upper = bounds
    if lower.shape != (width,) or upper.shape != (width,):
        raise InputError(
            "bounds of an activation's input do not fit it",
            got=f"{tuple(lower.shape)} and {tuple(upper.shape)}",
            expected=f"({width},) each",
        )
    if not bool((lower <= upper).all()):
        raise InputError("bounds of an activation's input are NaN, or lower is above upper")


def _elementwise(
    activation: Elementwise, width: int, bounds: tuple[Tensor, Tensor] | None
) -> Increment:
    least, most = (torch.full((width,), s, dtype=torch.float64) for s in activation.slopes)
    if bounds is not None and activation.slopes_on is not None:
        least, most = activation.slopes_on(*bounds)
    known = least == most
    free = (~known).nonzero().flatten()
    units = torch.eye(width, dtype=torch.float64)
    a, b = least[free], most[free]
    return Increment(
        keep=Rounded(torch.diag(torch.where(known, least, 0.0))),
        lift=Rounded(units[:, free]),
        probe=Rounded(units[free]),
        square=computed(-a * b, 1),
        cross=computed(a + b, 1),
        group=torch.arange(len(free)),
    )


def _group_sort(
    activation: GroupSort, width: int, bounds: tuple[Tensor, Tensor] | None
) -> Increment:
    size = activation.size
    keep = torch.zeros(width, width, dtype=torch.float64)
    complement = _without_mean(size)
    free: list[int] = []
    for start in range(0, width, size):
        group = slice(start, start + size)
        order = None if bounds is None else _order(bounds[0][group], bounds[1][group], activation)
        if order is None:
            keep[group, group] = 1 / size
            free.append(start)
        else:
            keep[group, group] = torch.eye(size, dtype=torch.float64)[order]
    num = size - 1
    probe = torch.zeros(len(free) * num, width, dtype=torch.float64)
    for row, start in enumerate(free):
        probe[row * num : (row + 1) * num, start : start + size] = complement
    ones = torch.ones(len(probe), dtype=torch.float64)
    rows = computed(probe, 4)
    return Increment(
        keep=computed(keep, 1),
        lift=rows.transposed(),
        probe=rows,
        square=Rounded(ones),
        cross=Rounded(0 * ones),
        group=torch.arange(len(free)).repeat_interleave(num),
    )


def _without_mean(size: int) -> Tensor:
    """Orthonormal rows that span all vectors of mean zero (Helmert). (size - 1, size)."""
    rows = torch.zeros(max(size - 1, 0), size, dtype=torch.float64)
    for k in range(1, size):
        rows[k - 1, :k] = 1 / sqrt(k * (k + 1))
        rows[k - 1, k] = -k / sqrt(k * (k + 1))
    return rows


def _order(lower: Tensor, upper: Tensor, activation: GroupSort) -> Tensor | None:
    """The order of a group's units where their ranges do not overlap, else None."""
    order = lower.argsort()
    if bool((upper[order][:-1] > lower[order][1:]).any()):
        return None
    return order.flip(0) if activation.descending else order


def _householder(activation: Householder, width: int) -> Increment:
    directions = activation.directions.to("cpu", torch.float64)
    num, size = directions.shape
    square = directions.square().sum(1)
    across = torch.eye(width, dtype=torch.float64)
    projection = torch.zeros_like(across)
    probe = torch.zeros(num, width, dtype=torch.float64)
    for row, v in enumerate(directions):
        group = slice(row * size, (row + 1) * size)
        projection[group, group] = torch.outer(v, v) / square[row]
        probe[row, group] = v / square[row].sqrt()
    rows = computed(probe, size + 4)
    ones = torch.ones(num, dtype=torch.float64)
    return Increment(
        keep=Rounded(across) - computed(projection, size + 4),
        lift=rows.transposed(),
        probe=rows,
        square=Rounded(ones),
        cross=Rounded(0 * ones),
        group=torch.arange(num),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class QuadraticForm:
    """A chain's increments as linear maps of its variables (x, w).

    Shapes: probes (w, variable), output (num_outputs, variable), square and cross (w,),
    group (w,) over the whole chain; blocks lists how many w each activation brought.
    """

    num_inputs: int
    probes: Rounded
    output: Rounded
    square: Rounded
    cross: Rounded
    group: Tensor
    blocks: tuple[int, ...]

    @property
    def num_variables(self) -> int:
        """Of the input and of all activations together."""
        return self.num_inputs + self.probes.value.shape[0]

    @property
    def num_groups(self) -> int:
        """Constraints, each with a multiplier of its own."""
        return int(self.group[-1]) + 1 if len(self.group) else 0

    def spans(self) -> list[slice]:
        """Columns of the variables: the input, then every activation's."""
        spans, start = [slice(0, self.num_inputs)], self.num_inputs
        for size in self.blocks:
            spans.append(slice(start, start + size))
            start += size
        return spans

    def with_output(self, rows: slice) -> QuadraticForm:
        """The same chain with some of its outputs."""
        return QuadraticForm(
            num_inputs=self.num_inputs,
            probes=self.probes,
            output=self.output[rows],
            square=self.square,
            cross=self.cross,
            group=self.group,
            blocks=self.blocks,
        )


def quadratic_form(
    chain: Chain, ranges: Ranges | None = None, *, centred: bool = False
) -> QuadraticForm:
    """The chain's form, everywhere or where its activations' inputs are within ranges.

    Args:
        ranges: one pair for each of `chain.activations`.
        centred: write every constraint as |w_g| <= |v_g|.

    Raises:
        InputError: ranges of another number or shape than the activations.
    """
    activations = chain.activations
    if ranges is not None and len(ranges) != len(activations):
        raise InputError(
            f"{len(ranges)} ranges for {len(activations)} activations",
            hint="chain.activations lists them in order",
        )
    parts = [
        increment(activation, width, None if ranges is None else ranges[number])
        for number, (activation, width) in enumerate(
            zip(activations, activation_widths(chain), strict=True)
        )
    ]
    if centred:
        parts = [part.centred() for part in parts]
    return _Builder(chain.num_inputs, parts).form(chain)


class _Builder:
    """Walks a chain once, composing linear maps of (x, w)."""

    def __init__(self, num_inputs: int, parts: list[Increment]) -> None:
        self.parts, self.next = parts, 0
        self.num_inputs = num_inputs
        self.starts = [num_inputs]
        for part in parts:
            self.starts.append(self.starts[-1] + len(part.group))
        self.num_variables = self.starts[-1]
        self.probes: list[Rounded] = []

    def form(self, chain: Chain) -> QuadraticForm:
        state = Rounded(torch.eye(self.num_inputs, self.num_variables, dtype=torch.float64))
        output = self.through(chain.layers, state)
        groups, offset = [torch.zeros(0, dtype=torch.long)], 0
        for part in self.parts:
            groups.append(part.group + offset)
            offset += int(part.group[-1]) + 1 if len(part.group) else 0
        none = Rounded(torch.zeros(0, self.num_variables, dtype=torch.float64))
        return QuadraticForm(
            num_inputs=self.num_inputs,
            probes=_stack([none, *self.probes]),
            output=output,
            square=_stack([none[:, 0], *(part.square for part in self.parts)]),
            cross=_stack([none[:, 0], *(part.cross for part in self.parts)]),
            group=torch.cat(groups),
            blocks=tuple(len(part.group) for part in self.parts),
        )

    def through(self, layers: Sequence[Layer], state: Rounded) -> Rounded:
        for layer in layers:
            match layer:
                case Linear(weight=weight):
                    state = Rounded(weight) @ state
                case Residual(body=body, skip=skip):
                    state = self.through(skip, state) + self.through(body, state)
                case _:
                    state = self.activation(state)
        return state

    def activation(self, state: Rounded) -> Rounded:
        part, start = self.parts[self.next], self.starts[self.next]
        self.next += 1
        self.probes.append(part.probe @ state)
        own = torch.zeros(len(part.group), self.num_variables, dtype=torch.float64)
        own[:, start : start + len(part.group)] = torch.eye(len(part.group))
        fresh = part.lift @ Rounded(own)
        if not bool(part.keep.largest.any()):
            return fresh
        return part.keep @ state + fresh


def _stack(parts: Sequence[Rounded]) -> Rounded:
    return Rounded(torch.cat([p.value for p in parts]), torch.cat([p.slack for p in parts]))


def activation_widths(chain: Chain) -> list[int]:
    """Number of units of every activation, in the order of `chain.activations`."""
    widths: list[int] = []

    def walk(layers: Sequence[Layer], width: int) -> int:
        for layer in layers:
            match layer:
                case Linear(weight=weight):
                    width = weight.shape[0]
                case Residual(body=body, skip=skip):
                    walk(skip, width)
                    width = walk(body, width)
                case _:
                    widths.append(width)
        return width

    walk(chain.layers, chain.num_inputs)
    return widths
