"""Properties in the VNN-LIB format, the form in which VNN-COMP states what is to be proved.

A file declares input and output variables and asserts formulas over them: linear
inequalities under any nesting of `and` and `or`. What satisfies all of them is a
counterexample. Read are version 1 (`declare-const X_0 Real`) and, of version 2.0, queries
about one network with one input and one output (`declare-network`, `X[0,3]`).

The numbers of a file are decimals and a Property holds float64. Everything is computed in
exact fractions and rounded once, at the end and outward: the set of counterexamples of the
Property contains that of the file, so that a Property that is proved over the reals holds
for the file too. For the same reason `<` and `>` are read as `<=` and `>=`: the closed set
contains the open one. The price is on the other side: a counterexample that meets a strict
inequality with equality, or lies in the last ulp of a bound, is one of the Property but not
of the file.

Source: SMT-LIB 2.6 for version 1; VNNLIB/VNNLIB-Standard (grammar) for version 2.0.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from patchclamp.core.errors import PropertyError
from patchclamp.methods.bounds.property import Property
from patchclamp.methods.bounds.vnnlib.cases import build
from patchclamp.methods.bounds.vnnlib.grammar import read

MAX_BYTES = 1 << 28
"""The longest text that is read, after unpacking: 256 MiB."""

GZIP = b"\x1f\x8b"


def read_property(path: Path | str) -> Property:
    """The property in a `.vnnlib` or `.vnnlib.gz` file.

    Cost: linear in the file; about 1 s for 100,000 inequalities.
    Raises: PropertyError if the file cannot be read, is malformed (with line and column), or
        says something that cannot be verified, such as products of variables, inequalities
        between inputs and outputs, or an input without bounds.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == GZIP
        with gzip.open(path) if zipped else path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise PropertyError(f"'{path}' is not a gzip file, or was cut short: {e}") from e
    except OSError as e:
        raise PropertyError(f"property '{path}' cannot be read: {e.strerror or e}") from e
    if len(raw) > MAX_BYTES:
        raise PropertyError(f"property '{path}' is longer than {MAX_BYTES:,} bytes")
    # What is no UTF-8 can only stand in comments; elsewhere it is no word of the language.
    return parse_property(raw.decode("utf-8-sig", errors="replace"), str(path))


def parse_property(text: str, name: str = "property") -> Property:
    """The property that a text states; errors name it `name`. Raises: as read_property."""
    return build(read(text, name))


__all__ = ["parse_property", "read_property"]
