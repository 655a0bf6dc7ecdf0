"""The tree of a search as it grows, and the proof that it becomes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from patchclamp.methods.bounds.certificate.form import INPUT, LEAF, CaseProof, Mode

Ids = NDArray[np.int64]


@dataclass(eq=False)
class Tree:
    """Nodes by number; 0 is the root. Arrays grow by doubling.

    Attributes:
        num_cases: how many cases are proved by the tree at once.
    """

    num_cases: int
    num_nodes: int = 1
    layer: NDArray[np.int32] = field(default_factory=lambda: np.full(1024, LEAF, np.int32))
    index: NDArray[np.int32] = field(default_factory=lambda: np.zeros(1024, np.int32))
    point: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1024))
    left: Ids = field(default_factory=lambda: np.zeros(1024, np.int64))
    row: NDArray[np.int32] = field(init=False)
    """(num_nodes, num_cases) of leaves: the row that is positive in each case."""

    def __post_init__(self) -> None:
        self.row = np.full((1024, self.num_cases), -1, np.int32)

    def split(
        self,
        ids: Ids,
        index: NDArray[np.int64],
        point: NDArray[np.float64],
        layer: int | Ids = INPUT,
    ) -> tuple[Ids, Ids]:
        """Divide nodes; the numbers of their sides <= point and >= point."""
        low = self.num_nodes + 2 * np.arange(len(ids))
        self._grow(self.num_nodes + 2 * len(ids))
        self.num_nodes += 2 * len(ids)
        self.layer[ids], self.index[ids], self.point[ids] = layer, index, point
        self.left[ids] = low
        return low, low + 1

    def close(self, ids: Ids, row: NDArray[np.int64]) -> None:
        """These are leaves; row (B, num_cases) is what is positive there."""
        self.row[ids] = row

    def _grow(self, num: int) -> None:
        while len(self.layer) < num:
            size = len(self.layer)
            self.layer = np.concatenate([self.layer, np.full(size, LEAF, np.int32)])
            self.index = np.concatenate([self.index, np.zeros(size, np.int32)])
            self.point = np.concatenate([self.point, np.zeros(size)])
            self.left = np.concatenate([self.left, np.zeros(size, np.int64)])
            self.row = np.concatenate([self.row, np.full_like(self.row, -1)])

    def preorder(self) -> Ids:
        """All nodes: each before its sides, the side <= point first."""
        order, stack = [], [0]
        layer, left = self.layer, self.left
        while stack:
            node = stack.pop()
            order.append(node)
            if layer[node] != LEAF:
                stack += (left[node] + 1, left[node])
        return np.array(order, np.int64)

    def proof(self, case: int, rows: NDArray[np.int64], order: Ids) -> CaseProof:
        """The proof by input of one case, whose rows have these numbers here."""
        leaves = order[self.layer[order] == LEAF]
        weights = (self.row[leaves, case][:, None] == rows[None]).astype(np.float64)
        return CaseProof(
            mode=Mode.INPUT,
            layer=self.layer[order],
            index=np.where(self.layer[order] == LEAF, 0, self.index[order]).astype(np.int32),
            point=np.where(self.layer[order] == LEAF, 0.0, self.point[order]),
            weights=weights,
        )
