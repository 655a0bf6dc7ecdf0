"""Is a certificate a proof? Every leaf is bounded again, by nothing that the search has written.

The checker reads the network itself, computes in float64 with outward rounding, and shares
with the search only the form of a certificate and of a property. A certificate that is
valid proves that the property holds over the reals for the network whose weights are the
numbers in the file. It says nothing about float32 execution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patchclamp.core.errors import DataError
from patchclamp.methods.bounds.certificate.form import INPUT, LEAF, CaseProof, Certificate, Mode
from patchclamp.methods.bounds.certificate.linear_bounds import Bounds
from patchclamp.methods.bounds.certificate.network import Network
from patchclamp.methods.bounds.certificate.reading import read_network, unpacked
from patchclamp.methods.bounds.certificate.replay import Replay
from patchclamp.methods.bounds.certificate.rounding import Numbers
from patchclamp.methods.bounds.certificate.structure import check_structure
from patchclamp.methods.bounds.certificate.tree import Leaves, walk
from patchclamp.methods.bounds.property import Case, Property

BATCH = 32
"""Leaves bounded side by side."""

MOST_TOLD = 20
"""Open leaves told of; the rest are counted."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What the checker found.

    Attributes:
        valid: whether the certificate proves the property.
        failures: why not, in words; empty if valid.
        num_leaves: leaves that were bounded.
        num_cases: cases of the property.
    """

    valid: bool
    failures: tuple[str, ...]
    num_leaves: int
    num_cases: int


def check(
    certificate: Certificate,
    network: bytes | str | Path,
    property: Property,
    property_file: bytes | str | Path,
) -> CheckResult:
    """Whether the certificate proves that the property holds.

    Args:
        network: the ONNX file, or its bytes, packed or not.
        property: what `property_file` says.
        property_file: the property's file, or its bytes, packed or not; only its hash is used.

    A damaged certificate, or one for other files, is a failure and not an error. The
    inequalities of a case on inputs are not used: what is proved is stronger.

    Raises: SourceError and EngineError if the network cannot be read.
    """
    failures = list(_identity_failures(certificate, network, property, property_file))
    num_leaves, num_open = 0, 0
    if not failures:
        replay = Replay(read_network(network))
        for number, (proof, case) in enumerate(zip(certificate.cases, property.cases, strict=True)):
            try:
                for leaves, margins in _replayed(replay, proof, case):
                    num_leaves += len(margins)
                    for i in np.flatnonzero(~(margins > 0)):
                        num_open += 1
                        if num_open <= MOST_TOLD:
                            failures.append(
                                f"case {number}, leaf {leaves.numbers[i]}: "
                                f"not closed, bound {margins[i]:.6g}"
                            )
            except DataError as e:
                failures.append(f"case {number}: {e}")
    if num_open > MOST_TOLD:
        failures.append(f"and {num_open - MOST_TOLD} more leaves that are not closed")
    return CheckResult(
        valid=not failures,
        failures=tuple(failures),
        num_leaves=num_leaves,
        num_cases=len(property.cases),
    )


def _identity_failures(
    certificate: Certificate,
    network: bytes | str | Path,
    property: Property,
    property_file: bytes | str | Path,
) -> Iterator[str]:
    """Whether this is a certificate at all, and one of these files."""
    try:
        check_structure(certificate)
    except DataError as e:
        yield str(e)
    for name, expected, file in (
        ("network", certificate.network, network),
        ("property", certificate.property, property_file),
    ):
        found = hashlib.sha256(unpacked(file)).hexdigest()
        if found != expected:
            yield f"the certificate is for another {name}: its SHA-256 is {expected}, not {found}"
    if len(certificate.cases) != len(property.cases):
        yield f"{len(certificate.cases)} proofs for {len(property.cases)} cases"


def _replayed(replay: Replay, proof: CaseProof, case: Case) -> Iterator[tuple[Leaves, Numbers]]:
    """Batches of leaves, with a lower bound of each leaf's combination of inequalities."""
    _check_fit(replay.network, proof, case)
    # A box without any input has no counterexample.
    if (case.lower > case.upper).any():
        return
    layers = None
    if proof.mode is Mode.NEURON:
        layers = replay.layers(case.lower, case.upper, proof.layer_slopes)
    for leaves in walk(proof, case.lower, case.upper, BATCH):
        if layers is None:
            margins = replay.leaf_margins(
                leaves.lower,
                leaves.upper,
                case.rows,
                case.offsets,
                proof.weights[leaves.numbers],
            )
        else:
            margins = _by_neuron(replay, layers, leaves, proof, case)
        yield leaves, margins


def _by_neuron(
    replay: Replay, layers: Bounds, leaves: Leaves, proof: CaseProof, case: Case
) -> Numbers:
    depth = leaves.splits.layer.shape[1]
    multipliers = np.zeros((len(leaves.numbers), depth), np.float32)
    if proof.multipliers.size:
        given = proof.multipliers[leaves.numbers]
        multipliers[:, : given.shape[1]] = given[:, :depth]
        if given[:, depth:].any() or multipliers[leaves.splits.layer == LEAF].any():
            raise DataError("a leaf has more multipliers than splits")
    return replay.neuron_margins(
        layers,
        leaves.splits,
        case.rows,
        case.offsets,
        proof.weights[leaves.numbers],
        [slope[leaves.numbers] for slope in proof.slopes],
        multipliers,
    )


def _check_fit(network: Network, proof: CaseProof, case: Case) -> None:
    """Everything that a proof names must exist in this network and this case."""
    sizes = [network.operator(k).size for k in range(len(network.operators))]
    inputs, outputs = (network.num_inputs,), (len(case.rows), network.num_outputs)
    if case.lower.shape != inputs or case.upper.shape != inputs or case.rows.shape != outputs:
        raise DataError("the property is about a network with other inputs or outputs")
    if not all(np.isfinite(a).all() for a in (case.lower, case.upper, case.rows, case.offsets)):
        raise DataError("the property's box or inequalities are not finite")
    if proof.weights.shape[1] != len(case.rows):
        raise DataError(
            "weights do not fit the case's inequalities",
            got=str(proof.weights.shape[1]),
            expected=str(len(case.rows)),
        )
    divided = proof.layer >= INPUT
    limits = np.array([network.num_inputs, *sizes])
    layer = proof.layer[divided].astype(np.int64) + 1
    if (layer >= len(limits)).any():
        raise DataError("a node divides a layer that the network does not have")
    if (proof.index[divided] >= limits[layer]).any():
        raise DataError("a node divides an element that its layer does not have")
    if proof.slopes and (
        len(proof.slopes) != len(sizes)
        or any(s.shape[1] not in (0, size) for s, size in zip(proof.slopes, sizes, strict=True))
    ):
        raise DataError("slopes do not fit the operators of the network")
    for name, slope in proof.layer_slopes.items():
        k, j = (int(part) for part in name.split("."))
        if k >= len(sizes) or slope.shape != (2, sizes[k], sizes[j]):
            raise DataError(f"layer slopes {name} do not fit the operators of the network")
