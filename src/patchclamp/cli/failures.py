"""Every way a command can fail, as one line, a way out and an exit code."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

from cyclopts import CycloptsError

from patchclamp.core.errors import PatchclampError

DEBUG = "PATCHCLAMP_DEBUG"
"""Set to 1 this environment variable asks for tracebacks."""

USAGE, FAILURE, INTERRUPTED = 2, 3, 130

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")
_FIRST_OF_TORCH = ("RuntimeError", "OutOfMemoryError", "AcceleratorError")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What the user reads, and the exit code."""

    what: str
    hint: str | None = None
    exit_code: int = FAILURE

    @property
    def lines(self) -> list[str]:
        """One line for what went wrong and one for the way out."""
        first = "interrupted" if self.exit_code == INTERRUPTED else f"error: {_one_line(self.what)}"
        return [first] if self.hint is None else [first, f"hint: {_one_line(self.hint)}"]


def describe(error: BaseException, tokens: Sequence[str], commands: Sequence[str]) -> Failure:
    """What to say of an error. `tokens` is the command line, for hints."""
    if isinstance(error, PatchclampError):
        return _ours(error)
    if isinstance(error, CycloptsError):
        command = f" {tokens[0]}" if tokens and tokens[0] in commands else ""
        return Failure(what=str(error), hint=f"patchclamp{command} --help", exit_code=USAGE)
    if isinstance(error, KeyboardInterrupt):
        return Failure(what="interrupted", exit_code=INTERRUPTED)
    if _is_out_of_memory(error):
        return Failure(
            what="out of memory", hint="give fewer examples, smaller batches or fewer sites"
        )
    if isinstance(error, ImportError):
        return Failure(
            what=f"a package that this needs cannot be imported: {error}",
            hint="patchclamp doctor says what is missing and how to get it",
        )
    if isinstance(error, OSError):
        return _system(error)
    return Failure(
        what=f"internal error: {type(error).__name__}: {error}",
        hint=f"this is a defect of patchclamp; {DEBUG}=1 shows the traceback for a report",
    )


def _ours(error: PatchclampError) -> Failure:
    text = str(error)
    if error.hint is not None:
        text = text.removesuffix(f" hint: {error.hint}")
    return Failure(what=text.removesuffix("."), hint=error.hint, exit_code=error.exit_code)


def _system(error: OSError) -> Failure:
    where = f" '{error.filename}'" if error.filename else ""
    if error.errno in _NO_SPACE:
        return Failure(
            what=f"no space left on the device{where and ' of' + where}",
            hint="free some space or write elsewhere",
        )
    return Failure(
        what=f"the system refused{where}: {error.strerror or error}",
        hint=f"{DEBUG}=1 shows where",
    )


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if not any(kind.__name__ in _FIRST_OF_TORCH for kind in type(error).__mro__):
        return False
    return any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def _one_line(text: str) -> str:
    return " ".join(text.split())
