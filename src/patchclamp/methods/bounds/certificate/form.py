"""A proof that a property holds, as data.

For every case of the property there is a binary tree. It starts from the case's box and
every inner node divides what it has at one point: an input (its value is at most, or at
least, the point) or the argument of one element of an elementwise nonlinear operator (its
value is at most, or at least, the point). Both sides keep the point, so that the leaves
tile the box by construction. A leaf says with which weights the case's inequalities are
to be combined; the checker has to find that the combination is positive everywhere in it.

How a checker bounds a leaf is its own affair. In proofs by input it bounds every layer
afresh on the leaf's box. In proofs by neuron the layers are bounded once on the case's
box, cut by the splits, and the splits enter as Lagrange multipliers; slopes that were
optimised are given, because their own choice would not close. Slopes and multipliers
are hints: any value is sound.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

FORMAT = "patchclamp-certificate"
VERSION = 1

LEAF = -2
INPUT = -1


class Mode(StrEnum):
    """What the tree of a case divides."""

    INPUT = "input"
    NEURON = "neuron"


@dataclass(frozen=True, kw_only=True, eq=False)
class CaseProof:
    """The tree of one case, in preorder: a node, its side <= point, its side >= point.

    Attributes:
        mode: what is divided.
        layer: (num_nodes,) LEAF, INPUT, or the number of the elementwise nonlinear operator,
            in topological order, whose argument is divided.
        index: (num_nodes,) element of the flat input or argument.
        point: (num_nodes,) where it is divided.
        weights: (num_leaves, num_rows) at least 0, of the case's inequalities; leaves in preorder.
        slopes: for proofs by neuron: one array (num_leaves, num_elements) for every nonlinear
            operator, the lower slopes of ReLU for the output rows; empty for the checker's own.
        multipliers: for proofs by neuron: (num_leaves, max_depth) at least 0, for the splits of
            the leaf's path, from the root; padded with 0.
        layer_slopes: for proofs by neuron: "k.j" -> (2, num_elements of k, num_elements of j)
            lower slopes of operator j while the lower (0) and upper (1) bounds of the argument
            of operator k are found; missing ones are the checker's own.
    """

    mode: Mode
    layer: NDArray[np.int32]
    index: NDArray[np.int32]
    point: NDArray[np.float64]
    weights: NDArray[np.float64]
    slopes: tuple[NDArray[np.float32], ...] = ()
    multipliers: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    layer_slopes: dict[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Certificate:
    """A proof that a network meets a property.

    Attributes:
        network: SHA-256 of the ONNX file's bytes, unpacked.
        property: SHA-256 of the property file's bytes, unpacked.
        cases: one proof for every case of the property, in order.
    """

    network: str
    property: str
    cases: tuple[CaseProof, ...]
