"""The bounds that close the leaves of a certificate, or do not.

All results are lower bounds over the reals of the network whose weights are the numbers of
the file. They are sound whatever the hints (slopes, multipliers) are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchclamp.core.errors import InputError
from patchclamp.methods.bounds.certificate.form import INPUT
from patchclamp.methods.bounds.certificate.linear_bounds import (
    RECTIFIERS,
    TINY,
    Bounds,
    Rows,
    affine_interval,
    decides,
    elementwise_interval,
    refined,
)
from patchclamp.methods.bounds.certificate.network import Affine, Elementwise, Network
from patchclamp.methods.bounds.certificate.reading import read_network
from patchclamp.methods.bounds.certificate.rounding import (
    SLACK,
    Numbers,
    down,
    gamma,
    require_exact_arithmetic,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """The paths of B leaves, D splits each; see `form.CaseProof` for layer, index and point.

    Attributes:
        layer, index, point: (B, D); layer LEAF pads shorter paths.
        above: (B, D) whether the leaf has value >= point rather than value <= point.
    """

    layer: NDArray[np.int32]
    index: NDArray[np.int32]
    point: Numbers
    above: NDArray[np.bool_]


class Replay:
    """A network, ready to bound leaves.

    Cost of a leaf: about one backward pass for each elementwise operator with open elements.
    Raises: SourceError and EngineError if the network cannot be read; EngineError if
    arithmetic is not rounded as the bounds assume.
    """

    def __init__(self, network: Network | bytes | str | Path) -> None:
        self.network = network if isinstance(network, Network) else read_network(network)
        require_exact_arithmetic()
        self._arguments: dict[int, list[int]] = {}
        for i in self.network.operators:
            step = self.network.steps[i]
            if isinstance(step, Elementwise):
                self._arguments.setdefault(step.source, []).append(i)
        self._boxlike = _boxlike(self.network)

    def margins(self, lower: Numbers, upper: Numbers, rows: Numbers, offsets: Numbers) -> Numbers:
        """Lower bounds of rows @ y + offsets over boxes of inputs; -inf where there is none.

        Shapes: lower, upper (B, num_inputs); rows (R, num_outputs) or (B, R, num_outputs);
        offsets (R,) or (B, R); result (B, R).
        Raises: InputError if a box is empty, infinite or of the wrong size.
        """
        self._check_boxes(lower, upper)
        with np.errstate(all="ignore"):
            bounds = self._bound(lower, upper)
            every = np.broadcast_to(rows, (len(lower), *rows.shape[-2:]))
            constant = np.broadcast_to(offsets, every.shape[:2])
            carried = Rows(bounds, constant)
            carried.add(len(self.network.steps) - 1, every.copy())
            return np.where(bounds.empty[:, None], -np.inf, carried.lowest())

    def leaf_margins(
        self, lower: Numbers, upper: Numbers, rows: Numbers, offsets: Numbers, weights: Numbers
    ) -> Numbers:
        """Lower bounds of weights . (rows @ y + offsets), with weights (B, R) of each box.

        Shapes: lower, upper (B, num_inputs); rows (R, num_outputs); offsets (R,); result (B,).
        Raises: as `margins`.
        """
        self._check_boxes(lower, upper)
        with np.errstate(all="ignore"):
            bounds = self._bound(lower, upper)
            found = self._mixed(bounds, weights, rows, offsets).lowest()[:, 0]
            return np.where(bounds.empty, -np.inf, found)

    def layers(
        self,
        lower: Numbers,
        upper: Numbers,
        layer_slopes: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> Bounds:
        """All steps bounded over one box (num_inputs,), for proofs by neuron."""
        self._check_boxes(lower[None], upper[None])
        with np.errstate(all="ignore"):
            return self._bound(lower[None], upper[None], layer_slopes=layer_slopes)

    def neuron_margins(
        self,
        layers: Bounds,
        splits: Splits,
        rows: Numbers,
        offsets: Numbers,
        weights: Numbers,
        slopes: Sequence[NDArray[np.float32]] = (),
        multipliers: NDArray[np.float32] | None = None,
    ) -> Numbers:
        """Lower bounds of weights . (rows @ y + offsets) over leaves that divide neurons.

        Within a leaf every multiplier times (point - value), for value >= point, is at most 0,
        so that adding it to the row keeps a lower bound of the sum one of the row.

        Shapes: rows (R, num_outputs); offsets (R,); weights (B, R); slopes one array (B, n)
        for each operator (B, 0 for the checker's own), or no array at all; multipliers (B, D);
        result (B,). A leaf that is proved to be empty has +inf.
        """
        num_leaves = len(splits.layer)
        with np.errstate(all="ignore"):
            lower = np.repeat(layers.lower[0], num_leaves, axis=0)
            upper = np.repeat(layers.upper[0], num_leaves, axis=0)
            _cut(splits, INPUT, lower, upper)
            bounds = self._bound(lower, upper, base=layers, splits=splits)
            hints = {
                self.network.operators[k]: np.asarray(slope, np.float64)[:, None, :]
                for k, slope in enumerate(slopes)
                if slope.shape[1]
            }
            carried = self._mixed(bounds, weights, rows, offsets, hints)
            if multipliers is not None:
                self._pull(carried, splits, np.asarray(multipliers, np.float64))
            found = carried.lowest()[:, 0]
            # After an unbounded step the intervals mean nothing, so neither does emptiness.
            return np.where(bounds.empty & ~bounds.unbounded, np.inf, found)

    def _mixed(
        self,
        bounds: Bounds,
        weights: Numbers,
        rows: Numbers,
        offsets: Numbers,
        hints: Mapping[int, Numbers] | None = None,
    ) -> Rows:
        """One row for each box, weights @ rows, less what rounding took; exact for one weight 1."""
        mixed, constant = weights @ rows, weights @ offsets
        size = np.abs(weights)
        loss = (size @ np.abs(rows) * bounds.magnitude[-1]).sum(axis=1) + size @ np.abs(offsets)
        exact = (np.count_nonzero(weights, axis=1) == 1) & (size.max(axis=1) == 1.0)
        loss = loss * (2.0 * gamma(sum(rows.shape)) * SLACK) + TINY
        constant = np.where(exact, constant, down(constant - loss))
        carried = Rows(bounds, constant[:, None], hints)
        carried.add(len(self.network.steps) - 1, mixed[:, None, :])
        return carried

    def _check_boxes(self, lower: Numbers, upper: Numbers) -> None:
        size = self.network.num_inputs
        if lower.shape != upper.shape or lower.ndim != 2 or lower.shape[1] != size:
            raise InputError(
                "boxes do not fit the network",
                got=f"{lower.shape} and {upper.shape}",
                expected=f"(boxes, {size}) twice",
            )
        if not (np.isfinite(lower).all() and np.isfinite(upper).all() and (lower <= upper).all()):
            raise InputError("a box is empty or not finite", expected="lower <= upper, both finite")

    def _bound(
        self,
        lower: Numbers,
        upper: Numbers,
        *,
        layer_slopes: Mapping[str, NDArray[np.float32]] | None = None,
        base: Bounds | None = None,
        splits: Splits | None = None,
    ) -> Bounds:
        """Every step bounded in order; with a base, by intervals within it rather than afresh."""
        flags = np.zeros(len(lower), bool)
        bounds = Bounds(network=self.network, empty=flags, unbounded=flags.copy())
        if base is not None:
            bounds.unbounded |= base.unbounded[0] | base.empty[0]
        for i, step in enumerate(self.network.steps):
            noise = np.zeros_like(lower)
            if isinstance(step, Elementwise):
                lower, upper, noise = elementwise_interval(bounds, i, step)
            elif isinstance(step, Affine):
                lower, upper, noise = affine_interval(bounds, step)
                if base is None and i in self._arguments and not self._boxlike[i]:
                    hints = self._hints(i, layer_slopes or {})
                    wanted = self._wanted(i, lower, upper)
                    lower, upper = refined(bounds, i, lower, upper, noise, wanted, hints)
            if base is not None:
                lower = np.maximum(lower, base.lower[i])
                upper = np.minimum(upper, base.upper[i])
            if splits is not None:
                for k in self._arguments.get(i, ()):
                    _cut(splits, self.network.operators.index(k), lower, upper)
            bounds.append(*bounds.settled(lower, upper), noise)
        return bounds

    def _wanted(self, i: int, lower: Numbers, upper: Numbers) -> NDArray[np.bool_]:
        wanted = np.zeros(lower.shape, bool)
        for k in self._arguments[i]:
            step = self.network.steps[k]
            if isinstance(step, Elementwise):
                wanted |= decides(step, lower, upper)
        return wanted

    def _hints(
        self, argument: int, layer_slopes: Mapping[str, NDArray[np.float32]]
    ) -> dict[int, Numbers]:
        """The slopes "k.j" for the operators k of this argument, by step of j."""
        found: dict[int, Numbers] = {}
        for k in self._arguments[argument]:
            for j, step in enumerate(self.network.operators):
                slope = layer_slopes.get(f"{self.network.operators.index(k)}.{j}")
                if slope is not None and step < argument:
                    found[step] = np.asarray(slope, np.float64)
        return found

    def _pull(self, carried: Rows, splits: Splits, multipliers: Numbers) -> None:
        """The splits as multipliers: multiplier * (value - point) where value <= point, and
        multiplier * (point - value) where value >= point."""
        signed = np.where(splits.above, -multipliers, multipliers)
        for k in range(len(self.network.operators)):
            leaf, depth = np.nonzero((splits.layer == k) & (multipliers > 0))
            if not len(leaf):
                continue
            argument = self.network.operator(k).source
            magnitude = carried.bounds.magnitude[argument]
            pull = np.zeros((len(signed), 1, magnitude.shape[1]))
            element, force = splits.index[leaf, depth], signed[leaf, depth]
            point = splits.point[leaf, depth]
            np.add.at(pull[:, 0, :], (leaf, element), force)
            constant, loss = np.zeros(len(signed)), np.zeros(len(signed))
            np.add.at(constant, leaf, -force * point)
            np.add.at(loss, leaf, np.abs(force) * (np.abs(point) + magnitude[leaf, element]))
            loss = loss * (2.0 * gamma(splits.layer.shape[1]) * SLACK) + TINY
            carried.constant = down(carried.constant + down(constant - loss)[:, None])
            carried.add(argument, pull)


def _cut(splits: Splits, layer: int, lower: Numbers, upper: Numbers) -> None:
    """Intervals of the leaves cut in place by their splits of this layer."""
    leaf, depth = np.nonzero(splits.layer == layer)
    element, point = splits.index[leaf, depth], splits.point[leaf, depth]
    above = splits.above[leaf, depth]
    np.maximum.at(lower, (leaf[above], element[above]), point[above])
    np.minimum.at(upper, (leaf[~above], element[~above]), point[~above])


def _boxlike(network: Network) -> list[bool]:
    """For each step, whether interval arithmetic is as tight as backward bounds.

    It is for the first affine step that mixes elements of a box, and for anything before it.
    """
    box, tight = [True], [True]
    for step in network.steps[1:]:
        if isinstance(step, Elementwise):
            box.append(box[step.source] and step.function in RECTIFIERS)
            tight.append(box[-1])
        elif isinstance(step, Affine):
            single = len(step.terms) == 1 and box[step.terms[0].source]
            box.append(single and step.keeps_boxes)
            tight.append(single)
        else:
            box.append(True)
            tight.append(True)
    return tight
