"""Where programs are listed under their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from patchclamp.core.errors import OptionError
from patchclamp.truth.rasp.language import Expression, Value
from patchclamp.truth.rasp.planting import Draw, Program, draw_any

PROGRAMS: dict[str, Program] = {}
"""All programs by name, in the order in which they are written down."""


def program(
    vocab: Iterable[Value],
    length: int,
    *,
    causal: bool = False,
    last: bool = False,
    draw: Draw = draw_any,
) -> Callable[[Callable[[], Expression]], Callable[[], Expression]]:
    """List the decorated function as a program, under its name and the line it documents.

    Args:
        vocab, length, causal, last, draw: see `Program`.
    """

    def add(build: Callable[[], Expression]) -> Callable[[], Expression]:
        name = build.__name__
        if name in PROGRAMS or not build.__doc__:
            raise OptionError(f"program '{name}' is there already, or says nothing about itself")
        PROGRAMS[name] = Program(
            name=name,
            description=build.__doc__.splitlines()[0],
            build=build,
            vocab=tuple(vocab),
            length=length,
            causal=causal,
            last=last,
            draw=draw,
        )
        return build

    return add
