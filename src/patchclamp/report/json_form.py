"""A document as strict JSON, and back.

The form is fixed by `schema.json` beside this file (JSON Schema 2020-12). What
is written is ASCII, has no NaN, and has the same bytes for equal documents:
fields in the order of their classes, free-form mappings sorted by key. Reading
checks the structure against the classes themselves, so that a wrong file is
refused with the place in it and without a schema library.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from patchclamp.core.document import SCHEMA_VERSION, Document
from patchclamp.core.errors import DataError, OutputError, nearest
from patchclamp.core.findings import Json
from patchclamp.report.checks import BLOCKS, check_document
from patchclamp.report.writing import write_whole

SCHEMA_PATH = Path(__file__).with_name("schema.json")

T = TypeVar("T")


class _AnyJson:
    """Stands for `Json` among the type hints."""


class _AnyCell:
    """Stands for `Cell` among the type hints."""


class _AnyBlock:
    """Stands for `Block` among the type hints."""


_NAMES = {"Json": _AnyJson, "Cell": _AnyCell, "Block": _AnyBlock}
_KNOWN_HINTS: dict[type[Any], dict[str, Any]] = {}


def write_findings(document: Document, path: str | os.PathLike[str]) -> None:
    """Write the whole document as JSON, valid under `schema.json`.

    Raises: DataError if the document contradicts itself; OutputError if it holds
    what JSON cannot (NaN, a tensor), or if the file cannot be written.
    """
    text = json.dumps(plain_document(document), indent=1, allow_nan=False)
    write_whole(path, text.encode("ascii") + b"\n")


def plain_document(document: Document) -> dict[str, Json]:
    """The document as checked plain data; equal to `document.to_json()` once loaded."""
    check_document(document)
    data = _plain(document, "")
    assert isinstance(data, dict)
    return data


def read_document(path: str | os.PathLike[str]) -> Document:
    """The inverse of `write_findings`. Raises: DataError, with the place in the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text: {error.reason} at byte {error.start}") from (
            error
        )
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read '{path}': {reason}") from error
    try:
        data = json.loads(
            text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_once
        )
    except RecursionError as error:
        raise DataError(f"'{path}' is nested too deeply for a document") from error
    except ValueError as error:
        raise DataError(
            f"'{path}' is not strict JSON: {error}", hint="patchclamp audit --json writes one"
        ) from error
    return document_from_plain(data, source=os.fspath(path))


def document_from_plain(data: object, *, source: str = "document") -> Document:
    """A document from loaded JSON. `source` names it in errors."""
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version is None or isinstance(version, bool) or not isinstance(version, int):
        raise DataError(
            f"'{source}' is not a patchclamp document",
            got="no whole number 'schema_version' at its top",
            hint="patchclamp audit --json writes one",
        )
    if version != SCHEMA_VERSION:
        raise DataError(
            f"'{source}' has another schema version",
            got=str(version),
            expected=str(SCHEMA_VERSION),
            hint="read it with the version of patchclamp that its 'versions' names",
        )
    try:
        document = _build(Document, data, "")
        check_document(document)
    except DataError as error:
        raise DataError(
            f"'{source}' is not a valid document: {error.what}",
            got=error.got,
            expected=error.expected,
            nearest=error.nearest,
        ) from error
    return document


def _plain(value: object, where: str) -> Json:
    """Plain data from dataclasses, enums, tuples and mappings; refuses the rest by place."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _writable(str(value))
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise OutputError(
                f"the document holds a number that is not finite at {where}",
                got=repr(float(value)),
                hint="leave it out or set it to None where a cell was not measured",
            )
        return float(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _plain(getattr(value, f.name), f"{where}.{f.name}".lstrip("."))
            for f in dataclasses.fields(value)
        }
    if isinstance(value, tuple | list):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise OutputError(f"the document has a key that is not text at {where}: {key!r}")
        return {_writable(k): _plain(value[k], f"{where}.{k}") for k in sorted(value)}
    raise OutputError(
        f"the document holds what is not plain data at {where}",
        got=type(value).__name__,
        expected="text, a number, true, false, None or a list of them",
    )


def _writable(text: str) -> str:
    """Text that strict readers accept: a lone surrogate (from a file name or a torn
    token) is spelled out as `\\udc80`, as Python itself prints it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is too large for a float")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys each occur once: with two, readers differ in which they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key '{twice}' occurs twice in one object")
    return found


def _hints(cls: type[Any]) -> dict[str, Any]:
    """The types of the fields; kept, as working them out costs more than reading an object."""
    if cls not in _KNOWN_HINTS:
        _KNOWN_HINTS[cls] = typing.get_type_hints(cls, localns=_NAMES)
    return _KNOWN_HINTS[cls]


def _build(cls: type[T], data: object, where: str) -> T:
    """An instance of a dataclass from a JSON object with exactly its fields."""
    at = where or "the top"
    if not isinstance(data, dict):
        raise _wrong(at, data, f"an object ({cls.__name__})")
    hints = _hints(cls)
    for key in data:
        if key not in hints:
            raise DataError(f"{at} has an unknown key '{key}'", nearest=nearest(key, hints))
    for key in hints:
        if key not in data:
            raise DataError(f"{at} lacks the key '{key}'", expected=", ".join(hints))
    return cls(**{k: _read(hints[k], data[k], f"{where}.{k}".lstrip(".")) for k in hints})


def _read(hint: Any, data: object, where: str) -> Any:
    """A value of the type `hint` from JSON; DataError with the place if it is another."""
    if hint is _AnyJson:
        return data
    if hint is _AnyCell:
        if isinstance(data, dict | list):
            raise _wrong(where, data, "a cell (text, number, true, false or null)")
        return data
    if hint is _AnyBlock:
        return _read_block(data, where)
    origin = typing.get_origin(hint)
    if origin is tuple:
        return _read_tuple(typing.get_args(hint), data, where)
    if origin is dict:
        if not isinstance(data, dict):
            raise _wrong(where, data, "an object")
        inner = typing.get_args(hint)[1]
        return {key: _read(inner, item, f"{where}.{key}") for key, item in data.items()}
    if origin is types.UnionType or origin is typing.Union:
        if data is None:
            return None
        (inner,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
        return _read(inner, data, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, data, where)
    return _read_scalar(hint, data, where)


def _read_scalar(hint: type, data: object, where: str) -> object:
    if issubclass(hint, Enum):
        names = [str(member.value) for member in hint]
        if not isinstance(data, str) or data not in names:
            raise _wrong(where, data, " or ".join(f"'{name}'" for name in names))
        return hint(data)
    if hint is float and isinstance(data, int | float) and not isinstance(data, bool):
        return data
    if not isinstance(data, hint) or isinstance(data, bool) is not (hint is bool):
        named = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise _wrong(where, data, named[hint])
    return data


def _read_tuple(args: tuple[Any, ...], data: object, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise _wrong(where, data, "a list")
    if args[-1] is Ellipsis:
        return tuple(_read(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if len(data) != len(args):
        raise DataError(
            f"{where} has the wrong length", got=str(len(data)), expected=f"{len(args)}"
        )
    pairs = zip(args, data, strict=True)
    return tuple(_read(arg, x, f"{where}[{i}]") for i, (arg, x) in enumerate(pairs))


def _read_block(data: object, where: str) -> object:
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in BLOCKS:
        raise DataError(
            f"{where} is not a block",
            got=f"kind {kind!r}",
            expected=", ".join(BLOCKS),
            nearest=nearest(str(kind), BLOCKS),
        )
    return _build(BLOCKS[kind], data, where)


def _wrong(where: str, data: object, expected: str) -> DataError:
    shown = json.dumps(data)
    return DataError(
        f"{where} has the wrong type",
        got=shown if len(shown) <= 60 else f"{shown[:57]}...",
        expected=expected,
    )
