"""Files of a store reach the disk whole or not at all.

Everything is written under a dotted name beside its place, flushed to the
device and renamed, so that a kill or a full disk at any moment leaves either
the old file or the new one. Failures of the disk become `OutputError`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from patchclamp.core.errors import OutputError, StoreError

LOCK_NAME = ".writer.lock"
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into an `OutputError` that says the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OutputError(
                f"no space left to write '{path}'",
                hint="free some space and run the same call again: it goes on where it stopped",
            ) from error
        if error.errno in _READ_ONLY:
            raise OutputError(
                f"'{path}' cannot be written: the folder is read-only",
                hint="choose another folder",
            ) from error
        raise OutputError(f"'{path}' cannot be written", got=error.strerror) from error


def beside(path: Path) -> Path:
    """The name under which `path` is written before it is renamed."""
    return path.with_name(f".{path.name}.tmp")


def write_whole(path: Path, blocks: Iterable[bytes | memoryview]) -> str:
    """Write `blocks` to `path` atomically and durably; returns the sha256 of the bytes.

    Raises: OutputError; then `path` is as it was and nothing is left beside it.
    """
    digest = hashlib.sha256()
    part = beside(path)
    with disk_errors(path):
        try:
            with part.open("wb", buffering=0) as file:
                for block in blocks:
                    _write_all(file.fileno(), block)
                    digest.update(block)
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return digest.hexdigest()


def _write_all(descriptor: int, block: bytes | memoryview) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Checksum of a file.

    Raises: StoreError if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StoreError(f"'{path}' cannot be read", got=error.strerror) from error


class FolderLock:
    """One writer for each folder. The kernel releases the lock when its holder is killed."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_NAME
        while True:
            with disk_errors(self._path):
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._descriptor)
                if not isinstance(error, BlockingIOError):
                    raise OutputError(f"'{folder}' cannot be locked", got=error.strerror) from error
                raise StoreError(
                    f"'{folder}' is being written by another process",
                    hint="wait for it to end, or choose another folder",
                ) from error
            # The former holder may have removed the file between our two calls.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._descriptor), self._path.stat()):
                    return
            os.close(self._descriptor)

    def release(self) -> None:
        """Remove the lock file and let the next writer in."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # the folder may be gone or read-only by now
                self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = -1
