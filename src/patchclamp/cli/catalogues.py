"""`patchclamp models`, `data` and `version`: lists that need neither torch nor a network."""

from __future__ import annotations

import dataclasses
import sys

from patchclamp import __version__
from patchclamp.cli import terminal
from patchclamp.cli.options import AsJson


def models(*, as_json: AsJson = False) -> None:
    """List the networks that open by name.

    Args:
        as_json: print JSON.
    """
    from patchclamp.model.sources import catalogue

    entries = catalogue()
    if as_json:
        terminal.data_json([dataclasses.asdict(entry) for entry in entries])
        return
    terminal.table(
        sys.stdout,
        ("name", "from", "installed", "licence", "what it is"),
        [
            (e.name, e.kind, "yes" if e.installed else "no", e.licence, e.description)
            for e in entries
        ],
    )
    for entry in entries:
        if not entry.installed:
            terminal.message(f"hint: for {entry.name}: {entry.install_line}")


def data(*, as_json: AsJson = False) -> None:
    """List the datasets that load by name.

    Args:
        as_json: print JSON.
    """
    from patchclamp.data import catalogue

    entries = catalogue()
    if as_json:
        terminal.data_json([{**dataclasses.asdict(e), "kind": str(e.kind)} for e in entries])
        return
    terminal.table(
        sys.stdout,
        ("name", "kind", "train/validation/test", "shape", "licence", "what it is"),
        [
            (
                e.name,
                str(e.kind),
                "/".join(map(str, e.size)),
                " x ".join(map(str, e.shape)),
                e.licence,
                e.description,
            )
            for e in entries
        ],
    )
    terminal.message("files can be given too: .npz, .safetensors, .txt, .jsonl")


def version(*, as_json: AsJson = False) -> None:
    """Print the version.

    Args:
        as_json: print JSON.
    """
    if as_json:
        terminal.data_json({"patchclamp": __version__})
    else:
        terminal.data(f"patchclamp {__version__}")
