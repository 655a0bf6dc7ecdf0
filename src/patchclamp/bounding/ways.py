"""How bounds of an output are found: interval arithmetic, backwards, with chosen slopes, forwards.

Source: Gowal et al. 2018 (intervals); Zhang et al. 2018 (CROWN); Xu et al. 2020,
arXiv 2002.12920 (general graphs, forward mode); Xu et al. 2021, arXiv 2011.13824 (slopes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from patchclamp.bounding.forward import Forward
from patchclamp.bounding.lowering import Lowered
from patchclamp.bounding.propagate import MAX_ELEMENTS, Linearised, Propagation, Sets, Start
from patchclamp.bounding.slopes import Optimised, SlopeSearch
from patchclamp.core.errors import BoundError
from patchclamp.rules.base import Interval, gamma, magnitude
from patchclamp.rules.value import Value


class Method(StrEnum):
    """From the fastest to the tightest, roughly."""

    INTERVAL = "interval"
    FORWARD = "forward"
    FORWARD_CROWN = "forward+crown"
    CROWN = "crown"
    ALPHA = "alpha"


@dataclass(frozen=True, eq=False)
class Linear:
    """rows . x + constant, summed over what is perturbed.

    Attributes:
        rows: by name, (N, R, *shape).
        constant: (N, R).
    """

    rows: dict[str, Tensor]
    constant: Tensor


@dataclass(frozen=True, eq=False)
class Found:
    """Bounds of rows of an output.

    Attributes:
        lower, upper: (N, R).
        below, above: linear bounds, where they were asked for and the method has them.
        constants: values that forward mode knows by their intervals only, by name.
    """

    lower: Tensor
    upper: Tensor
    below: Linear | None = None
    above: Linear | None = None
    constants: tuple[str, ...] = ()


@dataclass(eq=False)
class Way:
    """One method on one lowered network.

    Attributes:
        network, sets: what is bounded, and over what.
        method: how.
        rounded: allow for rounding, so that the bounds hold over the reals.
        num_steps: of the ascent on slopes.
        keep_linear: keep linear bounds.
        restricted: values that something is known of besides what the sets say.
    """

    network: Lowered
    sets: Sets
    method: Method
    rounded: bool = True
    num_steps: int = 20
    keep_linear: bool = False
    restricted: tuple[Value, ...] = ()

    def run(self, rows: Tensor | None, index: Tensor) -> Found:
        """Bounds of rows (N or 1, R, *output), or of the output's elements `index` where None."""
        bounds = Propagation(self.network, self.sets, rounded=self.rounded)
        self._require_met(Propagation(self.network, self.sets))
        if self.method is Method.INTERVAL:
            return self._crossed(bounds, rows, index)
        if self.method in (Method.FORWARD, Method.FORWARD_CROWN):
            forward = Forward(bounds)
            forward.run()
            self._require_met(bounds)
            if self.method is Method.FORWARD:
                found = self._forward(forward, rows, index)
            else:
                found = self._backward(bounds, rows, index)
            return replace(found, constants=tuple(dict.fromkeys(forward.constants)))
        bounds.run()
        self._require_met(bounds)
        found = self._backward(bounds, rows, index)
        if self.method is Method.ALPHA:
            found = self._chosen(bounds, found, rows, index)
        return found

    def _require_met(self, bounds: Propagation) -> None:
        """Raise where a restriction leaves nothing of what a hidden value can be."""
        for value in self.restricted:
            box = bounds.interval(value)
            empty = (box.lower > box.upper).flatten(1)
            if bool(empty.any()):
                box_number, element = (int(i) for i in empty.nonzero()[0])
                raise BoundError(
                    f"nothing in the perturbed set meets the restriction of '{value.name}'",
                    got=f"box {box_number}, element {element}",
                    hint="any statement holds of nothing; take another set or restriction",
                )

    # ---- the output ---------------------------------------------------------

    def _pieces(self, rows: Tensor | None, index: Tensor, num: int) -> Iterator[Tensor]:
        """Rows or elements, a few at a time, so that memory stays bounded."""
        widest = max(torch.Size(v.shape).numel() for v in self.network.values)
        at_once = max(1, MAX_ELEMENTS // (num * widest))
        yield from index.split(at_once) if rows is None else rows.split(at_once, 1)

    def _starts(
        self, bounds: Propagation, rows: Tensor | None, index: Tensor, sign: float
    ) -> Iterator[Start]:
        output = self.network.output
        for piece in self._pieces(rows, index, bounds.interval(output).lower.shape[0]):
            if rows is None:
                yield bounds.start(output, piece, sign)
            else:
                nothing = torch.zeros(1, piece.shape[1], dtype=self.network.dtype)
                yield {output: piece * sign}, nothing

    def _backward(self, bounds: Propagation, rows: Tensor | None, index: Tensor) -> Found:
        sides: list[list[Linearised]] = []
        for sign in (1.0, -1.0):
            starts = self._starts(bounds, rows, index, sign)
            sides.append([bounds.linearise(*start) for start in starts])
        return self._joined(bounds, sides, rows, index)

    def _joined(
        self, bounds: Propagation, sides: list[list[Linearised]], rows: Tensor | None, index: Tensor
    ) -> Found:
        """Both sides of all pieces, within what interval arithmetic gives."""
        plain = self._crossed(bounds, rows, index)
        lower, upper = (torch.cat([p.bound for p in pieces], 1) for pieces in sides)
        below, above = (_linear(pieces) for pieces in sides) if self.keep_linear else (None, None)
        return Found(
            torch.maximum(lower, plain.lower),
            torch.minimum(-upper, plain.upper),
            below,
            None if above is None else _negated(above),
        )

    def _chosen(
        self, first: Propagation, found: Found, rows: Tensor | None, index: Tensor
    ) -> Found:
        """With optimised slopes in every layer, starting from the intervals of CROWN."""
        search = SlopeSearch(num_steps=self.num_steps)
        bounds = Propagation(
            self.network, self.sets, intervals=dict(first.intervals), rounded=self.rounded
        )
        bounds.improve = Optimised(bounds, search)
        bounds.run()
        self._require_met(bounds)
        sides: list[list[Linearised]] = []
        for sign in (1.0, -1.0):
            pieces = []
            for start in self._starts(bounds, rows, index, sign):
                made = bounds.linearise(*start)
                best, slopes = search.improve(bounds, start, made.bound)
                if self.keep_linear:
                    made = bounds.linearise(*start, slopes)
                pieces.append(Linearised(made.rows, made.constant, best))
            sides.append(pieces)
        better = self._joined(bounds, sides, rows, index)
        return Found(
            torch.maximum(better.lower, found.lower),
            torch.minimum(better.upper, found.upper),
            better.below,
            better.above,
        )

    def _forward(self, forward: Forward, rows: Tensor | None, index: Tensor) -> Found:
        between = forward.held[self.network.output]
        num = between.lower.constant.shape[0]
        sides: list[list[tuple[Tensor, Linear]]] = [[], []]
        for at, sign in enumerate((1.0, -1.0)):
            for piece in self._pieces(rows, index, num):
                C = self._one_hot(piece) if rows is None else piece
                made = forward.combined(C * sign, between)
                kept = {
                    leaf.name: made.rows[:, a:b].mT.reshape(-1, C.shape[1], *leaf.shape)
                    for leaf, (a, b) in forward.spans()
                }
                sides[at].append((forward.least(made), Linear(kept, made.constant)))
        plain = self._crossed(forward.bounds, rows, index)
        lower, upper = (torch.cat([b for b, _ in side], 1) for side in sides)
        below, above = (_stacked([f for _, f in side]) for side in sides)
        return Found(
            torch.maximum(lower, plain.lower),
            torch.minimum(-upper, plain.upper),
            below if self.keep_linear else None,
            _negated(above) if self.keep_linear else None,
        )

    def _one_hot(self, index: Tensor) -> Tensor:
        size = torch.Size(self.network.output.shape).numel()
        rows = torch.zeros(1, len(index), size, dtype=self.network.dtype)
        rows[0, torch.arange(len(index)), index] = 1
        return rows.reshape(1, len(index), *self.network.output.shape)

    def _crossed(self, bounds: Propagation, rows: Tensor | None, index: Tensor) -> Found:
        """From the output's interval alone."""
        box = bounds.interval(self.network.output)
        lower, upper = (side.flatten(1) for side in box)
        if rows is None:
            return Found(lower[:, index], upper[:, index])
        flat = rows.flatten(2)
        up, down = flat.clamp(min=0), flat.clamp(max=0)
        low = (up @ lower[:, :, None] + down @ upper[:, :, None])[:, :, 0]
        high = (up @ upper[:, :, None] + down @ lower[:, :, None])[:, :, 0]
        size = (flat.abs() @ magnitude(Interval(lower, upper))[:, :, None])[:, :, 0]
        error = gamma(2 * flat.shape[2] + 8, flat.dtype) * size + torch.finfo(flat.dtype).tiny
        return Found(low - error, high + error)


def _linear(pieces: list[Linearised]) -> Linear:
    return _stacked([Linear({v.name: A for v, A in p.rows.items()}, p.constant) for p in pieces])


def _stacked(pieces: list[Linear]) -> Linear:
    rows = {name: torch.cat([p.rows[name] for p in pieces], 1) for name in pieces[0].rows}
    return Linear(rows, torch.cat([p.constant for p in pieces], 1))


def _negated(x: Linear) -> Linear:
    return Linear({name: -rows for name, rows in x.rows.items()}, -x.constant)
