"""Help and lists answer at once: no torch, no xarray, no polars."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "xarray", "polars", "pandas", "transformers", "onnx", "numpy")
PROGRAM = f"""
import sys
from patchclamp.cli import run
code = run(sys.argv[1:])
loaded = [name for name in {HEAVY!r} if name in sys.modules]
sys.exit(f"loaded {{loaded}}" if loaded else code)
"""


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("version",),
        ("models",),
        ("models", "--json"),
        ("data", "--json"),
        ("audit", "--help"),
        ("record", "--help"),
        ("sites", "--help"),
        ("report", "--help"),
        ("doctor", "--help"),
        ("verify-store", "--help"),
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(arguments: tuple[str, ...]) -> None:
    run = call(*arguments)
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_the_probe_sees_what_is_loaded() -> None:
    assert "loaded ['torch'" in call("sites", "no-such-network").stderr


def test_help_is_fast() -> None:
    spans = []
    for _ in range(3):
        began = time.perf_counter()
        call("--help")
        spans.append(time.perf_counter() - began)
    assert min(spans) < 0.5


def test_help_names_every_command_and_the_exit_codes() -> None:
    text = call("--help").stdout
    for name in ("audit", "record", "sites", "report", "verify-store", "models", "data", "doctor"):
        assert f" {name} " in text
    assert "1 findings" in text
