"""The table of commands, and what happens when one of them ends, well or not."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TextIO

from cyclopts import App, CycloptsError, Group

from patchclamp import __version__
from patchclamp.cli.failures import DEBUG, describe
from patchclamp.cli.terminal import message

COMMANDS = (
    ("audit", "audit", "Measure a trained network's insides and write one page."),
    ("circuit", "circuit", "Find the circuit of a behaviour and check it."),
    ("verify", "verify", "Prove a property of a network, or find a counterexample."),
    ("check-certificate", "verify", "Check a proof that verify wrote, without the solver."),
    ("validate", "validate", "Ask whether an attribution method's maps may be believed."),
    ("record", "record", "Stream activations of a dataset into a store on disk."),
    ("sites", "sites", "Print the addresses that can be recorded and edited."),
    ("report", "report", "Draw the page of an audit again from its findings."),
    ("verify-store", "verify_store", "Compare a store with its checksums."),
    ("models", "catalogues", "List the networks that open by name."),
    ("data", "catalogues", "List the datasets that load by name."),
    ("doctor", "doctor", "Say what is installed and whether it works here."),
    ("version", "catalogues", "Print the version."),
)
"""Name, module (whose function has the command's name) and one line of help."""

CIRCUITS = (
    ("tasks", "circuits", "List the behaviours that circuits are found for."),
    ("heads", "circuits", "Say what each attention head does."),
    ("reproduce", "circuits", "Find a circuit again from its record and compare."),
    ("compare", "circuits", "Say what two circuits share, against chance."),
    ("diff", "circuits", "Say which heads two checkpoints gained and lost."),
)
"""Commands under `patchclamp circuits`, in the same form."""

EPILOGUE = (
    "Exit codes: 0 clean, 1 findings, 2 wrong call, 3 failure. "
    f"{DEBUG}=1 shows tracebacks, NO_COLOR=1 turns colours off."
)


READER_LEFT = 128 + 13
"""Exit code of a tool whose reader has gone: that of SIGPIPE."""


def build() -> App:
    """The app with its commands as import paths: nothing of theirs is imported here."""
    app = App(
        name="patchclamp",
        help="Record any unit, clamp any unit, trace the circuit, and prove what it does.",
        help_epilogue=EPILOGUE,
        version=f"patchclamp {__version__}",
        version_flags=["--version"],
        group_commands=Group.create_ordered("Commands"),
        suppress_keyboard_interrupt=False,
        help_format="plaintext",
    )
    for number, (name, module, line) in enumerate(COMMANDS):
        function = name.replace("-", "_")
        app.command(f"patchclamp.cli.{module}:{function}", name=name, help=line, sort_key=number)
    app.command(_circuits())
    return app


def _circuits() -> App:
    """The commands around circuits, likewise by import path."""
    group = App(
        name="circuits",
        help="Behaviours, heads, and circuits reproduced and compared.",
        group_commands=Group.create_ordered("Commands"),
        sort_key=[name for name, _, _ in COMMANDS].index("circuit") + 0.5,
        help_format="plaintext",
    )
    for number, (name, module, line) in enumerate(CIRCUITS):
        group.command(f"patchclamp.cli.{module}:{name}", name=name, help=line, sort_key=number)
    return group


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code and raises nothing but SystemExit."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = build()(
            tokens, exit_on_error=False, print_error=False, result_action="return_value"
        )
        sys.stdout.flush()
    except BrokenPipeError:
        _let_go(sys.stdout, sys.stderr)  # whoever read has gone (`| head`): end as other tools do
        return READER_LEFT
    except (Exception, KeyboardInterrupt) as error:
        return _failed(error, tokens)
    return result if isinstance(result, int) else 0


def main() -> None:
    """The entry point of the script `patchclamp`."""
    sys.exit(run())


def _failed(error: BaseException, tokens: Sequence[str]) -> int:
    """Say what went wrong; returns the exit code."""
    failure = describe(error, tokens, [*(name for name, _, _ in COMMANDS), "circuits"])
    try:
        sys.stdout.flush()
    except OSError:
        _let_go(sys.stdout)
    try:
        if os.environ.get(DEBUG) == "1" and not isinstance(error, CycloptsError):
            traceback.print_exception(error)
        for line in failure.lines:
            message(line)
    except OSError:
        _let_go(sys.stderr)
    return failure.exit_code


def _let_go(*streams: TextIO) -> None:
    """What these streams still hold goes nowhere, so that Python's own exit stays quiet."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
