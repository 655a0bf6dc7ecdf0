"""Searches that are just good enough to make certificates for the tests."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from patchclamp.methods.bounds.certificate.form import (
    INPUT,
    LEAF,
    CaseProof,
    Certificate,
    Mode,
)
from patchclamp.methods.bounds.certificate.linear_bounds import Bounds
from patchclamp.methods.bounds.certificate.replay import Replay, Splits
from patchclamp.methods.bounds.property import Case, Property

Numbers = NDArray[np.float64]
PROPERTY_FILE = b"; a property, as text"


class NotProvedError(Exception):
    """The search reached its depth."""


def case(lower: Numbers, upper: Numbers, rows: Numbers, offsets: Numbers) -> Case:
    none = np.zeros((0, len(lower)))
    return Case(
        lower=lower,
        upper=upper,
        rows=rows,
        offsets=offsets,
        input_rows=none,
        input_offsets=np.zeros(0),
    )


def true_property(replay: Replay, radius: float, slack: float, num_cases: int = 1) -> Property:
    """y0 and y1 are not both below what samples say of the larger one, less a slack."""
    size, num = replay.network.num_inputs, replay.network.num_outputs
    rng, cases = np.random.default_rng(11), []
    for _ in range(num_cases):
        centre = rng.normal(size=size)
        x = centre + radius * rng.uniform(-1, 1, (4000, size))
        y = replay.network.forward(x)[:, :2]
        offset = -np.median(y, axis=0)
        offset -= (y + offset).max(axis=1).min() - slack
        rows = np.eye(2, num)
        cases.append(case(centre - radius, centre + radius, rows, offset))
    return Property(cases=tuple(cases), num_inputs=size, num_outputs=num)


def bisect(replay: Replay, case: Case, depth: int = 14) -> CaseProof:
    """The widest input is halved until one row closes the leaf."""
    layer: list[int] = []
    index: list[int] = []
    point: list[float] = []
    weights: list[Numbers] = []

    def go(lower: Numbers, upper: Numbers, left: int) -> None:
        margins = replay.margins(lower[None], upper[None], case.rows, case.offsets)[0]
        best = int(margins.argmax())
        if margins[best] > 1e-9:
            for values, value in ((layer, LEAF), (index, 0), (point, 0.0)):
                values.append(value)
            weights.append(np.eye(len(margins))[best])
            return
        if not left:
            raise NotProvedError
        i = int((upper - lower).argmax())
        middle = float(0.5 * (lower[i] + upper[i]))
        for values, value in ((layer, INPUT), (index, i), (point, middle)):
            values.append(value)
        below, above = upper.copy(), lower.copy()
        below[i] = above[i] = middle
        go(lower, below, left - 1)
        go(above, upper, left - 1)

    go(case.lower, case.upper, depth)
    return CaseProof(
        mode=Mode.INPUT,
        layer=np.array(layer, np.int32),
        index=np.array(index, np.int32),
        point=np.array(point),
        weights=np.array(weights),
    )


Hints = tuple[list[NDArray[np.float32]], NDArray[np.float32]]


def hinted(
    replay: Replay, layers: Bounds, path: list[tuple[int, int, bool]], case: Case, row: int
) -> tuple[float, Hints]:
    """The best bound of a leaf, and slopes and multipliers for it, by trial and error."""
    rng, num = np.random.default_rng(0), 48
    depth = len(path)
    shape = (num, depth)
    splits = Splits(
        layer=np.broadcast_to(np.array([p[0] for p in path], np.int32), shape),
        index=np.broadcast_to(np.array([p[1] for p in path], np.int32), shape),
        point=np.zeros(shape),
        above=np.broadcast_to(np.array([p[2] for p in path], bool), shape),
    )
    sizes = [replay.network.operator(k).size for k in range(len(replay.network.operators))]
    best = np.concatenate([np.full(sum(sizes), 0.5), np.zeros(depth)])
    bound = -np.inf
    weights = np.tile(np.eye(len(case.rows))[row], (num, 1))
    for step in range(10):
        tried = best + rng.normal(size=(num, len(best))) * 0.5 * 0.75**step
        tried[0] = best
        tried = np.maximum(np.where(rng.random(tried.shape) < 0.4, tried, best), 0)
        parts = np.split(tried.astype(np.float32), np.cumsum(sizes), axis=1)
        found = replay.neuron_margins(
            layers, splits, case.rows, case.offsets, weights, parts[:-1], parts[-1]
        )
        if found.max() > bound:
            bound, best = float(found.max()), tried[found.argmax()]
        if bound > 1e-3:
            break
    parts = np.split(best.astype(np.float32), np.cumsum(sizes))
    return bound, (parts[:-1], parts[-1])


def divide_neurons(replay: Replay, case: Case, depth: int = 6) -> CaseProof:
    """The neuron with the widest interval around 0 is divided at 0."""
    layers = replay.layers(case.lower, case.upper)
    order = []
    for k in range(len(replay.network.operators)):
        source = replay.network.operator(k).source
        low, high = layers.lower[source][0], layers.upper[source][0]
        order += [(float(min(-a, b)), k, i) for i, (a, b) in enumerate(zip(low, high, strict=True))]
    neurons = [(k, i) for size, k, i in sorted(order, reverse=True) if size > 0]
    layer: list[int] = []
    index: list[int] = []
    weights: list[Numbers] = []
    hints: list[Hints] = []

    def go(path: list[tuple[int, int, bool]]) -> None:
        tried = [hinted(replay, layers, path, case, row) for row in range(len(case.rows))]
        best = int(np.argmax([bound for bound, _ in tried]))
        if tried[best][0] > 1e-9:
            layer.append(LEAF)
            index.append(0)
            weights.append(np.eye(len(case.rows))[best])
            hints.append(tried[best][1])
            return
        if len(path) >= min(depth, len(neurons)):
            raise NotProvedError
        k, i = neurons[len(path)]
        layer.append(k)
        index.append(i)
        for above in (False, True):
            go([*path, (k, i, above)])

    go([])
    slopes = zip(*(slopes for slopes, _ in hints), strict=True)
    multipliers = np.zeros((len(hints), depth), np.float32)
    for row, (_, given) in zip(multipliers, hints, strict=True):
        row[: len(given)] = given
    return CaseProof(
        mode=Mode.NEURON,
        layer=np.array(layer, np.int32),
        index=np.array(index, np.int32),
        point=np.zeros(len(layer)),
        weights=np.array(weights),
        slopes=tuple(np.array(slope) for slope in slopes),
        multipliers=multipliers,
    )


def certificate(data: bytes, *proofs: CaseProof) -> Certificate:
    return Certificate(
        network=hashlib.sha256(data).hexdigest(),
        property=hashlib.sha256(PROPERTY_FILE).hexdigest(),
        cases=proofs,
    )
