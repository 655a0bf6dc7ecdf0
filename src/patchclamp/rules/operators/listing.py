"""The table of operators as text, for the documentation and for messages."""

from __future__ import annotations

from collections.abc import Callable

from patchclamp.rules.operators.table import TABLE


def named(target: object) -> str:
    """An operator as a capture names it."""
    name = str(target) if str(target).startswith("aten.") else ""
    return name or getattr(target, "__name__", str(target))


def described(build: Callable[..., object]) -> str:
    """What stands for an operator: the first line of its builder's documentation."""
    lines = (build.__doc__ or "").strip().splitlines()
    return lines[0].rstrip(".") if lines else ""


def entries() -> dict[str, list[str]]:
    """What stands for operators -> their names, sorted."""
    made: dict[str, list[str]] = {}
    for target, build in TABLE.items():
        made.setdefault(described(build), []).append(named(target))
    return {text: sorted(names) for text, names in sorted(made.items(), key=lambda e: min(e[1]))}


def markdown() -> str:
    """A table: operators, and what stands for them."""
    lines = ["| operators | what stands for them |", "|---|---|"]
    for text, names in entries().items():
        shown = ", ".join(f"`{n.removeprefix('aten.')}`" for n in names)
        lines.append(f"| {shown} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)
