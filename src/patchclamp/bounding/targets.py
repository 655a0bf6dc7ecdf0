"""What is perturbed, edited or restricted in a request: names resolved to parts of values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.bounding.edits import part
from patchclamp.bounding.lowering import Rewrite, behind
from patchclamp.bounding.sets import Around, Box, PerturbedSet, Shaped
from patchclamp.core.errors import BoundError
from patchclamp.core.sites import WHOLE, Site, Tap
from patchclamp.engine.axes import name_axes
from patchclamp.engine.ir import Node
from patchclamp.model.inputs import Call
from patchclamp.rules.base import Interval
from patchclamp.rules.operators.builder import Builder, Operand, shape_of
from patchclamp.rules.operators.parts import replaced
from patchclamp.rules.value import Value

Spec = PerturbedSet | Around | float
"""What one perturbed value may be; a number means within that distance of its value."""
Perturbed = Spec | Mapping[str, Spec]
Limits = Sequence[object] | Interval
"""Lower and upper limits of a hidden value: numbers or tensors that broadcast to one example."""

INPUT = "input"


@dataclass(eq=False)
class Target:
    """Something perturbed.

    Attributes:
        name: as the user wrote it.
        tap: how the site is seen; None for a parameter.
        nodes: of the graph; several where a parameter is shared.
        spec: what it may be.
        number: of the input tensor that it is, if it is one.
        centre, index: its value where the network was lowered; which of its elements move.
    """

    name: str
    tap: Tap
    nodes: list[Node]
    spec: Around | PerturbedSet
    number: int | None = None
    centre: Tensor | None = None
    index: Tensor | None = None
    leaf: Value | None = None

    def rewrite(self, b: Builder, x: Operand) -> Operand:
        """The value with its part perturbed."""
        if not isinstance(x, Tensor):
            raise behind(self.name)
        if not x.is_floating_point():
            raise BoundError(
                f"'{self.name}' holds whole numbers and cannot move by a little",
                got=str(x.dtype).removeprefix("torch."),
                hint="perturb the embeddings that they choose",
            )
        where = self.spec.where if isinstance(self.spec, Around) else {}
        self.index = part(self.tap, shape_of(x), where)[0]
        self.centre = x.flatten()[self.index]
        if self.leaf is None:
            self.leaf = b.leaf(tuple(self.index.shape), self.name)
        return replaced(b, x, self.index, self.leaf)

    def set(self, examples: Examples) -> PerturbedSet:
        """What it may be in these examples, in the shape that it was lowered with."""
        if self.centre is None or self.index is None or self.leaf is None:
            raise BoundError(f"the output does not depend on '{self.name}'")
        if isinstance(self.spec, Around):
            if examples.num == 1 or self.number is None:
                return self.spec.at(self.centre[None].to(examples.dtype))
            inputs = [examples.input(i, self.number) for i in range(examples.num)]
            centres = torch.stack([x.flatten()[self.index] for x in inputs])
            return self.spec.at(centres.to(examples.dtype))
        given = self.spec.to(examples.dtype)
        found, shape = tuple(given.hull().lower.shape), self.leaf.shape
        fits = [n for n in found[1:] if n != 1] == [n for n in shape if n != 1]
        if found[0] not in (1, examples.total) or not fits:
            raise BoundError(
                f"the set for '{self.name}' has the wrong shape",
                got=str(found),
                expected=f"({examples.total} or 1, {', '.join(map(str, shape))}) "
                "with or without axes of size 1",
            )
        if found[0] > 1 and examples.num == 1:
            given = given.example(examples.first)
        if isinstance(given, Box):  # seen as a box, for which more is exact
            return given.mapped(lambda x: x.reshape(-1, *shape))
        return Shaped(given, shape)


@dataclass(frozen=True, eq=False)
class Examples:
    """Those that are bounded side by side: `num` of a call's `total`, from `first` on."""

    call: Call
    dims: Sequence[tuple[int | str, ...]]
    total: int
    first: int
    num: int
    dtype: torch.dtype

    @property
    def slice(self) -> slice:
        """Where they are in the batch."""
        return slice(self.first, self.first + self.num)

    def input(self, example: int, number: int) -> Tensor:
        """An input tensor of one of them."""
        at = self.first + example
        return self.call.rows(slice(at, at + 1), self.dims).tensors()[number]


def as_spec(name: str, spec: object) -> Around | PerturbedSet:
    if isinstance(spec, (Around, PerturbedSet)):
        return spec
    if isinstance(spec, (int, float)) and not isinstance(spec, bool):
        return Around(float(spec))
    raise BoundError(
        f"'{name}' is perturbed by a set, or by a number for all within that distance",
        got=type(spec).__name__,
        hint="patchclamp.bounding.sets has Box, Ball, Patches, HalfSpaces, Substitutions, Around",
    )


def plain_tap(name: str, shape: Sequence[int | str]) -> Tap:
    """A value that is no site, seen whole."""
    axes = tuple(s if isinstance(s, str) else f"axis{i}" for i, s in enumerate(shape))
    site = Site(
        address=name,
        module="",
        operation="",
        axes=axes if name == INPUT or not shape else name_axes(tuple(shape)),
        shape=tuple(shape),
        dtype="",
    )
    return whole(site)


def whole(site: Site) -> Tap:
    return Tap(label=site.address, site=site, view=WHOLE, axes=site.axes, shape=site.shape)


def restricting(tap: Tap, limits: Limits, seen: list[Value], examples: Examples) -> Rewrite:
    """Keep a hidden value between limits: what is bounded is only where it lies there."""

    def rewrite(b: Builder, x: Operand) -> Operand:
        if not isinstance(x, Value):
            raise BoundError(f"'{tap.label}' depends on nothing perturbed and needs no restriction")
        index = part(tap, x.shape, {})[0]
        sides = []
        for side, start in zip(limits, (-torch.inf, torch.inf), strict=True):
            given = torch.as_tensor(side, dtype=b.dtype)
            if given.ndim == index.ndim and examples.total > 1 and len(given) == examples.total:
                given = given[examples.slice].reshape(-1, *index.shape)
            else:
                given = given.expand(index.shape)[None]
            full = torch.full((given.shape[0], *x.shape), start, dtype=b.dtype)
            full.flatten(1)[:, index.flatten()] = given.flatten(1)
            sides.append(full)
        known = Interval(*sides)
        if bool((known.lower > known.upper).any()):
            raise BoundError(f"the restriction of '{tap.label}' is empty")
        x.known = known if x.known is None else known.within(x.known)
        seen.append(x)
        return x

    return rewrite
