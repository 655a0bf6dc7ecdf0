"""One progress protocol: silent in library use, drawn by the command line.

Long work calls `start`, `advance` and `finish`; whoever watches decides what
to show. A watcher stops the work by raising from `advance` (Ctrl-C does), so
a loop must leave its files whole at every `advance`.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What long work reports to."""

    def start(self, task: str, total: int | None = None, unit: str = "items") -> None:
        """A piece of work begins; `total` is None where it is not known."""
        ...

    def advance(self, amount: int = 1) -> None:
        """`amount` more units are done."""
        ...

    def finish(self) -> None:
        """The piece of work that was started last is over."""
        ...

    def note(self, text: str) -> None:
        """A line worth reading, such as a cache being filled."""
        ...


class Silent:
    """The default: reports to nobody."""

    def start(self, task: str, total: int | None = None, unit: str = "items") -> None:
        pass

    def advance(self, amount: int = 1) -> None:
        pass

    def finish(self) -> None:
        pass

    def note(self, text: str) -> None:
        pass


SILENT = Silent()
