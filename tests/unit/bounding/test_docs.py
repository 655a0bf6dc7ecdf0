"""docs/bounds.md: its code runs, its tables are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from patchclamp.bounding import sets
from patchclamp.bounding.ways import Method
from patchclamp.rules.operators import listing
from patchclamp.rules.operators.table import TABLE

PAGE = (Path(__file__).parents[3] / "docs" / "bounds.md").read_text("utf-8")


def test_the_table_of_operators_is_that_of_the_code() -> None:
    """Made again with listing.markdown(), between the two comments."""
    shown = PAGE.split("listing.markdown() -->\n")[1].split("\n<!-- end -->")[0]
    assert shown == listing.markdown()


def test_every_operator_is_described() -> None:
    entries = listing.entries()
    assert "" not in entries
    assert sum(len(names) for names in entries.values()) == len(TABLE)


def test_every_method_and_set_is_described() -> None:
    for method in Method:
        assert f"| `{method}` |" in PAGE
    for name in set(sets.__all__) - {"PerturbedSet", "Shaped"}:
        assert f"| `{name}(" in PAGE


def test_the_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/bounds.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "('batch', 'unit') the reals" in printed
    assert "tensor([" in printed
