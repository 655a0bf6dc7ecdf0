"""Bounds on the error of float64 arithmetic, known before the arithmetic is done.

Everything in this folder states facts over the reals. It computes in float64, so each
result is moved outwards by at least what rounding can have changed. Two tools suffice.
A single operation is rounded to nearest, so that the next float in either direction
bounds its exact result (`down`, `up`). A product of vectors of length n, added up in any
order, with or without fused operations, differs from the exact one by at most
gamma(n) * |a| @ |b| (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.4).

Assumed: IEEE 754 double precision, rounding to nearest, gradual underflow (what numpy
does by itself), and exp and tanh accurate to `LIBRARY` of their value (64 units in the
last place; the libraries in use promise less than 4).

Underflow: a product that underflows is wrong by at most 2^-1074 whatever its size. With
values below `LARGEST` and fewer than 10^12 products in a bound, all of these together
stay below `UNDERFLOW`, which is taken off each bound once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from patchclamp.core.errors import EngineError

Numbers = NDArray[np.float64]

LARGEST = 1e100
"""Values beyond this are not bounded at all: the bound is given up, so nothing overflows."""

UNDERFLOW = 1e-150
"""More than all underflows of one bound can add up to."""

LIBRARY = 2.0**-46
"""Relative error that exp and tanh of the library may have."""

SLACK = 1.0 + 2.0**-20
"""Pays for the rounding of an error bound itself, which is a sum of fewer than 2^30 terms."""


def require_exact_arithmetic() -> None:
    """Raises EngineError where numbers are flushed to 0 or not rounded to nearest.

    Other libraries in the same process can switch the processor to such modes.
    """
    small, one = np.array([2.0**-1074, 2.0**-1022]), np.ones(1)
    kept = small * np.array([1.0, 0.5]) > 0
    to_nearest = (one + 2.0**-53 == one) & (one + 0.75 * 2.0**-52 > one) & (-one - 2.0**-53 == -one)
    if not (kept.all() and to_nearest.all()):
        raise EngineError(
            "float64 arithmetic is not IEEE 754 with gradual underflow in this process",
            hint="do not switch on the flushing of denormal numbers",
        )


def gamma(length: int) -> float:
    """Relative error of a product of vectors of this length: more than twice Higham's gamma.

    The factor of two and the 8 pay for a few more roundings on the way, such as the sum of
    the product and a bias.
    """
    return (length + 8) * 2.0**-52


def down(x: Numbers) -> Numbers:
    """A float below every real number that rounds to x."""
    return np.asarray(np.nextafter(x, -np.inf), np.float64)


def up(x: Numbers) -> Numbers:
    """A float above every real number that rounds to x."""
    return np.asarray(np.nextafter(x, np.inf), np.float64)
