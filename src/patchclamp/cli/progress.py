"""Progress on stderr with rate and time left: bars on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, TextIO, TypeAlias

from patchclamp.cli.terminal import console, message, shown

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

Clock: TypeAlias = Callable[[], float]

LINE_SECONDS = 10.0
"""Seconds between two lines about the same work."""

WORTH_A_LINE = 2.0
"""Where there are no bars, work that is done within this many seconds is not mentioned."""


@dataclass(kw_only=True)
class Work:
    """One piece of work and how far it is."""

    task: str
    total: int | None
    unit: str
    began: float
    done: int = 0
    said: float = 0.0

    def state(self, now: float) -> str:
        """`120/360 examples, 53/s, 5 s left`."""
        amount = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        text = f"{amount} {self.unit}"
        spent = now - self.began
        if not self.done or spent <= 0:
            return text
        rate = self.done / spent
        text += f", {_rate(rate)}"
        if self.total is not None and self.done < self.total:
            text += f", {_span((self.total - self.done) / rate)} left"
        return text

    def result(self, now: float) -> str:
        """`360 examples in 7 s, 53/s`."""
        spent = now - self.began
        text = f"{self.done:,} {self.unit} in {_span(spent)}"
        return f"{text}, {_rate(self.done / spent)}" if self.done and spent > 0 else text


class Lines:
    """Progress as lines, for logs: notes at once, long work every few seconds."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._open: list[Work] = []

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open = []

    def start(self, task: str, total: int | None = None, unit: str = "items") -> None:
        """A piece of work begins."""
        now = self._clock()
        self._open.append(Work(task=task, total=total, unit=unit, began=now, said=now))

    def advance(self, amount: int = 1) -> None:
        """Say so, if the last line is some time ago."""
        if not self._open:
            return
        work, now = self._open[-1], self._clock()
        work.done += amount
        if now - work.said >= LINE_SECONDS:
            work.said = now
            message(f"{work.task}: {work.state(now)}")

    def finish(self) -> None:
        """Say what it came to, if it took long."""
        if not self._open:
            return
        work, now = self._open.pop(), self._clock()
        if now - work.began >= WORTH_A_LINE:
            message(f"{work.task}: {work.result(now)}")

    def note(self, text: str) -> None:
        """A line at once."""
        message(text)


class Bars:
    """Progress as bars of rich, one for each piece of work that is going on."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._open: list[tuple[TaskID, Work]] = []
        self._drawn: RichProgress | None = None

    def __enter__(self) -> Bars:
        from rich.progress import BarColumn, Progress, TextColumn

        self._drawn = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[state]}", markup=False),
            console=console(self._stream),
            transient=True,
        )
        self._drawn.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._drawn is not None:
            self._drawn.stop()
        self._open, self._drawn = [], None

    def start(self, task: str, total: int | None = None, unit: str = "items") -> None:
        """Draw another bar."""
        if self._drawn is not None:
            work = Work(task=task, total=total, unit=unit, began=self._clock())
            state = work.state(work.began)
            self._open.append((self._drawn.add_task(shown(task), total=total, state=state), work))

    def advance(self, amount: int = 1) -> None:
        """Move the innermost bar."""
        if self._drawn is not None and self._open:
            drawn, work = self._open[-1]
            work.done += amount
            self._drawn.update(drawn, completed=work.done, state=work.state(self._clock()))

    def finish(self) -> None:
        """Take the innermost bar away; leave a line if it took long."""
        if self._drawn is not None and self._open:
            drawn, work = self._open.pop()
            self._drawn.remove_task(drawn)
            if self._clock() - work.began >= WORTH_A_LINE:
                self.note(f"{work.task}: {work.result(self._clock())}")

    def note(self, text: str) -> None:
        """A line above the bars."""
        if self._drawn is not None:
            self._drawn.console.print(shown(text))


def watch(stream: TextIO | None = None) -> Lines | Bars:
    """What to hand to long work in a `with` block: bars if stderr is a terminal, else lines."""
    stream = sys.stderr if stream is None else stream
    return Bars(stream) if stream.isatty() else Lines()


def _rate(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"


def _span(seconds: float) -> str:
    """`0.4 s`, `8 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 1:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
