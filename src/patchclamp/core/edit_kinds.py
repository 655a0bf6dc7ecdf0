"""The kinds of edit, their dictionary form and short constructors.

`zero, mean, resample, patch, clamp, steer, scale, noise` are data; `callback`
is a function and cannot be written down. Each kind is one class whose fields
are its options; `KINDS` is the register that dictionaries are read through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, TypeAlias

import numpy as np
import torch

from patchclamp.core.edits import (
    Chosen,
    Edit,
    Frame,
    Index,
    Labelled,
    axis_of,
    fit,
    indices,
    labelled,
)
from patchclamp.core.errors import EditError, nearest
from patchclamp.core.findings import Json

Values: TypeAlias = "object"
"""A number, nested list, numpy array, tensor or labelled xarray array; see `edits.fit`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Zero(Edit):
    """Set to zero (zero ablation)."""

    kind: ClassVar[str] = "zero"

    def new(self, part: torch.Tensor, frame: Frame, chosen: Chosen) -> torch.Tensor:
        return torch.zeros_like(part)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mean(Edit):
    """Set to a mean (mean ablation).

    Attributes:
        values: reference activations with all axes of the site; None takes the batch itself.
        over: axes that the mean runs over; ("example",) keeps positions apart.
    """

    kind: ClassVar[str] = "mean"
    values: Values | None = None
    over: Sequence[str] = ("example",)

    def new(self, part: torch.Tensor, frame: Frame, chosen: Chosen) -> torch.Tensor:
        axes = [axis_of(name, frame) for name in self.over]
        if not (part.is_floating_point() or part.is_complex()):
            raise EditError(
                f"site '{frame.label}' holds whole numbers, which have no mean of their own type",
                got=str(part.dtype).removeprefix("torch."),
                hint="use zero, patch, clamp or resample",
            )
        if self.values is None:
            return part.mean(axes, keepdim=True)
        reference = _reference(self.values, part, frame)
        return fit(reference.mean(axes, keepdim=True), part, frame, chosen)


@dataclass(frozen=True, kw_only=True, eq=False)
class Resample(Edit):
    """Replace each example's value by that of another example (resample ablation).

    Attributes:
        values: reference activations to draw from; None draws from the batch itself,
            never an example's own.
        seed: of the draw.
    """

    kind: ClassVar[str] = "resample"
    values: Values | None = None
    seed: int = 0

    def new(self, part: torch.Tensor, frame: Frame, chosen: Chosen) -> torch.Tensor:
        axis = axis_of("example", frame)
        generator = torch.Generator().manual_seed(self.seed)
        num = part.shape[axis]
        if self.values is not None:
            reference = _reference(self.values, part, frame)
            drawn = torch.randint(reference.shape[axis], (num,), generator=generator)
            return fit(reference.index_select(axis, drawn.to(part.device)), part, frame, chosen)
        if num < 2:
            raise EditError(
                f"resampling '{frame.label}' within a batch needs two examples",
                got=f"{num}",
                hint="give reference activations as values=",
            )
        order = torch.randperm(num, generator=generator)
        source = torch.empty_like(order)
        source[order] = order.roll(1)  # one cycle: nobody keeps its own value
        return part.index_select(axis, source.to(part.device))


@dataclass(frozen=True, kw_only=True, eq=False)
class Patch(Edit):
    """Replace by activations from another run (activation patching)."""

    kind: ClassVar[str] = "patch"
    values: Values = None

    def new(self, part: torch.Tensor, frame: Frame, chosen: Chosen) -> torch.Tensor:
        return fit(_required(self.values, "values", self), part, frame, chosen)


@dataclass(frozen=True, kw_only=True, eq=False)
class Clamp(Edit):
    """Hold at a value, or keep within limits.

    Attributes:
        value: held exactly; or
        low, high: the value is kept between them (one or both).
    """

    kind: ClassVar[str] = "clamp"
    value: Values | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.low is None and self.high is None):
            raise EditError(
                f"clamp on '{self.site}' needs a value, or limits, and not both",
                hint="clamp(site, 3.0) or clamp(site, low=0, high=1)",
            )

    def new(self, part: torch.Tensor, frame: Frame, chosen: Chosen) -> torch.Tensor:
        if self.value is None:
            return part.clamp(self.low, self.high)
        return fit(self.value, part, frame, chosen)


@dataclass(frozen=True, kw_only=True, eq=False)
class Steer(Edit):
    """Add a direction times a coefficient (activation addition)."""

    kind: ClassVar[str] = "steer"
    direction: Values = None
    coefficient: float = 1.0

    def new(self, part: torch.Tensor, frame: Frame, chosen: Chosen) -> torch.Tensor:
        direction = _required(self.direction, "direction", self)
        return part + self.coefficient * fit(direction, part, frame, chosen)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale(Edit):
    """Multiply by a factor; 1.0 is the identity, bit for bit."""

    kind: ClassVar[str] = "scale"
    factor: Values = 1.0

    def new(self, part: torch.Tensor, frame: Frame, chosen: Chosen) -> torch.Tensor:
        return part * fit(self.factor, part, frame, chosen)


@dataclass(frozen=True, kw_only=True, eq=False)
class Noise(Edit):
    """Add Gaussian noise of a standard deviation, in the units of the site.

    Attributes:
        std: standard deviation.
        seed: the same seed adds the same noise to the same shape.
    """

    kind: ClassVar[str] = "noise"
    std: float = 1.0
    seed: int = 0

    def new(self, part: torch.Tensor, frame: Frame, chosen: Chosen) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(part.shape, generator=generator, dtype=torch.float32)
        return part + self.std * drawn.to(part)


@dataclass(frozen=True, kw_only=True, eq=False)
class Callback(Edit):
    """Apply a function of your own. It cannot be stored or run again from its record.

    Attributes:
        function: gets the chosen part and returns a tensor of the same shape.
    """

    kind: ClassVar[str] = "callback"
    function: Callable[[torch.Tensor], torch.Tensor] | None = None

    def new(self, part: torch.Tensor, frame: Frame, chosen: Chosen) -> torch.Tensor:
        if self.function is None:
            raise EditError(f"callback on '{self.site}' has no function")
        made = self.function(part.clone())  # it may work in place
        if not isinstance(made, torch.Tensor) or made.shape != part.shape:
            got = tuple(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
            raise EditError(
                f"the callback on '{frame.label}' must return a tensor of the shape it got",
                got=str(got),
                expected=str(tuple(part.shape)),
            )
        return made

    def to_dict(self) -> dict[str, Json]:
        """A note that a function was here; `edit_from_dict` refuses it."""
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return {"kind": "callback", "site": self.site, "function": name, "replayable": False}


KINDS: dict[str, type[Edit]] = {
    cls.kind: cls for cls in (Zero, Mean, Resample, Patch, Clamp, Steer, Scale, Noise, Callback)
}


def _required(given: Values | None, name: str, edit: Edit) -> Values:
    if given is None:
        raise EditError(f"{edit.kind} on '{edit.site}' needs {name}=")
    return given


def _reference(given: Values, part: torch.Tensor, frame: Frame) -> torch.Tensor:
    """Reference activations as a tensor with all axes of the site, batch of any size."""
    data = labelled(given, frame) if hasattr(given, "dims") else given
    tensor = torch.as_tensor(data, device=part.device).to(part.dtype)
    if tensor.ndim != part.ndim:
        raise EditError(
            f"reference activations for '{frame.label}' need all its axes",
            got=f"shape {tuple(tensor.shape)}",
            expected=f"axes ({', '.join(frame.axes)})",
        )
    return tensor


def edit_from_dict(data: Mapping[str, object]) -> Edit:
    """Build an edit from plain data: `{"kind": "zero", "site": "mlp.3.post", "where": {...}}`.

    Raises:
        EditError: unknown kind or option, or a callback.
    """
    options = dict(data)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise EditError(
            f"unknown kind of edit '{kind}'",
            expected=f"one of {', '.join(KINDS)}",
            nearest=nearest(str(kind), KINDS),
        )
    if kind == "callback":
        raise EditError("a callback cannot be read back from data", hint="pass the function again")
    cls = KINDS[kind]
    known = {f.name for f in fields(cls)}
    for name in options:
        if name not in known:
            raise EditError(
                f"edit '{kind}' has no option '{name}'",
                expected=f"among {', '.join(sorted(known))}",
                nearest=nearest(name, known),
            )
    if "site" not in options:
        raise EditError(f"edit '{kind}' names no site")
    where = options.get("where", {})
    if not isinstance(where, Mapping):
        raise EditError("where= must map axes to indices", got=type(where).__name__)
    options["where"] = {str(axis): _index(index) for axis, index in where.items()}
    for name, value in options.items():
        if name != "where" and isinstance(value, Mapping) and {"dims", "values"} == set(value):
            options[name] = Labelled(tuple(value["dims"]), np.asarray(value["values"]))
    return cls(**options)  # type: ignore[arg-type]  # the option names were checked above


def _index(given: object) -> Index:
    if isinstance(given, Mapping):
        return slice(given.get("start"), given.get("stop"), given.get("step"))
    if isinstance(given, slice):
        return given
    listed = indices(given)
    return listed[0] if isinstance(given, int) else listed


def as_edits(given: object) -> list[Edit]:
    """Edits in any accepted form: one, a sequence, plain dictionaries, mixed."""
    if isinstance(given, Edit):
        return [given]
    if isinstance(given, Mapping):
        return [edit_from_dict(given)]
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [edit for item in given for edit in as_edits(item)]
    raise EditError("edits are Edit objects or dictionaries", got=type(given).__name__)


def zero(site: str, **where: Index) -> Zero:
    """Zero ablation: `zero("mlp.3.post", unit=[5, 6], position=-1)`."""
    return Zero(site=site, where=where)


def mean(
    site: str, values: Values | None = None, *, over: Sequence[str] = ("example",), **where: Index
) -> Mean:
    """Mean ablation; see `Mean`."""
    return Mean(site=site, values=values, over=tuple(over), where=where)


def resample(site: str, values: Values | None = None, *, seed: int = 0, **where: Index) -> Resample:
    """Resample ablation; see `Resample`."""
    return Resample(site=site, values=values, seed=seed, where=where)


def patch(site: str, values: Values, **where: Index) -> Patch:
    """Activation patching: `patch("resid_post.5", acts["resid_post.5"], position=3)`."""
    return Patch(site=site, values=values, where=where)


def clamp(
    site: str,
    value: Values | None = None,
    *,
    low: float | None = None,
    high: float | None = None,
    **where: Index,
) -> Clamp:
    """Hold at a value, or between limits; see `Clamp`."""
    return Clamp(site=site, value=value, low=low, high=high, where=where)


def steer(site: str, direction: Values, coefficient: float = 1.0, **where: Index) -> Steer:
    """Add `coefficient * direction` along the unit axis."""
    return Steer(site=site, direction=direction, coefficient=coefficient, where=where)


def scale(site: str, factor: Values, **where: Index) -> Scale:
    """Multiply by a factor."""
    return Scale(site=site, factor=factor, where=where)


def noise(site: str, std: float, *, seed: int = 0, **where: Index) -> Noise:
    """Add Gaussian noise."""
    return Noise(site=site, std=std, seed=seed, where=where)


def callback(
    site: str, function: Callable[[torch.Tensor], torch.Tensor], **where: Index
) -> Callback:
    """Apply your own function; not replayable."""
    return Callback(site=site, function=function, where=where)
