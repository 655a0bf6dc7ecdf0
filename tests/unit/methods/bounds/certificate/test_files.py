"""Certificates written, read back, and damaged on disk."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from patchclamp.core.errors import DataError, OutputError, SourceError
from patchclamp.methods.bounds.certificate.files import read_certificate, write_certificate
from patchclamp.methods.bounds.certificate.form import LEAF, CaseProof, Certificate, Mode

RNG = np.random.default_rng(0)
INPUTS = CaseProof(
    mode=Mode.INPUT,
    layer=np.array([-1, LEAF, -1, LEAF, LEAF], np.int32),
    index=np.array([0, 0, 1, 0, 0], np.int32),
    point=np.array([0.5, 0, 0.1, 0, 0]),
    weights=np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]),
)
NEURONS = replace(
    INPUTS,
    mode=Mode.NEURON,
    layer=np.array([1, LEAF, 0, LEAF, LEAF], np.int32),
    slopes=(RNG.random((3, 4), np.float32), np.zeros((3, 0), np.float32)),
    multipliers=RNG.random((3, 2), np.float32),
    layer_slopes={"1.0": RNG.random((2, 3, 4), np.float32)},
)
CERTIFICATE = Certificate(network="a" * 64, property="b" * 64, cases=(INPUTS, NEURONS))


def same(a: CaseProof, b: CaseProof) -> bool:
    for field in fields(CaseProof):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype
            assert np.array_equal(x, y)
        elif isinstance(x, dict):
            assert x.keys() == y.keys()
            assert all(np.array_equal(x[k], y[k]) for k in x)
        elif isinstance(x, tuple):
            assert all(np.array_equal(p, q) for p, q in zip(x, y, strict=True))
        else:
            assert x == y
    return True


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "proof.safetensors"
    write_certificate(CERTIFICATE, path)
    write_certificate(CERTIFICATE, path)  # over an older one
    found = read_certificate(path)
    assert (found.network, found.property) == ("a" * 64, "b" * 64)
    assert all(same(a, b) for a, b in zip(found.cases, CERTIFICATE.cases, strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["proof.safetensors"]


def test_malformed_is_not_written(tmp_path: Path) -> None:
    bad = replace(CERTIFICATE, cases=(replace(INPUTS, weights=-INPUTS.weights),))
    with pytest.raises(DataError, match="case 0 of a certificate: the weights"):
        write_certificate(bad, tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_nowhere_to_write_and_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        write_certificate(CERTIFICATE, tmp_path / "none" / "p")
    with pytest.raises(SourceError):
        read_certificate(tmp_path / "p")
    with pytest.raises(SourceError):
        read_certificate(tmp_path)


HEADERS: list[tuple[str, object]] = [
    ("version", 2),
    ("version", "1"),
    ("format", "other"),
    ("network", 7),
    ("network", "a" * 63),
    ("property", None),
    ("modes", ["input"]),
    ("modes", ["input", "both"]),
    ("modes", "in"),
    ("num_slopes", [0, -1]),
    ("num_slopes", [0, 10**9]),
    ("num_slopes", [0, 1]),
    ("num_slopes", [0, True]),
    ("extra", 1),
]


@pytest.mark.parametrize(("name", "value"), HEADERS)
def test_damaged_header(tmp_path: Path, name: str, value: object) -> None:
    path, header = written(tmp_path)
    rewrite(path, load_file(path), header | {name: value})
    with pytest.raises(DataError):
        read_certificate(path)


@pytest.mark.parametrize("name", ["format", "version", "network", "modes", "num_slopes"])
def test_missing_header_entry(tmp_path: Path, name: str) -> None:
    path, header = written(tmp_path)
    del header[name]
    rewrite(path, load_file(path), header)
    with pytest.raises(DataError):
        read_certificate(path)


def test_every_array_is_needed_and_no_other_is_allowed(tmp_path: Path) -> None:
    path, header = written(tmp_path)
    arrays = load_file(path)
    optional = {"1/layer_slopes/1.0"}
    for name in sorted(set(arrays) - optional):
        rewrite(path, {k: v for k, v in arrays.items() if k != name}, header)
        with pytest.raises(DataError, match="missing"):
            read_certificate(path)
    for name in ("2/layer", "0/secret", "1/layer_slopes/0.1", "1/layer_slopes/1.00", "x"):
        rewrite(path, arrays | {name: np.zeros((2, 1, 1), np.float32)}, header)
        with pytest.raises(DataError):
            read_certificate(path)


def test_every_array_has_its_type_and_finite_numbers(tmp_path: Path) -> None:
    path, header = written(tmp_path)
    arrays = load_file(path)
    for name, array in arrays.items():
        others = [array.astype(np.int64), array[None]]
        if array.dtype.kind == "f" and array.size:
            others += [np.full_like(array, np.nan), np.full_like(array, np.inf)]
        for other in others:
            rewrite(path, arrays | {name: np.ascontiguousarray(other)}, header)
            with pytest.raises(DataError):
                read_certificate(path)


def test_cut_or_foreign_bytes(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    data = path.read_bytes()
    for part in (b"", b"x", data[:20], data[: len(data) // 2], data[:-1], b"\x80\x04." + data):
        path.write_bytes(part)
        with pytest.raises(DataError):
            read_certificate(path)
    for text in ("", "[]", "null", "{", "[" * 100_000):
        save_file({"x": np.zeros(1)}, path, {"certificate": text})
        with pytest.raises(DataError):
            read_certificate(path)
    save_file({"x": np.zeros(1)}, path)
    with pytest.raises(DataError, match="not a certificate"):
        read_certificate(path)


def written(folder: Path) -> tuple[Path, dict[str, object]]:
    path = folder / "p"
    write_certificate(CERTIFICATE, path)
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return path, json.loads(file.metadata()["certificate"])


def rewrite(path: Path, arrays: dict[str, np.ndarray], header: dict[str, object]) -> None:
    save_file(arrays, path, {"certificate": json.dumps(header)})
