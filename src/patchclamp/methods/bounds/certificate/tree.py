"""The tree of a proof, walked from the root to its leaves.

Preorder: a node, all of its side <= point, all of its side >= point. The leaves tile what
the root stands for because both sides of every division keep the point.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchclamp.core.errors import DataError
from patchclamp.methods.bounds.certificate.form import INPUT, LEAF, CaseProof
from patchclamp.methods.bounds.certificate.replay import Splits
from patchclamp.methods.bounds.certificate.rounding import Numbers


@dataclass(frozen=True, kw_only=True, eq=False)
class Leaves:
    """Some leaves in preorder: their numbers, the splits on their paths and their input boxes."""

    numbers: NDArray[np.int64]
    splits: Splits
    lower: Numbers
    upper: Numbers


def open_ends(layer: NDArray[np.int32]) -> NDArray[np.int64]:
    """How many subtrees are still to come after each node; a tree ends where this is first 0."""
    return np.asarray(1 + np.cumsum(np.where(layer == LEAF, -1, 1)), np.int64)


def is_tree(layer: NDArray[np.int32]) -> bool:
    """Whether the nodes are exactly one tree in preorder."""
    left = open_ends(layer)
    return len(left) > 0 and left[-1] == 0 and bool((left[:-1] > 0).all())


def walk(proof: CaseProof, lower: Numbers, upper: Numbers, batch: int) -> Iterator[Leaves]:
    """The leaves of a tree whose root has this box, up to `batch` at a time.

    Raises: DataError if the nodes are not one tree, or an input is divided outside its box.
    """
    if not is_tree(proof.layer):
        raise DataError("the nodes of a proof are not one tree in preorder")
    walker = _Walker(proof, lower.copy(), upper.copy())
    numbers: list[int] = []
    for number in walker.leaves():
        numbers.append(number)
        walker.keep()
        if len(numbers) == batch:
            yield walker.collected(numbers)
            numbers = []
    if numbers:
        yield walker.collected(numbers)


class _Walker:
    """One box, cut on the way down and restored on the way up."""

    def __init__(self, proof: CaseProof, lower: Numbers, upper: Numbers) -> None:
        self.layer, self.index = proof.layer.tolist(), proof.index.tolist()
        self.point = proof.point.tolist()
        self.lower, self.upper = lower, upper
        self.path: list[tuple[int, bool]] = []
        self.old: list[float] = []
        self.paths: list[list[tuple[int, bool]]] = []
        self.boxes: list[tuple[Numbers, Numbers]] = []

    def leaves(self) -> Iterator[int]:
        """The number of each leaf, while the path and the box are those of the leaf."""
        number = 0
        for node, layer in enumerate(self.layer):
            if layer != LEAF:
                self._enter(node, above=False)
                continue
            yield number
            number += 1
            while self.path and self.path[-1][1]:
                self._leave()
            if self.path:
                parent = self._leave()
                self._enter(parent, above=True)

    def _enter(self, node: int, *, above: bool) -> None:
        if self.layer[node] == INPUT:
            i, point = self.index[node], self.point[node]
            if not self.lower[i] <= point <= self.upper[i]:
                raise DataError(
                    f"node {node} of a proof divides input {i} outside its box",
                    got=f"{point!r}",
                    expected=f"from {self.lower[i]!r} to {self.upper[i]!r}",
                )
            side = self.lower if above else self.upper
            self.old.append(float(side[i]))
            side[i] = point
        self.path.append((node, above))

    def _leave(self) -> int:
        node, above = self.path.pop()
        if self.layer[node] == INPUT:
            side = self.lower if above else self.upper
            side[self.index[node]] = self.old.pop()
        return node

    def keep(self) -> None:
        """The leaf that the walk is at goes into the next batch."""
        self.paths.append(list(self.path))
        self.boxes.append((self.lower.copy(), self.upper.copy()))

    def collected(self, numbers: list[int]) -> Leaves:
        """The leaves kept since the last call."""
        depth = max(len(path) for path in self.paths)
        shape = (len(self.paths), depth)
        splits = Splits(
            layer=np.full(shape, LEAF, np.int32),
            index=np.zeros(shape, np.int32),
            point=np.zeros(shape),
            above=np.zeros(shape, bool),
        )
        for i, path in enumerate(self.paths):
            for k, (node, above) in enumerate(path):
                splits.layer[i, k], splits.index[i, k] = self.layer[node], self.index[node]
                splits.point[i, k], splits.above[i, k] = self.point[node], above
        lower, upper = (np.array(side) for side in zip(*self.boxes, strict=True))
        self.paths, self.boxes = [], []
        return Leaves(numbers=np.array(numbers), splits=splits, lower=lower, upper=upper)
