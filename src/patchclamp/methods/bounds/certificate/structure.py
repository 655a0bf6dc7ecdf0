"""What a certificate must look like before any of it is used.

These checks need neither the network nor the property; `check` does the rest. A
certificate that fails here is damaged or forged, and is refused whole.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchclamp.core.errors import DataError
from patchclamp.methods.bounds.certificate.form import INPUT, LEAF, CaseProof, Certificate, Mode
from patchclamp.methods.bounds.certificate.tree import is_tree

MOST_DEPTH = 100_000
"""Splits on one path. A search that needs more has lost its way."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LAYER_SLOPES = re.compile(r"(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})")


def check_structure(certificate: Certificate) -> None:
    """Raises DataError, naming the case and the array, unless the certificate is well formed."""
    for name, digest in (("network", certificate.network), ("property", certificate.property)):
        if not _DIGEST.fullmatch(digest):
            raise DataError(f"a certificate's hash of the {name} is not a SHA-256", got=digest[:80])
    for number, proof in enumerate(certificate.cases):
        try:
            _check_case(proof)
        except DataError as e:
            raise DataError(
                f"case {number} of a certificate: {e.what}", got=e.got, expected=e.expected
            ) from e


def _check_case(proof: CaseProof) -> None:
    if not isinstance(proof.mode, Mode):
        raise DataError("unknown mode", got=repr(proof.mode), expected="input or neuron")
    num_nodes = len(_array(proof.layer, "layer", np.int32, 1))
    for name in ("index", "point"):
        array = _array(getattr(proof, name), name, np.int32 if name == "index" else np.float64, 1)
        if len(array) != num_nodes:
            raise DataError(f"{name} has another length than layer", got=str(len(array)))
    if not is_tree(proof.layer):
        raise DataError("the nodes are not one tree in preorder", expected="two sides at each node")
    if (proof.layer < LEAF).any() or (proof.index < 0).any():
        raise DataError("a node has a negative layer or index")
    if proof.mode is Mode.INPUT and (proof.layer > INPUT).any():
        raise DataError("a proof by input divides a neuron")
    num_leaves = int((proof.layer == LEAF).sum())
    weights = _array(proof.weights, "weights", np.float64, 2)
    if len(weights) != num_leaves:
        raise DataError(
            "weights do not fit the leaves", got=str(len(weights)), expected=str(num_leaves)
        )
    if (weights < 0).any() or not (weights > 0).any(axis=1).all():
        raise DataError("the weights of a leaf are negative, or all 0")
    _check_hints(proof, num_leaves)


def _check_hints(proof: CaseProof, num_leaves: int) -> None:
    if proof.mode is Mode.INPUT and (proof.slopes or proof.multipliers.size or proof.layer_slopes):
        raise DataError("a proof by input has slopes or multipliers")
    for k, slope in enumerate(proof.slopes):
        if len(_array(slope, f"slopes {k}", np.float32, 2)) != num_leaves:
            raise DataError(f"slopes {k} do not fit the leaves", expected=str(num_leaves))
    multipliers = _array(proof.multipliers, "multipliers", np.float32, 2)
    if (multipliers < 0).any():
        raise DataError("a multiplier is negative")
    if multipliers.size and len(multipliers) != num_leaves:
        raise DataError("multipliers do not fit the leaves", expected=str(num_leaves))
    if multipliers.shape[1] > MOST_DEPTH:
        raise DataError("a path is too long", expected=f"at most {MOST_DEPTH} splits")
    for name, slope in proof.layer_slopes.items():
        found = _LAYER_SLOPES.fullmatch(name)
        if not found or int(found[2]) >= int(found[1]):
            raise DataError(
                "slopes of a layer have no such name", got=name, expected="k.j with j < k"
            )
        if len(_array(slope, f"layer slopes {name}", np.float32, 3)) != 2:
            raise DataError(f"layer slopes {name} are not two", expected="lower and upper")


def _array(array: object, name: str, dtype: type[np.generic], num_axes: int) -> NDArray[Any]:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != num_axes:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else str(type(array))
        raise DataError(
            f"{name} is not what it should be",
            got=got,
            expected=f"{np.dtype(dtype)} with {num_axes} axes",
        )
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise DataError(f"{name} holds a number that is not finite")
    return array
