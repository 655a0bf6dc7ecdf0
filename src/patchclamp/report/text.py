"""Text and numbers as the page shows them.

Whatever a network, a dataset or a file name put into a string is shown, never
obeyed: control characters, direction overrides and invisible characters become
visible symbols. `page.js` holds the same rules for the rows that it draws
(`HIDDEN`, `number`, `share` there); tests/ui compares the two.
"""

from __future__ import annotations

import re
from decimal import ROUND_HALF_UP, Decimal

from markupsafe import Markup, escape

# Control characters, soft hyphen, direction marks and overrides, zero-width spaces,
# lone surrogates, byte-order marks, noncharacters and invisible tags. The joiners
# U+200C and U+200D stay: scripts and emoji need them.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Text with every hidden character, line breaks included, as a symbol."""
    return _HIDDEN.sub(lambda match: _symbol(match[0]), text)


def prose(text: str) -> str:
    """As `visible`, but line breaks and tabs stay what they are."""
    return _HIDDEN.sub(lambda match: match[0] if match[0] in "\n\t" else _symbol(match[0]), text)


def shown(text: str) -> Markup:
    """`visible` text, escaped for HTML."""
    return escape(visible(text))


def _symbol(character: str) -> str:
    # By number, not as a control picture such as U+2400: many fonts lack those.
    return f"\u27e8U+{ord(character):04X}\u27e9"


def number(value: float | None) -> str:
    """Four significant digits, thousands grouped: 0.9472, 12.3, 4,861,440, 1.2e−5."""
    if value is None:
        return "\u2013"
    exact = abs(Decimal(value))
    if exact == 0:
        return "0"
    sign = "\u2212" if value < 0 else ""
    # Beyond 2**53 JavaScript does not hold every whole number.
    if exact < 2**53 and exact == exact.to_integral_value():
        return f"{sign}{int(exact):,}"
    exponent = exact.adjusted()
    if -4 <= exponent < 6:
        rounded = _round(exact, max(0, 3 - exponent))
        return sign + _stripped(f"{rounded:,f}")
    mantissa = _round(exact.scaleb(-exponent), 2)
    if mantissa == 10:  # 9.996 rounds up into the next power
        mantissa, exponent = Decimal(1), exponent + 1
    power = f"e+{exponent}" if exponent >= 0 else f"e\u2212{-exponent}"
    return sign + _stripped(f"{mantissa:f}") + power


def share(value: float) -> str:
    """A share of one as a percentage that never rounds to none or all: 94.7%, <0.1%."""
    percent = Decimal(min(max(value, 0.0), 1.0) * 100.0)
    if 0 < percent < Decimal("0.1"):
        return "<0.1%"
    if Decimal("99.9") < percent < 100:
        return ">99.9%"
    return _stripped(f"{_round(percent, 1):f}") + "%"


def _round(value: Decimal, digits: int) -> Decimal:
    """Half up, as JavaScript's toFixed rounds, so that a page agrees with itself."""
    return value.quantize(Decimal(1).scaleb(-digits), rounding=ROUND_HALF_UP)


def _stripped(digits: str) -> str:
    return digits.rstrip("0").rstrip(".") if "." in digits else digits
