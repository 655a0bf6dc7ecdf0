"""The cells of a sweep as runs of a wavefront, and the metric read off their output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from patchclamp.core.errors import OptionError, TargetError
from patchclamp.engine.cells import Cell
from patchclamp.engine.few_classes import FewClasses, few_classes
from patchclamp.engine.graph import GraphEngine
from patchclamp.engine.targets import Metric, measured, measured_there
from patchclamp.engine.wavefront import Wavefront

Variants: TypeAlias = "Callable[[Sequence[Cell], torch.Tensor, int], torch.Tensor]"

_RUN_ROWS = 1500
"""Rows (cells x examples x positions) of one run: more no longer makes products faster, and
what lies between them no longer fits into the caches."""


@dataclass(frozen=True)
class Reading:
    """Where the metric is read off: the output, or what its last projection is applied to."""

    wave: Wavefront
    metric: Metric
    few: FewClasses | None
    position: int | None

    @staticmethod
    def of(engine: GraphEngine, wave: Wavefront, metric: Metric) -> Reading:
        few = few_classes(engine, metric)
        at = metric.position if wave.has_rows(None if few is None else few.address) else None
        return Reading(wave, metric, few, at)

    @property
    def address(self) -> str | None:
        return None if self.few is None else self.few.address

    def whole(self, raw: torch.Tensor) -> torch.Tensor:
        """The metric of a value that holds all positions."""
        if self.position is not None:
            raw = self.wave.at_position(raw, self.address, self.position)
        return self.there(raw)

    def there(self, raw: torch.Tensor) -> torch.Tensor:
        """The metric of a value that holds the wanted position only, where there is one."""
        output = raw if self.few is None else self.few.logits(raw)
        rows = torch.arange(self.wave.num_examples).repeat(len(output) // self.wave.num_examples)
        measure = measured if self.position is None else measured_there
        return measure(self.metric, output, rows)


class Runs:
    """Runs of one wavefront, kept within the memory.

    Args:
        variants: from cells of one site, its raw value and its batch axis to the edited values.
        memory: most bytes that the variants of one run hold.
    """

    def __init__(
        self,
        wave: Wavefront,
        addresses: Sequence[str],
        reading: Reading,
        variants: Variants,
        memory: int,
    ) -> None:
        self.wave, self.addresses, self.reading = wave, addresses, reading
        self.variants, self.memory = variants, memory
        self.num, self.max_bytes = 0, 0
        self._each: dict[int, int] = {}

    def _bytes(self, first: int) -> int:
        if first not in self._each:
            self._each[first] = self.wave.bytes_per_variant(
                self.addresses,
                output=self.reading.address,
                first_row=first,
                position=self.reading.position,
            )
        return self._each[first]

    def chunks(self, live: Sequence[int], firsts: Sequence[int | None]) -> Iterator[Sequence[int]]:
        """The cells, from the first site to the last, in pieces that fit into the memory."""
        if not live:
            return
        starts = [firsts[i] or 0 for i in live]
        each = self._bytes(min(starts))
        size = self.memory // each
        if size < 1:
            raise OptionError(
                "one variant takes more than the memory that the sweep may use",
                got=f"{self.memory:,} bytes",
                expected=f"at least {each:,}",
                hint="give fewer examples, or memory='4GB'",
            )
        length = max(1, self.wave.length)
        rows = self.wave.num_examples * sum(length - start for start in starts)
        num = max(math.ceil(len(live) / size), round(rows / _RUN_ROWS), 1)
        width = math.ceil(len(live) / num)
        for start in range(0, len(live), width):
            yield live[start : start + width]

    def run(self, cells: Sequence[Cell], firsts: Sequence[int]) -> torch.Tensor:
        """The metric of these cells (cell, example), which come in the order of their sites."""
        by_site: dict[str, list[int]] = {address: [] for address in self.addresses}
        for k, cell in enumerate(cells):
            by_site[cell.tap.site.address].append(k)
        output = self.wave.run(
            {a: self._variants(a, [cells[k] for k in ks]) for a, ks in by_site.items()},
            output=self.reading.address,
            first_row={a: [firsts[k] for k in ks] for a, ks in by_site.items()},
            position=self.reading.position,
        )
        self.num += 1
        self.max_bytes = max(self.max_bytes, len(cells) * self._bytes(min(firsts)))
        return self.reading.there(output).reshape(len(cells), self.wave.num_examples)

    def _variants(
        self, address: str, cells: Sequence[Cell]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        axis = self.wave.batch_axis(address)
        return lambda raw: self.variants(cells, raw, axis)


def normalised(values: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    """(value - corrupt) / (clean - corrupt), for each example."""
    gap = right - wrong
    if bool((gap == 0).any()):
        example = int((gap == 0).nonzero()[0])
        raise TargetError(
            "the metric is the same on clean and corrupt inputs, so it cannot be normalised",
            got=f"{float(right[example]):.6g} for both"
            + (f" in example {example}" if gap.numel() > 1 else ""),
            hint="check that the network does the task, or leave normalise out",
        )
    return (values - wrong) / gap
