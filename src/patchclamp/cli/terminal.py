"""What commands write: data to stdout, messages to stderr, and files whole or not at all.

Names come from networks and files, so nothing is read as markup, and control
characters are shown and not obeyed.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from patchclamp.core.errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console

    from patchclamp.core.findings import Json

PLAIN_WIDTH = 160
"""Columns of a table where no terminal tells its width."""


def data(text: str) -> None:
    """A line, or several, of what the command is for."""
    sys.stdout.write(_encodable(text, sys.stdout) + "\n")


def data_json(value: Json | Sequence[object] | Mapping[str, object]) -> None:
    """The same for machines: one JSON value."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def message(text: str) -> None:
    """A line for whoever watches."""
    sys.stderr.write(_encodable(shown(text), sys.stderr) + "\n")
    sys.stderr.flush()


def shown(text: str) -> str:
    """Text with control characters as symbols; line breaks stay."""
    from patchclamp.report.text import prose

    return prose(text)


def console(stream: TextIO) -> Console:
    """A console on stdout or stderr; colours only on a terminal, and not under NO_COLOR."""
    from rich.console import Console

    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def table(stream: TextIO, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table of plain text."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD if stream.isatty() else None, pad_edge=False)
    for head in heads:
        drawn.add_column(head, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(shown(cell)) for cell in row))
    # Captured, because the console itself would end the program if the reader has gone.
    drawing = console(stream)
    with drawing.capture() as captured:
        drawing.print(drawn)
    lines = captured.get().splitlines()
    stream.write(_encodable("\n".join(line.rstrip() for line in lines), stream) + "\n")


def require_writable(path: Path) -> None:
    """Raise OutputError for a file that could not be written, before any work is done for it."""
    if path.is_dir() or str(path).endswith(os.sep):
        raise OutputError(f"cannot write '{path}': it is a folder", hint="give a file name in it")
    if path.exists() and not path.is_file():
        raise OutputError(
            f"cannot write '{path}': it is not a regular file", hint="give another name"
        )
    folder = path.resolve().parent
    if not folder.is_dir():
        raise OutputError(
            f"cannot write '{path}': the folder '{folder}' does not exist",
            hint="create the folder first",
        )
    trial = folder / f".patchclamp-{secrets.token_hex(8)}.tmp"
    try:
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        trial.unlink()
    except OSError as error:
        raise OutputError(
            f"cannot write '{path}': {error.strerror or error}",
            hint="choose a folder that can be written to",
        ) from error


def _encodable(text: str, stream: TextIO) -> str:
    """Text that the stream can encode; what it cannot is escaped instead of failing."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
