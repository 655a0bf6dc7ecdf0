"""Rows of many variants in one row axis, each variant with only the rows that its edit reaches.

Variants of one wave may be edited at different positions. An operator that treats every
row for itself does not care whose rows it gets, so the rows that each variant needs lie
one after the other along the row axis of a batch of one: a single large product in place
of one for every first position. Only operators that mix rows need the variants apart
again; `unpacked` and `packed` go to and fro.

Packed rows are ordered by variant, then example, then position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from patchclamp.engine.wave_rows import Axes, Rows, narrow_rows


class Packing:
    """Where the rows of so many variants lie.

    Args:
        firsts: for every variant, the first position that it holds.
    """

    def __init__(
        self, firsts: Sequence[int], num_examples: int, length: int, device: torch.device
    ) -> None:
        self.num_examples, self.length = num_examples, length
        self.last_first = max(firsts)
        held = torch.arange(length) >= torch.tensor(firsts)[:, None]  # (variant, position)
        at = held[:, None].expand(-1, num_examples, -1).nonzero()
        self._variant, self._example, self._position = at.to(device).unbind(1)
        sizes = (length - torch.tensor(firsts)) * num_examples
        self._ends = [0, *sizes.cumsum(0).tolist()]
        self._places: dict[tuple[Rows, int], tuple[torch.Tensor, torch.Tensor | None]] = {}

    def num_rows(self, num_variants: int) -> int:
        """Packed rows of the first variants."""
        return int(self._ends[num_variants])

    def of_base(self, base: torch.Tensor, axes: Axes, start: int, stop: int) -> torch.Tensor:
        """The baseline's rows as variants `start` to `stop` hold them."""
        if axes.row is None:
            return base
        part = slice(self._ends[start], self._ends[stop])
        position = self._position[part]
        if axes.batch is None:
            return base.index_select(axes.row, position)
        if not axes.merged and base.shape[axes.batch] == 1:
            return base.index_select(axes.row, position)
        place = self._example[part] * self.length + position
        return spread_rows(flat_rows(base, axes).index_select(0, place), axes)

    def packed(
        self, value: torch.Tensor, axes: Axes, have: Rows, num_variants: int
    ) -> torch.Tensor:
        """Rows of a plain batch of so many variants, put together."""
        place, _ = self._place(have, num_variants)
        return spread_rows(flat_rows(value, axes).index_select(0, place), axes)

    def packed_part(
        self, value: torch.Tensor, axes: Axes, have: Rows, start: int, stop: int
    ) -> torch.Tensor:
        """As `packed`, of a batch that holds the variants from `start` to `stop`."""
        place, _ = self._place(have, stop)
        part = place[self._ends[start] :] - start * self.num_examples * have.size
        return spread_rows(flat_rows(value, axes).index_select(0, part), axes)

    def unpacked(
        self,
        value: torch.Tensor,
        base: torch.Tensor | None,
        axes: Axes,
        want: Rows,
        num_variants: int,
    ) -> torch.Tensor:
        """The wanted rows of so many variants as a plain batch, filled up from the baseline."""
        assert axes.row is not None
        place, chosen = self._place(want, num_variants)
        rows = flat_rows(value, axes)
        if chosen is not None:
            rows = rows.index_select(0, chosen)
        if self.last_first > want.start:
            assert base is not None
            part = narrow_rows(base, axes, Rows(0, self.length), want)
            front = flat_rows(part, axes)
            num = num_variants * self.num_examples * want.size
            whole = front.repeat(num // front.shape[0], *[1] * (front.ndim - 1))
            rows = whole.index_copy_(0, place, rows)
        return unspread_rows(rows, axes, want.size)

    def _place(self, rows: Rows, num_variants: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where packed rows lie in a batch with these rows, and which of them do (None: all)."""
        key = (rows, num_variants)
        if key not in self._places:
            stop = self._ends[num_variants]
            position = self._position[:stop]
            example = self._variant[:stop] * self.num_examples + self._example[:stop]
            place = example * rows.size + position - rows.start
            inside = (position >= rows.start) & (position < rows.stop)
            if bool(inside.all()):
                self._places[key] = place, None
            else:
                self._places[key] = place[inside], inside.nonzero()[:, 0]
        return self._places[key]


def flat_rows(x: torch.Tensor, axes: Axes) -> torch.Tensor:
    """(example and row, ...)."""
    assert axes.row is not None
    assert axes.batch is not None
    if axes.merged:
        return x.movedim(axes.row, 0)
    return x.movedim((axes.batch, axes.row), (0, 1)).flatten(0, 1)


def spread_rows(flat: torch.Tensor, axes: Axes) -> torch.Tensor:
    """Rows of `flat_rows` as a packed value: a batch of one with so many rows."""
    assert axes.row is not None
    assert axes.batch is not None
    if axes.merged:
        return flat.movedim(0, axes.row)
    return flat.unsqueeze(0).movedim((0, 1), (axes.batch, axes.row))


def unspread_rows(flat: torch.Tensor, axes: Axes, num_rows: int) -> torch.Tensor:
    """(example and row, ...) as a plain batch with so many rows each."""
    assert axes.row is not None
    assert axes.batch is not None
    if axes.merged:
        return flat.movedim(0, axes.row)
    apart: torch.Tensor = flat.unflatten(0, (-1, num_rows))
    return apart.movedim((0, 1), (axes.batch, axes.row))


def join_packed(parts: Sequence[torch.Tensor], axes: Axes) -> torch.Tensor:
    """Packed rows of one variant after another."""
    assert axes.row is not None
    return torch.cat(list(parts), axes.row) if len(parts) > 1 else parts[0]
