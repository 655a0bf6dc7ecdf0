"""From values to places on an axis, in percent of its width, with round ticks.

Charts are drawn with coordinates in percent, so that a chart follows the width
of the screen while its text and strokes keep their size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A linear axis from `low` to `high`, with `low` < `high`."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Iterable[float], *, pad: float = 0.0) -> Scale:
        """The axis that holds all values, with a share `pad` of its length to spare."""
        found = list(values) or [0.0]
        low, high = min(found), max(found)
        if not low < high:
            spare = abs(low) / 2 or 0.5
        else:
            spare = (high - low) * pad
        largest = sys.float_info.max
        return cls(low=max(low - spare, -largest), high=min(high + spare, largest))

    def percent(self, value: float) -> float:
        """Where `value` lies: 0 at `low`, 100 at `high`, clipped to the axis."""
        # Halves, so that an axis over the whole range of floats does not overflow.
        length = self.high / 2 - self.low / 2
        place = (value / 2 - self.low / 2) / length if length > 0 else 0.5
        return 100 * min(max(place, 0.0), 1.0)

    def holds(self, value: float) -> bool:
        """Whether `value` lies on the axis."""
        return self.low <= value <= self.high

    def ticks(self, num: int) -> list[float]:
        """About `num` round values on the axis, evenly spaced by 1, 2 or 5 times a power of 10."""
        length = self.high - self.low
        if not math.isfinite(length) or length < 1e-300:
            return [self.low, self.high]
        rough = length / num
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.7)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        if last - first > 4 * num:  # the axis is too short for the precision of floats
            return [self.low, self.high]
        # Rounded to the step, so that 3 * 0.1 is shown as 0.3.
        digits = max(0, 1 - math.floor(math.log10(step)))
        return [round(i * step, digits) for i in range(first, last + 1)]
