"""The one error tree. Every error says what, got, expected, the nearest match and the way out.

`exit_code` is what the command line exits with: 2 for something the user can
correct in the call, 3 for something that failed although the call was right.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PatchclampError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: one clause that says what is wrong.
        got: what was given, where it is not already in `what`.
        expected: what would have been right.
        nearest: the closest valid name.
        hint: a command or call that leads out.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        got: str | None = None,
        expected: str | None = None,
        nearest: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.got, self.expected = what, got, expected
        self.nearest, self.hint = nearest, hint
        text = what
        if got is not None:
            text += f"; got {got}"
        if expected is not None:
            text += f"; expected {expected}"
        if nearest is not None:
            text += f"; nearest '{nearest}'"
        text += "."
        if hint is not None:
            text += f" hint: {hint}"
        super().__init__(text)


class SiteError(PatchclampError):
    """A site address or alias that the network does not have, or has in another shape."""


class EditError(PatchclampError):
    """An edit that cannot be applied: unknown kind, axis, index or shape."""


class InputError(PatchclampError):
    """Inputs that the network cannot take: wrong shape, dtype, NaN, token out of range."""


class TargetError(PatchclampError):
    """A target that is not one scalar per row."""


class SourceError(PatchclampError):
    """A model that cannot be opened: missing file, unknown name, wrong format."""


class UnsafeFileError(SourceError):
    """A file whose loading could run code, such as a pickle, without being asked for by name."""


class MissingExtraError(SourceError):
    """An optional package is needed. The hint is the exact install line."""


class DataError(PatchclampError):
    """A dataset that is missing, empty, malformed or does not fit the model."""


class PropertyError(PatchclampError):
    """A property that is malformed, or that says something which cannot be verified."""


class OptionError(PatchclampError):
    """An option of a method or command with a value that it cannot have."""


class EvidenceError(PatchclampError):
    """A finding that claims a level of evidence that it did not earn."""

    exit_code = 3


class CaptureError(PatchclampError):
    """The network could not be captured as a graph, or the capture failed its checks."""

    exit_code = 3


class EngineError(PatchclampError):
    """An engine cannot do what was asked for on this network."""

    exit_code = 3


class BoundError(PatchclampError):
    """Bounds that cannot be computed: an operator without a rule, an empty or infinite set."""

    exit_code = 3


class StoreError(PatchclampError):
    """An activation store that is missing, damaged, or does not match what is written to it."""

    exit_code = 3


class OutputError(PatchclampError):
    """A result could not be written: read-only folder, no space left."""

    exit_code = 3


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate closest to `name`, or None when nothing is close."""
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return found[0] if found else None
