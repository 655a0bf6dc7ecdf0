"""Values of options that need more than a type: durations, counts, choices."""

from __future__ import annotations

import math
import re

from patchclamp.core.errors import OptionError

_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(
    r"(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s?)?", re.ASCII
)


def duration(option: str, text: str) -> float:
    """Seconds of `90`, `90s`, `2m`, `1.5m` or `1h30m`.

    Raises: OptionError if it is something else, or not more than nothing.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    parts = {unit: float(n) for unit, n in match.groupdict().items() if n} if match else {}
    seconds = sum(_SECONDS[unit] * n for unit, n in parts.items())
    if not parts or not math.isfinite(seconds) or seconds <= 0:
        raise OptionError(
            f"{option} is not a time to spend",
            got=repr(text),
            expected="more than nothing, such as 90s, 2m, 1h30m, or plain seconds",
        )
    return seconds


def at_least(option: str, value: int, least: int) -> int:
    """`value`. Raises: OptionError if it is smaller than `least`."""
    if value < least:
        raise OptionError(f"{option} must be at least {least}", got=str(value))
    return value
