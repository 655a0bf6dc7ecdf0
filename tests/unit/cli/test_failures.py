"""Every failure is one line, a way out and an exit code."""

from __future__ import annotations

import errno

import pytest
import torch

from patchclamp.cli import app
from patchclamp.cli.failures import describe
from patchclamp.core.errors import SiteError, StoreError

COMMANDS = [name for name, _, _ in app.COMMANDS]


@pytest.mark.parametrize(
    ("error", "code", "first", "hint"),
    [
        (
            SiteError("no site 'a'", nearest="b", hint="patchclamp sites"),
            2,
            "error: no site 'a'; nearest 'b'",
            "hint: patchclamp sites",
        ),
        (StoreError("broken\nstore"), 3, "error: broken store", None),
        (KeyboardInterrupt(), 130, "interrupted", None),
        (MemoryError(), 3, "error: out of memory", "hint: give fewer"),
        (torch.OutOfMemoryError("CUDA out of memory."), 3, "error: out of memory", "hint: give"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
            3,
            "error: out of memory",
            "hint: give fewer",
        ),
        (OSError(errno.ENOSPC, "full"), 3, "error: no space left on the device", "hint: free"),
        (
            OSError(errno.ENOSPC, "full", "x/y"),
            3,
            "error: no space left on the device of 'x/y'",
            "hint: free",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "x"),
            3,
            "error: the system refused 'x': Permission denied",
            "hint: PATCHCLAMP_DEBUG=1",
        ),
        (ModuleNotFoundError("No module named 'torch'"), 3, "error: a package", "hint: patchclamp"),
        (
            ValueError("two\nlines"),
            3,
            "error: internal error: ValueError: two lines",
            "hint: this is a defect of patchclamp; PATCHCLAMP_DEBUG=1",
        ),
    ],
)
def test_failures(error: BaseException, code: int, first: str, hint: str | None) -> None:
    failure = describe(error, [], COMMANDS)
    assert failure.exit_code == code
    assert failure.lines[0].startswith(first)
    assert all("\n" not in line for line in failure.lines)
    if hint is None:
        assert len(failure.lines) == 1
    else:
        assert failure.lines[1].startswith(hint)


def test_our_own_errors_are_cited_to_the_letter() -> None:
    failure = describe(SiteError("no site 'a'", got="x", expected="y"), [], COMMANDS)
    assert failure.lines == ["error: no site 'a'; got x; expected y"]


class TestRun:
    """The same through `run`."""

    @pytest.fixture
    def fail(self, monkeypatch: pytest.MonkeyPatch) -> type:
        class Fail:
            error: BaseException = ValueError("inside")

        def version(**_: object) -> None:
            raise Fail.error

        monkeypatch.setattr("patchclamp.cli.catalogues.version", version)
        monkeypatch.delenv("PATCHCLAMP_DEBUG", raising=False)
        return Fail

    def test_no_traceback_unless_asked_for(
        self, fail: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert app.run(["version"]) == 3
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert err.splitlines()[0] == "error: internal error: ValueError: inside"
        monkeypatch.setenv("PATCHCLAMP_DEBUG", "1")
        assert app.run(["version"]) == 3
        assert "Traceback" in capsys.readouterr().err

    def test_ctrl_c(self, fail: type, capsys: pytest.CaptureFixture[str]) -> None:
        fail.error = KeyboardInterrupt()
        assert app.run(["version"]) == 130
        assert capsys.readouterr().err == "interrupted\n"

    def test_control_characters_are_shown(
        self, fail: type, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fail.error = SiteError("no site '\x1b[31mred\u202e'", hint="\x07")
        assert app.run(["version"]) == 2
        err = capsys.readouterr().err
        assert "\x1b" not in err
        assert "\u202e" not in err
        assert "\x07" not in err
        assert "U+001B" in err

    @pytest.mark.parametrize(
        ("arguments", "message", "hint"),
        [
            (["frobnicate"], "frobnicate", "hint: patchclamp --help"),
            (["sites"], "--model", "hint: patchclamp sites --help"),
            (["sites", "tiny-lm", "--engine", "x"], "hooks", "hint: patchclamp sites --help"),
            (["sites", "tiny-lm", "--nope"], "--nope", "hint: patchclamp sites --help"),
            (["audit", "--seed", "x"], "--seed", "hint: patchclamp audit --help"),
            (["record", "tiny-lm", "--out", "x"], "--data", "hint: patchclamp record --help"),
        ],
    )
    def test_usage(
        self,
        arguments: list[str],
        message: str,
        hint: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert app.run(arguments) == 2
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert out == ""
        assert len(lines) == 2
        assert lines[0].startswith("error: ")
        assert message in lines[0]
        assert lines[1] == hint
