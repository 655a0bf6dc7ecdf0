"""Many properties one after another: `instances.csv` in, one row of results for each out.

The list is VNN-COMP's: network, property, seconds on every line, paths relative to the list.
Results are appended as they come and are on disk before the next instance begins, so that a
batch that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from patchclamp.core.errors import DataError, OutputError, PatchclampError
from patchclamp.core.progress import SILENT, Progress

ERROR = "error"
"""Stands for a verdict where there is none because the files could not be read or run."""


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One line of the list.

    Attributes:
        network, property: files that exist.
        timeout: seconds.
        names: of both files, as the list has them.
    """

    network: Path
    property: Path
    timeout: float
    names: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one instance.

    Attributes:
        network, property: as the list names them.
        verdict: sat, unsat, unknown, timeout; or error, which is none.
        seconds: by the clock.
        cpu_seconds: of this process.
        detail: one line: what the verdict rests on, or why there is none.
        timeout, inputs: what run_batch tells instances apart by; it sets them itself.
    """

    network: str
    property: str
    verdict: str
    seconds: float
    cpu_seconds: float
    detail: str
    timeout: float = 0.0
    inputs: str = ""


HEAD = tuple(f.name for f in fields(Row))

_Key = tuple[str, str, float, str]


def read_instances(path: Path | str, *, timeout: float | None = None) -> tuple[Instance, ...]:
    """The lines of an `instances.csv`; `timeout` replaces that of every line.

    A file that is missing while NAME.gz is there is taken from that.

    Raises: DataError for a list that cannot be read or is empty, a line that is not network,
        property, seconds, or a file that is missing; all with the number of the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise DataError(f"list of instances '{path}' cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise DataError(f"list of instances '{path}' is no text in UTF-8") from e
    found = []
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                found.append(_instance(path, reader.line_num, cells, timeout))
    except csv.Error as e:
        raise DataError(f"'{path}', line {reader.line_num}: {e}") from e
    if not found:
        raise DataError(f"list of instances '{path}' is empty", expected="network,property,seconds")
    return tuple(found)


def _instance(path: Path, line: int, cells: Sequence[str], timeout: float | None) -> Instance:
    if len(cells) != 3:
        raise DataError(
            f"'{path}', line {line}: no instance",
            got=f"{len(cells)} values",
            expected="network,property,seconds",
        )
    network, prop, text = (cell.strip() for cell in cells)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise DataError(f"'{path}', line {line}: no time limit", got=repr(text), expected="seconds")
    if network.startswith("["):
        raise DataError(f"'{path}', line {line}: properties of several networks cannot be verified")
    return Instance(
        network=_file(path, line, network),
        property=_file(path, line, prop),
        timeout=seconds if timeout is None else float(timeout),
        names=(network, prop),
    )


def _file(path: Path, line: int, name: str) -> Path:
    """A file named in the list, or its packed form."""
    found = plain_or_packed(path.parent / name)
    if found is None:
        raise DataError(
            f"'{path}', line {line}: no file '{path.parent / name}'", expected="it, or its .gz"
        )
    return found


def plain_or_packed(path: Path) -> Path | None:
    """The file, or NAME.gz beside where it should be, or None."""
    packed = path.with_name(f"{path.name}.gz") if path.name else path
    return next((candidate for candidate in (path, packed) if candidate.is_file()), None)


def run_batch(
    instances: Iterable[Instance],
    solve: Callable[[Instance], Row],
    out_csv: Path | str,
    progress: Progress = SILENT,
) -> tuple[Row, ...]:
    """One row for every instance, in order; those that `out_csv` has already are not solved.

    A row counts for an instance with the same names, timeout and contents of both files. Rows
    that are errors count too: remove them from the file to try again. An instance that
    cannot be read or run becomes such a row and the batch goes on. The last line of a file
    whose writer was killed half way is dropped.

    Raises: OutputError if `out_csv` cannot be written, or is something else.
    """
    out = Path(out_csv)
    instances = tuple(instances)
    known: dict[_Key, list[Row]] = {}
    for row in _resumed(out):
        known.setdefault(_key(row), []).append(row)
    taken: Counter[_Key] = Counter()
    rows = []
    progress.start("instances", total=len(instances), unit="instances")
    for instance in instances:
        row = _blank(instance)
        key = _key(row)
        earlier = known.get(key, [])
        if taken[key] < len(earlier):
            row = earlier[taken[key]]
            taken[key] += 1
        else:
            solved = _solved(instance, solve)
            row = replace(solved, timeout=row.timeout, inputs=row.inputs)
            _append(out, row)
            progress.note(f"{row.network} {row.property}: {row.verdict}, {row.seconds:.1f} s")
        rows.append(row)
        progress.advance()
    progress.finish()
    return tuple(rows)


def _blank(instance: Instance) -> Row:
    return Row(
        network=instance.names[0],
        property=instance.names[1],
        verdict=ERROR,
        seconds=0.0,
        cpu_seconds=0.0,
        detail="",
        timeout=instance.timeout,
        inputs=_fingerprint(instance),
    )


def _fingerprint(instance: Instance) -> str:
    """What tells whether a result is of the same files: 16 hex digits of their SHA-256."""
    digest = hashlib.sha256()
    for path in (instance.network, instance.property):
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as e:
            raise DataError(f"'{path}' cannot be read: {e.strerror or e}") from e
    return digest.hexdigest()[:16]


def _key(row: Row) -> _Key:
    return row.network, row.property, row.timeout, row.inputs


def _solved(instance: Instance, solve: Callable[[Instance], Row]) -> Row:
    try:
        return solve(instance)
    except PatchclampError as e:
        return replace(_blank(instance), detail=" ".join(str(e).split()))


def _resumed(out: Path) -> list[Row]:
    """The rows of an earlier run; makes the file, with its head, if there is none."""
    try:
        text = out.read_text(encoding="utf-8") if out.exists() else ""
    except (OSError, UnicodeDecodeError) as e:
        raise OutputError(f"results '{out}' cannot be read: {e}") from e
    if not text:
        _write(out, _line(HEAD))
        return []
    whole = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(io.StringIO(whole, newline="")))
    if not lines or tuple(lines[0]) != HEAD:
        raise OutputError(
            f"'{out}' is there and holds no results of a batch",
            expected=",".join(HEAD),
            hint="give another name for the results",
        )
    if whole != text:
        try:
            os.truncate(out, len(whole.encode()))
        except OSError as e:
            raise OutputError(f"cannot write '{out}': {e.strerror or e}") from e
    return [_row(out, number, cells) for number, cells in enumerate(lines[1:], start=2)]


def _row(out: Path, number: int, cells: Sequence[str]) -> Row:
    try:
        network, prop, verdict, seconds, cpu_seconds, detail, timeout, inputs = cells
        return Row(
            network=network,
            property=prop,
            verdict=verdict,
            seconds=float(seconds),
            cpu_seconds=float(cpu_seconds),
            detail=detail,
            timeout=float(timeout),
            inputs=inputs,
        )
    except ValueError as e:
        raise OutputError(
            f"'{out}', row {number}: no result of a batch", hint="remove the row or the file"
        ) from e


def _append(out: Path, row: Row) -> None:
    """In one write and onto the disk: a row is there whole, or its end shows that it is not."""
    cells = [getattr(row, name) for name in HEAD]
    _write(out, _line([repr(c) if isinstance(c, float) else " ".join(c.split()) for c in cells]))


def _line(cells: Sequence[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _write(out: Path, line: bytes) -> None:
    try:
        with out.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        raise OutputError(f"cannot write '{out}': {e.strerror or e}") from e
