"""How long a search may run and how much it may hold, and what it says meanwhile."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from patchclamp.core.progress import SILENT, Progress


class OutOfTimeError(Exception):
    """The time is up. Caught by the verifier, which answers `timeout`."""


class OutOfMemoryError(Exception):
    """The search would hold more than it may. Caught by the verifier: `unknown`."""


@dataclass(eq=False)
class Limits:
    """Attributes:
    seconds: wall time, from when this was made.
    max_boxes: how many open sub-problems may be held.
    """

    seconds: float
    max_boxes: int = 4_000_000
    progress: Progress = SILENT
    num_boxes: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.started)

    def check(self, num_open: int = 0) -> None:
        """Raises: OutOfTimeError, OutOfMemoryError."""
        if self.left <= 0:
            raise OutOfTimeError
        if num_open > self.max_boxes:
            raise OutOfMemoryError
