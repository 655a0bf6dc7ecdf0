"""Certificates as files: one safetensors file, with a JSON header in its metadata.

Arrays are stored as `<case>/<field>`, slopes as `<case>/slopes/<k>` and
`<case>/layer_slopes/<k>.<j>`. Reading runs nothing and believes nothing: names, types, shapes and
values are checked before a certificate is returned.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from patchclamp.core.errors import DataError, OutputError, SourceError
from patchclamp.methods.bounds.certificate.form import (
    FORMAT,
    VERSION,
    CaseProof,
    Certificate,
    Mode,
)
from patchclamp.methods.bounds.certificate.structure import check_structure

MOST_BYTES = 8 * 2**30
"""Files beyond this are refused before they are read."""

MOST_SLOPES = 10_000
"""Nonlinear operators of a network, at most."""

_FIELDS = ("layer", "index", "point", "weights", "multipliers")
_KEY = "certificate"


def write_certificate(certificate: Certificate, path: str | Path) -> None:
    """Writes beside the target and renames, so that no half-written certificate is left.

    Raises: DataError if the certificate is not well formed; OutputError if it cannot be written.
    """
    check_structure(certificate)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "network": certificate.network,
        "property": certificate.property,
        "modes": [str(case.mode) for case in certificate.cases],
        "num_slopes": [len(case.slopes) for case in certificate.cases],
    }
    arrays: dict[str, NDArray[np.generic]] = {}
    for number, case in enumerate(certificate.cases):
        for name in _FIELDS:
            arrays[f"{number}/{name}"] = np.ascontiguousarray(getattr(case, name))
        for k, slope in enumerate(case.slopes):
            arrays[f"{number}/slopes/{k}"] = np.ascontiguousarray(slope)
        for name, slope in case.layer_slopes.items():
            arrays[f"{number}/layer_slopes/{name}"] = np.ascontiguousarray(slope)
    data, target = save(arrays, {_KEY: json.dumps(header)}), Path(path)
    try:
        with tempfile.NamedTemporaryFile(
            dir=target.parent, prefix=f".{target.name}.", delete=False
        ) as file:
            beside = Path(file.name)
            try:
                file.write(data)
                file.close()
                os.replace(beside, target)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
    except OSError as e:
        raise OutputError(f"'{target}' cannot be written: {e.strerror}") from e


def read_certificate(path: str | Path) -> Certificate:
    """The certificate of a file.

    Raises: SourceError if there is no such file; DataError if it is not a certificate, was
    written by another version, or is not well formed.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"'{path}' is too large", expected=f"at most {MOST_BYTES} bytes")
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            header = _header((file.metadata() or {}).get(_KEY))
            cases = tuple(
                _case(file, names, number, mode, count)
                for number, (mode, count) in enumerate(header.cases)
            )
    except OSError as e:
        raise SourceError(f"'{path}' cannot be read: {e.strerror or e}") from e
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise DataError(f"'{path}' is not a certificate", got=str(e)[:200]) from e
    if names:
        raise DataError("a certificate holds arrays that it should not", got=sorted(names)[0])
    certificate = Certificate(network=header.network, property=header.property, cases=cases)
    check_structure(certificate)
    return certificate


class _Header(NamedTuple):
    network: str
    property: str
    cases: list[tuple[Mode, int]]


def _header(text: str | None) -> _Header:
    """The checked header: every entry there, of its type, and nothing else."""
    header = json.loads(text) if text else None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DataError("a file is not a certificate", expected=f"format '{FORMAT}'")
    if header.get("version") != VERSION:
        raise DataError(
            "a certificate has another version",
            got=repr(header.get("version")),
            expected=str(VERSION),
        )
    modes, counts = header.get("modes"), header.get("num_slopes")
    fields = {"format", "version", "network", "property", "modes", "num_slopes"}
    if (
        set(header) != fields
        or not all(isinstance(header[name], str) for name in ("network", "property"))
        or not isinstance(modes, list)
        or not isinstance(counts, list)
        or len(modes) != len(counts)
        or not all(type(count) is int and 0 <= count <= MOST_SLOPES for count in counts)
        or not all(mode in tuple(Mode) for mode in modes)
    ):
        raise DataError("the header of a certificate is damaged", got=str(text)[:200])
    cases = [(Mode(mode), count) for mode, count in zip(modes, counts, strict=True)]
    return _Header(header["network"], header["property"], cases)


def _case(file: safe_open, names: set[str], number: int, mode: Mode, num_slopes: int) -> CaseProof:
    """The arrays of a case, each taken off the names that are left."""

    def take(name: str) -> NDArray[Any]:
        name = f"{number}/{name}"
        if name not in names:
            raise DataError("an array of a certificate is missing", got=name)
        names.remove(name)
        return np.asarray(file.get_tensor(name))  # type: ignore[no-untyped-call]  # safetensors has no types

    prefix = f"{number}/layer_slopes/"
    named = sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return CaseProof(
        mode=mode,
        slopes=tuple(take(f"slopes/{k}") for k in range(num_slopes)),
        layer_slopes={name: take(f"layer_slopes/{name}") for name in named},
        **{name: take(name) for name in _FIELDS},
    )
