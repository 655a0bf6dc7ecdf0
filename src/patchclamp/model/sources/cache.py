"""The user's cache: folders of files that are costly to make and can always be made again.

A folder is filled beside its place and renamed, so it is whole or absent. Its manifest
holds the size and SHA-256 of every file, and a folder that does not match its manifest
is made again. A cache that cannot be written costs time, never the result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

FULL_CHECK_BYTES = 2 << 30
"""Files up to this size are hashed whenever they are used (about 0.6 s a GiB); larger
ones are compared in size and first mebibyte."""

HEAD_BYTES = 1 << 20
STALE_SECONDS = 6 * 3600
"""Unfinished folders older than this were left by a process that was killed."""

MANIFEST = "manifest.json"


def cache_root(given: Path | None = None) -> Path:
    """`given`, else $PATCHCLAMP_CACHE, else `patchclamp` in $XDG_CACHE_HOME or ~/.cache."""
    if given is not None:
        return Path(given).expanduser().absolute()
    if own := os.environ.get("PATCHCLAMP_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "patchclamp"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: Path, root: Path) -> str:
    """SHA-256 of a file, computed once for each path, size and time of change."""
    stat = path.stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    memo = root / "seen" / hashlib.sha256(key.encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = memo.read_text(encoding="ascii")
        if len(known) == 64:
            return known
    digest = file_sha256(path)
    with contextlib.suppress(OSError):  # not remembered: hashed again next time
        memo.parent.mkdir(parents=True, exist_ok=True)
        _write(memo, digest)
    return digest


def fault(folder: Path, facts: Mapping[str, str]) -> str | None:
    """What is wrong with a cached folder; None if it is whole and its facts are these."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["facts"] != dict(facts):
            return "it was made by another version"
        for name, entry in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"'{name}' is missing"
            if path.stat().st_size != entry["size"]:
                return f"'{name}' has another size"
            if entry != _entry(path):
                return f"'{name}' has other content"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"its manifest cannot be read ({type(e).__name__})"
    return None


def publish(folder: Path, fill: Callable[[Path], None], facts: Mapping[str, str]) -> None:
    """Make a cached folder: `fill` writes files into an empty folder beside it.

    Raises:
        OSError: it cannot be written (read-only, full disk); nothing is left behind.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    draft = _draft(folder)
    try:
        fill(draft)
        files = {path.name: _entry(path) for path in sorted(draft.iterdir())}
        manifest = {"facts": dict(facts), "files": files}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in draft.iterdir():
            _sync(path)
        _replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _draft(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".draft", dir=folder.parent))


def _replace(draft: Path, folder: Path) -> None:
    """Rename the draft into place, over whatever is there."""
    if folder.exists():
        doomed = _draft(folder)
        os.replace(folder, doomed / "old")
        shutil.rmtree(doomed, ignore_errors=True)
    try:
        os.rename(draft, folder)
    except OSError:
        # another process was faster; its folder was made from the same source
        if not (folder / MANIFEST).is_file():
            raise


def _sweep(folder: Path) -> None:
    for draft in folder.parent.glob(f"{folder.name}.*.draft"):
        with contextlib.suppress(OSError):
            if time.time() - draft.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(draft, ignore_errors=True)


def _entry(path: Path) -> dict[str, object]:
    size = path.stat().st_size
    if size <= FULL_CHECK_BYTES:
        return {"size": size, "sha256": file_sha256(path)}
    with path.open("rb") as file:
        return {"size": size, "head_sha256": hashlib.sha256(file.read(HEAD_BYTES)).hexdigest()}


def _write(path: Path, text: str) -> None:
    handle, draft = tempfile.mkstemp(prefix=path.name[:8], suffix=".draft", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
