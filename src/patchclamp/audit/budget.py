"""What the time allows, measured on this machine, with a list of what was left out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from patchclamp.core.document import LeftOut
from patchclamp.core.errors import OptionError
from patchclamp.methods.material import Material
from patchclamp.net import Net

_SHORTEST = 5.0
_TIMED = 3
_WORTH = 1.3
"""Threads have to be this much faster than one: beside other work they wait for each other."""


@dataclass
class Budget:
    """Seconds of wall time for one audit.

    Attributes:
        seconds: all of it.
        started: when the audit began (time.monotonic).
        left_out: what was not done, or done smaller.
    """

    seconds: float
    started: float = field(default_factory=time.monotonic)
    left_out: list[LeftOut] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.seconds >= _SHORTEST:
            raise OptionError(
                "the budget is too short for an audit",
                got=f"{self.seconds:g} s",
                expected=f"at least {_SHORTEST:g} s",
                hint="--budget 2m",
            )

    @property
    def left(self) -> float:
        """Seconds that remain (never negative)."""
        return max(0.0, self.seconds - (time.monotonic() - self.started))

    def share(self, part: float) -> float:
        """A share of what remains."""
        return part * self.left

    def skip(self, what: str, why: str, how: str) -> None:
        """Say that something was left out."""
        self.left_out.append(LeftOut(what=what, why=why, how_to_get_it=how))


def seconds_per_row(net: Net, material: Material, rows: int = 4) -> float:
    """Wall seconds of one forward pass per row, measured on a few rows after a warm-up."""
    few = material.rows(net, torch.arange(min(rows, material.num)))
    with torch.no_grad():
        net.hooks.run(few.call)
        start = time.monotonic()
        for _ in range(_TIMED):
            net.hooks.run(few.call)
    return (time.monotonic() - start) / _TIMED / few.num


@contextmanager
def fastest_threads(net: Net, material: Material) -> Iterator[None]:
    """Within, torch runs on one thread where that is faster: small networks, busy machines."""
    before = torch.get_num_threads()
    try:
        if before > 1:
            together = seconds_per_row(net, material, rows=16)
            torch.set_num_threads(1)
            if seconds_per_row(net, material, rows=16) > _WORTH * together:
                torch.set_num_threads(before)
        yield
    finally:
        torch.set_num_threads(before)


def affordable(
    net: Net, material: Material, budget: Budget, *, passes: int, share: float
) -> Material:
    """As many rows as let `passes` forward passes fit in a share of the budget (at least 8).

    Raises nothing: what does not fit is written down in `budget.left_out`.
    """
    each = seconds_per_row(net, material)
    num = max(8, int(budget.share(share) / passes / max(each, 1e-9)))
    if num >= material.num:
        return material
    budget.skip(
        f"{material.num - num} of {material.num} rows of {material.name}",
        f"one row takes {each * 1000:.1f} ms, and about {passes} passes were planned",
        "a larger --budget",
    )
    rows = torch.arange(material.num)
    if material.labels is not None:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randperm(material.num, generator=generator)[:num].sort().values
    return material.rows(net, rows[:num])
