"""The checker shares nothing with the search, and refuses arithmetic that it cannot bound."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import patchclamp.methods.bounds.certificate as package
from patchclamp.core.errors import EngineError
from patchclamp.methods.bounds.certificate.rounding import require_exact_arithmetic

ALLOWED = (
    "patchclamp.core.errors",
    "patchclamp.methods.bounds.certificate",
    "patchclamp.methods.bounds.property",
)
LIBRARIES = {"numpy", "scipy", "onnx", "google", "safetensors"}


def imported(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.append(node.module or "")
    return found


def test_imports() -> None:
    files = sorted(Path(package.__path__[0]).glob("*.py"))
    assert len(files) > 10
    used = {name for path in files for name in imported(path)}
    own = {name for name in used if name.startswith("patchclamp")}
    assert all(name.startswith(ALLOWED) for name in own)
    import sys

    rest = {name.split(".")[0] for name in used - own}
    assert rest <= LIBRARIES | set(sys.stdlib_module_names)


def test_flushed_denormals_are_refused() -> None:
    require_exact_arithmetic()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    try:
        with pytest.raises(EngineError, match="IEEE 754"):
            require_exact_arithmetic()
    finally:
        torch.set_flush_denormal(False)
    require_exact_arithmetic()
