"""Record any unit, clamp any unit, trace the circuit, and prove what it does.

    import patchclamp
    net = patchclamp.open("tiny-lm")
    logits, acts = net.run("the whale, the wha", record="resid_post.*")

Names are loaded when they are first used, so that importing the package is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "open": "patchclamp.net",
    "Net": "patchclamp.net",
    "Run": "patchclamp.net",
    "Gradients": "patchclamp.net",
    "edits": "patchclamp.core.edit_kinds",
    "load_data": "patchclamp.data",
    "open_store": "patchclamp.store",
    "Finding": "patchclamp.core.findings",
    "Evidence": "patchclamp.core.findings",
    "PatchclampError": "patchclamp.core.errors",
}

if TYPE_CHECKING:
    from patchclamp.core import edit_kinds as edits
    from patchclamp.core.errors import PatchclampError
    from patchclamp.core.findings import Evidence, Finding
    from patchclamp.data import load_data
    from patchclamp.net import Gradients, Net, Run, open
    from patchclamp.store import open_store

__all__ = [
    "Evidence",
    "Finding",
    "Gradients",
    "Net",
    "PatchclampError",
    "Run",
    "edits",
    "load_data",
    "open",
    "open_store",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'patchclamp' has no attribute '{name}'")
    home = importlib.import_module(_HOMES[name])
    return home if name == "edits" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
