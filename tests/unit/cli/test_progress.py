"""Progress: lines for logs, bars for terminals, rate and time left in both."""

from __future__ import annotations

import io

import pytest

from patchclamp.cli.progress import Bars, Lines, Work, watch


class Clock:
    """Time that passes when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_state_and_result() -> None:
    work = Work(task="recording", total=360, unit="examples", began=0.0)
    assert work.state(0.0) == "0/360 examples"
    work.done = 120
    assert work.state(4.0) == "120/360 examples, 30/s, 8 s left"
    assert work.state(4000.0) == "120/360 examples, 0.03/s, 2 h 13 min left"
    work.done = 360
    assert work.state(200.0) == "360/360 examples, 1.8/s"
    assert work.result(200.0) == "360 examples in 3 min 20 s, 1.8/s"
    assert Work(task="x", total=None, unit="rows", began=0.0, done=5).state(0.5) == "5 rows, 10/s"


def test_lines_come_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Lines(clock) as progress:
        progress.note("a cache is filled")
        progress.start("outer", total=100, unit="rows")
        progress.start("inner")
        progress.advance()
        progress.finish()
        for _ in range(25):
            clock.now += 1
            progress.advance(2)
        progress.finish()
        progress.finish()
        progress.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "a cache is filled",
        "outer: 20/100 rows, 2/s, 40 s left",
        "outer: 40/100 rows, 2/s, 30 s left",
        "outer: 50 rows in 25 s, 2/s",
    ]


def test_bars_show_rate_and_leave_a_line() -> None:
    clock, terminal = Clock(), Terminal()
    with Bars(terminal, clock) as progress:
        progress.start("recording [red]lstm[1]", total=10, unit="rows")
        clock.now += 4
        progress.advance(5)
        progress.note("worth [bold]reading")
        progress.finish()
    text = terminal.getvalue()
    assert "worth [bold]reading" in text
    assert "recording [red]lstm[1]: 5 rows in 4 s, 1.2/s" in text


def test_bars_that_are_not_open_take_calls() -> None:
    bars = Bars(Terminal())
    bars.start("x")
    bars.advance()
    bars.finish()


def test_no_colour_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    written = {}
    for value in ("", "1"):
        monkeypatch.setenv("NO_COLOR", value)
        terminal = Terminal()
        with Bars(terminal) as progress:
            progress.start("x", total=2)
            progress.advance()
            assert progress._drawn is not None
            progress._drawn.refresh()
        written[value] = terminal.getvalue()
    assert "\x1b[9" in written[""] or "\x1b[3" in written[""]
    assert "\x1b[9" not in written["1"]
    assert "\x1b[38" not in written["1"]


def test_who_watches_depends_on_the_stream() -> None:
    assert isinstance(watch(Terminal()), Bars)
    assert isinstance(watch(io.StringIO()), Lines)
