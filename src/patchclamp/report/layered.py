"""Drawings in rows: where nodes stand, and how lines get past what is between.

The usual steps of a layered drawing, each in its simplest form: rows by the longest
way from an input; an order within each row by the mean place of the neighbours
(barycentres), kept only if fewer lines cross; places along the row as near to the
neighbours as the order and the widths allow; and for a line over several rows, the
nearest gap in each. All of it is arithmetic on sorted lists: the same drawing every time.

Source: Sugiyama, Tagawa and Toda 1981.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

_SWEEPS = 6

Links = Sequence[tuple[str, str]]
"""Pairs of names: from the first to the second."""


def depths(names: Sequence[str], links: Links) -> dict[str, int]:
    """The longest way from an input, 0 for an input; a circle is opened at its first name."""
    feeds: dict[str, set[str]] = {name: set() for name in names}
    for source, target in links:
        if source != target:
            feeds[target].add(source)
    depth: dict[str, int] = {}
    left = list(names)
    while left:
        ready = [n for n in left if feeds[n] <= depth.keys()] or left[:1]
        for name in ready:
            depth[name] = 1 + max((depth[f] for f in feeds[name] if f in depth), default=-1)
        left = [n for n in left if n not in depth]
    return depth


def ordered(
    rows: Sequence[Sequence[str]], links: Links, free: Sequence[bool]
) -> tuple[tuple[str, ...], ...]:
    """The rows, those that are `free` re-ordered so that fewer lines cross; never more."""
    near = _neighbours(rows, links)
    best = now = tuple(tuple(row) for row in rows)
    fewest = crossings(best, links)
    for sweep in range(_SWEEPS):
        upward = range(len(now)) if sweep % 2 == 0 else reversed(range(len(now)))
        for i in upward:
            if free[i]:
                at = {name: c - (len(row) - 1) / 2 for row in now for c, name in enumerate(row)}
                means = {n: _mean([at[m] for m in near[n]], at[n]) for n in now[i]}
                now = (*now[:i], tuple(sorted(now[i], key=means.__getitem__)), *now[i + 1 :])
        num = crossings(now, links)
        if num < fewest:
            best, fewest = now, num
    return best


def crossings(rows: Sequence[Sequence[str]], links: Links) -> int:
    """How many pairs of lines between the same two rows cross."""
    place = {name: (r, c) for r, row in enumerate(rows) for c, name in enumerate(row)}
    between: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for source, target in links:
        (r, c), (s, d) = place[source], place[target]
        between.setdefault((r, s), []).append((c, d))
    total = 0
    for pairs in between.values():
        seen: list[int] = []
        last: list[int] = []  # ends of lines from the same place, which do not cross
        column = -1
        for c, d in sorted(pairs):
            if c != column:
                for end in last:
                    insort(seen, end)
                last, column = [], c
            total += len(seen) - bisect_right(seen, d)
            last.append(d)
    return total


def spread(
    rows: Sequence[Sequence[str]], widths: Mapping[str, float], links: Links, gap: float
) -> dict[str, float]:
    """Centres along the row, in the given order with at least `gap` between; least is 0."""
    near = _neighbours(rows, links)
    x: dict[str, float] = {}
    for row in rows:
        offsets = _offsets(row, widths, gap)
        x |= {n: o - offsets[-1] / 2 for n, o in zip(row, offsets, strict=True)}
    for sweep in range(2 * _SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            offsets = _offsets(row, widths, gap)
            wanted = [_mean([x[m] for m in near[n]], x[n]) for n in row]
            fitted = _rising([w - o for w, o in zip(wanted, offsets, strict=True)])
            x |= {n: f + o for n, f, o in zip(row, fitted, offsets, strict=True)}
    least = min((x[n] - widths[n] / 2 for n in x), default=0.0)
    return {n: round(place - least, 2) for n, place in x.items()}


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """What of a row is taken: spans in order, apart from each other."""

    taken: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, spans: Iterable[tuple[float, float]]) -> Gaps:
        """Spans that touch become one."""
        merged: list[tuple[float, float]] = []
        for low, high in sorted(spans):
            if merged and low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        return cls(taken=tuple(merged))

    def nearest(self, x: float) -> float:
        """The free place nearest to `x`."""
        for low, high in self.taken:
            if low < x < high:
                return low if x - low <= high - x else high
        return x


def _neighbours(rows: Sequence[Sequence[str]], links: Links) -> dict[str, list[str]]:
    near: dict[str, list[str]] = {name: [] for row in rows for name in row}
    for source, target in links:
        near[source].append(target)
        near[target].append(source)
    return near


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _offsets(row: Sequence[str], widths: Mapping[str, float], gap: float) -> list[float]:
    """Centres of a row that is packed as tightly as may be, the first at 0."""
    offsets = [0.0]
    for left, right in pairwise(row):
        offsets.append(offsets[-1] + (widths[left] + widths[right]) / 2 + gap)
    return offsets[: len(row)] or [0.0]


def _rising(values: Sequence[float]) -> list[float]:
    """The rising sequence nearest to the values: neighbours out of order are pooled."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [value for value, num in pools for _ in range(num)]
