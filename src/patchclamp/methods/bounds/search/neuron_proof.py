"""Leaves of a search by neuron, replayed by the certificate checker and written as a proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from patchclamp.bounding.lowering import Lowered
from patchclamp.methods.bounds.certificate.form import INPUT, LEAF, CaseProof, Mode
from patchclamp.methods.bounds.certificate.linear_bounds import Bounds
from patchclamp.methods.bounds.certificate.replay import Replay, Splits
from patchclamp.methods.bounds.property import Numbers
from patchclamp.methods.bounds.search.input_split import SPARE
from patchclamp.methods.bounds.search.neuron_split import Leaf, Root
from patchclamp.rules.relu import ReLU
from patchclamp.rules.smooth import Unary
from patchclamp.rules.value import Value

MAX_HINTS = 1 << 26
"""How many slopes of layers a proof may carry (256 MiB); beyond, layers are not optimised."""


def operators(network: Lowered) -> list[Value]:
    """The elementwise nonlinear values, in the order in which the checker numbers them."""
    return [v for v in network.values if isinstance(v.rule, (ReLU, Unary))]


def matches(network: Lowered, replay: Replay) -> bool:
    """Whether the checker read the same operators, by number and size."""
    sizes = [int(np.prod(v.shape)) for v in operators(network)]
    theirs = [replay.network.operator(k).size for k in range(len(replay.network.operators))]
    return sizes == theirs


def num_hints(network: Lowered) -> int:
    """How many slopes it takes to write down those of all layers."""
    sizes = [int(np.prod(v.shape)) for v in operators(network) if isinstance(v.rule, ReLU)]
    return sum(2 * size * sum(sizes[:k]) for k, size in enumerate(sizes))


@dataclass(eq=False)
class NeuronProof:
    """One box, its layers bounded by the checker, and rows to be proved positive in it."""

    replay: Replay
    root: Root
    rows: Numbers
    offsets: Numbers
    hints: dict[str, NDArray[np.float32]]
    layers: Bounds
    _numbers: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ops = operators(self.root.bounds.network)
        self._numbers = [
            next((k for k, op in enumerate(ops) if place in op.arguments), INPUT)
            for place in self.root.places
        ]

    def holds(self, leaves: list[Leaf]) -> list[bool]:
        """Whether the checker closes these leaves."""
        arrays = self._arrays(leaves)
        found = self.replay.neuron_margins(
            self.layers,
            arrays.splits,
            self.rows,
            self.offsets,
            arrays.weights,
            arrays.slopes,
            arrays.multipliers,
        )
        return [bool(m > SPARE) for m in found]

    def proof(self, leaves: list[Leaf]) -> CaseProof:
        """The tree that the leaves' paths make up."""
        ordered = sorted(leaves, key=lambda leaf: [above for *_, above in leaf.path])
        layer, index, point = self._tree([leaf.path for leaf in ordered])
        arrays = self._arrays(ordered)
        return CaseProof(
            mode=Mode.NEURON,
            layer=np.array(layer, np.int32),
            index=np.array(index, np.int32),
            point=np.array(point, np.float64),
            weights=arrays.weights,
            slopes=arrays.slopes,
            multipliers=arrays.multipliers,
            layer_slopes=self.hints,
        )

    def _tree(
        self, paths: Sequence[tuple[tuple[int, int, float, bool], ...]]
    ) -> tuple[list[int], list[int], list[float]]:
        """Preorder: consecutive paths share all that lies above where they part."""
        layer: list[int] = []
        index: list[int] = []
        point: list[float] = []
        earlier: tuple[tuple[int, int, float, bool], ...] = ()
        for path in paths:
            shared = 0
            while shared < min(len(path), len(earlier)) and path[shared] == earlier[shared]:
                shared += 1
            # the split at which they part was written with the earlier path
            for place, element, at, _ in path[shared + 1 if earlier else 0 :]:
                layer.append(self._numbers[place])
                index.append(element)
                point.append(at)
            layer.append(LEAF)
            index.append(0)
            point.append(0.0)
            earlier = path
        return layer, index, point

    def _arrays(self, leaves: list[Leaf]) -> _Arrays:
        depth = max(len(leaf.path) for leaf in leaves)
        shape = (len(leaves), depth)
        layer, index = np.full(shape, LEAF, np.int32), np.zeros(shape, np.int32)
        point, above = np.zeros(shape), np.zeros(shape, bool)
        multipliers = np.zeros(shape, np.float32)
        weights = np.zeros((len(leaves), len(self.offsets)))
        for i, leaf in enumerate(leaves):
            weights[i, leaf.row] = 1.0
            for at, (place, element, where, side) in enumerate(leaf.path):
                layer[i, at], index[i, at] = self._numbers[place], element
                point[i, at], above[i, at] = where, side
            multipliers[i, : len(leaf.path)] = leaf.multipliers[leaf.row].numpy()
        slopes = tuple(_stacked(leaves, op) for op in operators(self.root.bounds.network))
        splits = Splits(layer=layer, index=index, point=point, above=above)
        return _Arrays(splits, weights, slopes, multipliers)


@dataclass(frozen=True)
class _Arrays:
    splits: Splits
    weights: Numbers
    slopes: tuple[NDArray[np.float32], ...]
    multipliers: NDArray[np.float32]


def _stacked(leaves: list[Leaf], op: Value) -> NDArray[np.float32]:
    if not isinstance(op.rule, ReLU) or op not in leaves[0].slopes:
        return np.zeros((len(leaves), 0), np.float32)
    chosen = [leaf.slopes[op][0, leaf.row].flatten().numpy() for leaf in leaves]
    return np.stack(chosen).astype(np.float32)


def layer_slopes(root: Root) -> dict[str, NDArray[np.float32]]:
    """The slopes with which every layer was bounded, as a certificate has them."""
    ops = operators(root.bounds.network)
    found: dict[str, NDArray[np.float32]] = {}
    for (value, sign), parts in (root.optimised.kept or {}).items():
        k = next((i for i, op in enumerate(ops) if value in op.arguments), None)
        if k is None:
            continue
        for index, slopes in parts:
            for j, op in enumerate(ops):
                if op in slopes and isinstance(op.rule, ReLU):
                    held = found.setdefault(f"{k}.{j}", _default(root, op, value))
                    held[0 if sign > 0 else 1, index.numpy()] = _rows(slopes[op])
    return found


def _default(root: Root, op: Value, value: Value) -> NDArray[np.float32]:
    """The checker's own choice, for elements that were not optimised."""
    box = root.bounds.interval(op.arguments[0])
    chosen = (box.upper > -box.lower).flatten().numpy().astype(np.float32)
    size = int(np.prod(value.shape))
    return np.broadcast_to(chosen, (2, size, len(chosen))).copy()


def _rows(slopes: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = slopes[0, 0].flatten(1).numpy().astype(np.float32)
    return found
