"""Writing a result whole or not at all: beside its place, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from patchclamp.core.errors import OutputError

_HINTS = {
    errno.ENOSPC: "free some space or write elsewhere",
    errno.EDQUOT: "free some space or write elsewhere",
    errno.EFBIG: "raise the limit on file sizes or write elsewhere",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder that can be written to",
    errno.EPERM: "choose a folder that can be written to",
    errno.ENOENT: "create the folder first",
}


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Put `data` at `path`: after any failure the old file, or none, is there.

    A link is followed. Raises: OutputError if the place is a folder or a device,
    cannot be written to, or has no space left.
    """
    target = _target(path)
    beside = target.parent / f".patchclamp-{secrets.token_hex(8)}.tmp"
    try:
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        except BaseException:  # an interrupt too must leave nothing behind
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)
            raise
        _sync_folder(target.parent)
    except OSError as error:
        code = error.errno or 0
        raise OutputError(
            f"cannot write '{path}': {error.strerror or error}", hint=_HINTS.get(code)
        ) from error


def _target(path: str | os.PathLike[str]) -> Path:
    """Where `path` leads, if a file can stand there."""
    try:
        target = Path(os.path.realpath(path))
        mode = target.stat().st_mode
    except FileNotFoundError:
        if os.fspath(path).endswith(os.sep):
            raise OutputError(
                f"cannot write '{path}': it names a folder", hint=f"give a file name in '{path}'"
            ) from None
        return target
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write '{path}': {error}") from error
    if stat.S_ISDIR(mode):
        raise OutputError(f"cannot write '{path}': it is a folder", hint="give a file name in it")
    if not stat.S_ISREG(mode):
        raise OutputError(f"cannot write '{path}': it is not a regular file")
    if not os.access(target, os.W_OK):
        raise OutputError(f"cannot write '{path}': the file there is read-only")
    return target


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
