"""Edits as data: what to change, where, and to what.

An edit names a site, restricts itself to parts of it by axis, and says what
the chosen values become. It is plain data (JSON both ways, tensors as nested
lists), so an experiment can be stored, compared and run again; `Callback` is
the exception and says so. Edits on one site apply in the order they are
listed; edits on different sites apply in the order of the forward pass. What
is recorded at an edited site is the value after its edits.

Restricting: `where={"position": -1, "unit": [3, 5]}`. Axes are those of the
site; `example` is the batch axis and `unit` the axis that counts units
(channels in a convolution). Several restricted axes select their product.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import numpy as np
import torch

from patchclamp.core.errors import EditError, nearest
from patchclamp.core.findings import Json
from patchclamp.core.sites import unit_axis

Index: TypeAlias = "int | Sequence[int] | slice"


@dataclass(frozen=True)
class Frame:
    """What an edit is told about the value it changes.

    Attributes:
        label: the site as the user named it.
        axes: names of the value's axes.
        offset: position of the first row of the `position` axis in the whole sequence.
        windowed: the value holds only a window of the sequence (generation with a
            cache): positions outside it are passed over instead of refused.
    """

    label: str
    axes: tuple[str, ...]
    offset: int = 0
    windowed: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """Base of all edits. Subclasses say in `new` what the chosen part becomes."""

    kind: ClassVar[str] = ""
    site: str
    where: Mapping[str, Index] = field(default_factory=dict)

    def new(self, part: torch.Tensor, frame: Frame, chosen: Chosen) -> torch.Tensor:
        """The replacement of `part`, of a shape that broadcasts to it."""
        raise EditError(f"edit kind '{self.kind}' has no rule")

    def apply(self, value: torch.Tensor, frame: Frame) -> torch.Tensor:
        """`value` (*axes) with the edit applied: a new tensor, the argument is left as it was."""
        chosen = choose(value, frame, self.where)
        if chosen.empty:
            return value
        part = chosen.of(value)
        made = self.new(part, frame, chosen).to(value.dtype).expand_as(part)
        return chosen.put(value, made)

    def to_dict(self) -> dict[str, Json]:
        """Plain data that `edit_from_dict` turns back into this edit."""
        data: dict[str, Json] = {"kind": self.kind, "site": self.site}
        if self.where:
            data["where"] = {axis: _plain_index(ix) for axis, ix in self.where.items()}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name not in ("site", "where") and value is not f.default:
                data[f.name] = _plain(value)
        return data


@dataclass(frozen=True)
class Chosen:
    """The part of a value that an edit is about.

    Attributes:
        full: shape of the whole value.
        rows: the chosen rows of each axis.
        everything: nothing is restricted.
        listed: positions that `where` lists in the whole sequence, where that is known;
            a window may hold only some of them.
    """

    full: tuple[int, ...]
    rows: tuple[torch.Tensor, ...]
    everything: bool
    listed: tuple[int, ...] = ()

    @property
    def empty(self) -> bool:
        """Nothing is chosen (positions that this generation step does not hold)."""
        return any(r.numel() == 0 for r in self.rows)

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """The chosen part: as many axes as `value`, restricted ones shortened."""
        for axis, rows in self._restricted():
            value = value.index_select(axis, rows)
        return value

    def put(self, value: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """`value` with the chosen part replaced: a new tensor.

        A copy also where everything is replaced: an in-place operation downstream (`relu_`)
        must neither write into what the user gave nor meet a broadcast tensor.
        """
        restricted = self._restricted()
        return _put(value, part, restricted) if restricted else part.clone()

    def _restricted(self) -> list[tuple[int, torch.Tensor]]:
        return [(a, r) for a, r in enumerate(self.rows) if r.numel() != self.full[a] or not _all(r)]


def _all(rows: torch.Tensor) -> bool:
    """Whether the rows are 0, 1, 2, ... in order."""
    return bool((rows == torch.arange(rows.numel(), device=rows.device)).all())


def _put(
    value: torch.Tensor, part: torch.Tensor, restricted: Sequence[tuple[int, torch.Tensor]]
) -> torch.Tensor:
    """Axis by axis, which is several times faster than one index over all axes."""
    if not restricted:
        return part
    (axis, rows), rest = restricted[0], restricted[1:]
    inner = _put(value.index_select(axis, rows), part, rest) if rest else part
    return value.index_copy(axis, rows, inner)


def choose(value: torch.Tensor, frame: Frame, where: Mapping[str, Index]) -> Chosen:
    """Resolve `where` against a value. Raises EditError for unknown axes and indices."""
    full = tuple(value.shape)
    rows = [torch.arange(n, device=value.device) for n in full]
    listed: tuple[int, ...] = ()
    for name, wanted in where.items():
        axis = axis_of(name, frame)
        if frame.windowed and frame.axes[axis] == "position":
            chosen = _windowed(wanted, full[axis], frame.offset)
            listed = _absolute(wanted, full[axis], frame.offset)
        else:
            chosen = _listed(wanted, full[axis], name, frame)
        rows[axis] = torch.tensor(chosen, dtype=torch.long, device=value.device)
    return Chosen(full, tuple(rows), everything=not where, listed=listed)


def axis_of(name: str, frame: Frame) -> int:
    """Number of the axis that a user's word names (`example`, `unit` or the site's own names)."""
    resolved = "batch" if name == "example" else name
    if resolved == "unit" and "unit" not in frame.axes:
        resolved = unit_axis(frame.axes) or resolved
    if resolved not in frame.axes:
        raise EditError(
            f"site '{frame.label}' has no axis '{name}'",
            expected=f"one of {', '.join(frame.axes)}",
            nearest=nearest(name, frame.axes),
        )
    return frame.axes.index(resolved)


def _listed(wanted: Index, size: int, name: str, frame: Frame) -> list[int]:
    if isinstance(wanted, slice):
        return list(range(*wanted.indices(size)))
    listed = indices(wanted)
    for i in listed:
        if not -size <= i < size:
            raise EditError(
                f"index {i} is outside axis '{name}' of site '{frame.label}'",
                expected=f"-{size} to {size - 1}",
            )
    return [i % size for i in listed]


def _windowed(wanted: Index, size: int, offset: int) -> list[int]:
    """Rows of a window that starts at `offset`; negative positions count from the window's end."""
    if isinstance(wanted, slice):
        rows = [p - offset for p in range(*wanted.indices(offset + size))]
    else:
        rows = [i + size if i < 0 else i - offset for i in indices(wanted)]
    return [r for r in rows if 0 <= r < size]


def _absolute(wanted: Index, size: int, offset: int) -> tuple[int, ...]:
    """All positions of the sequence that are meant; none for a slice without an end."""
    if isinstance(wanted, slice):
        if wanted.stop is None or wanted.stop < 0:
            return ()
        return tuple(range(*wanted.indices(max(wanted.stop, offset + size))))
    return tuple(i + offset + size if i < 0 else i for i in indices(wanted))


def indices(wanted: object) -> list[int]:
    """An integer or several, of Python's or numpy's or torch's types, as a list.

    Raises:
        EditError: anything else. Masks are refused: as numbers they would mean rows 0 and 1.
    """
    several = wanted if isinstance(wanted, Iterable) and not isinstance(wanted, str) else [wanted]
    if getattr(wanted, "ndim", 1) == 0:
        several = [wanted]
    listed = []
    for i in several:
        if isinstance(i, (bool, np.bool_)) or getattr(i, "dtype", None) is torch.bool:
            raise EditError(
                "an index is an integer, a list of integers or a slice",
                got=repr(wanted),
                hint="for a mask give the indices where it holds: numpy.flatnonzero(mask)",
            )
        try:
            listed.append(operator.index(i))  # type: ignore[arg-type]  # refused below
        except TypeError:
            raise EditError(
                "an index is an integer, a list of integers or a slice", got=repr(wanted)
            ) from None
    return listed


def fit(given: object, part: torch.Tensor, frame: Frame, chosen: Chosen) -> torch.Tensor:
    """What a user gave for an edit, in a shape that broadcasts to the chosen part.

    A number; a labelled array (aligned by its dimension names); an array with all
    axes of the site (the same part of it is taken); a vector as long as the unit
    axis; or anything that broadcasts to the part.
    """
    tensor = labelled(given, frame) if hasattr(given, "dims") else _plain_tensor(given, part)
    tensor = tensor.to(device=part.device)
    full, shape = chosen.full, tuple(part.shape)
    units = unit_axis(frame.axes)
    if tensor.ndim == 1 and units is not None:
        axis = frame.axes.index(units)
        if tensor.numel() in (shape[axis], full[axis]):
            tensor = tensor.reshape([-1 if i == axis else 1 for i in range(len(full))])
    if tensor.ndim == len(full) and tuple(tensor.shape) != shape:
        tensor = _same_part(tensor, frame, chosen, shape)
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise misfit(tuple(tensor.shape), shape, frame, chosen) from None


def _plain_tensor(given: object, part: torch.Tensor) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as e:
        raise EditError(f"an edit's value is not numeric: {e}", got=type(given).__name__) from None
    if tensor.is_floating_point() and not part.is_floating_point():
        return tensor
    return tensor.to(part.dtype)


@dataclass(frozen=True)
class Labelled:
    """An array with named axes, as it is read back from plain data."""

    dims: tuple[str, ...]
    values: np.ndarray


def labelled(given: object, frame: Frame) -> torch.Tensor:
    """An array with named axes, turned to the site's axes; those it lacks have size 1."""
    dims = tuple("batch" if d == "example" else str(d) for d in getattr(given, "dims", ()))
    unknown = [d for d in dims if d not in frame.axes]
    if unknown:
        raise EditError(
            f"the labelled array for site '{frame.label}' has an axis '{unknown[0]}'",
            expected=f"axes among {', '.join(frame.axes)}",
            nearest=nearest(unknown[0], frame.axes),
        )
    tensor = torch.from_numpy(np.ascontiguousarray(given.values))  # type: ignore[attr-defined]  # an xarray.DataArray
    order = sorted(range(len(dims)), key=lambda i: frame.axes.index(dims[i]))
    tensor = tensor.permute(order)
    sizes = dict(zip(sorted(dims, key=frame.axes.index), tensor.shape, strict=True))
    return tensor.reshape([sizes.get(a, 1) for a in frame.axes])


def _same_part(
    tensor: torch.Tensor, frame: Frame, chosen: Chosen, shape: tuple[int, ...]
) -> torch.Tensor:
    """The chosen part of an array with all axes of the site (size 1 broadcasts)."""
    index = []
    for axis, rows in enumerate(chosen.rows):
        size = tensor.shape[axis]
        if size == 1:
            index.append(torch.zeros(1, dtype=torch.long))
        elif frame.windowed and frame.axes[axis] == "position":
            index.append(_positions(rows, size, frame, chosen))
        elif size == chosen.full[axis]:
            index.append(rows)
        else:
            index.append(torch.arange(size))
        if index[-1].numel() not in (1, shape[axis]):
            raise misfit(tuple(tensor.shape), shape, frame, chosen)
    for axis, rows in enumerate(index):
        tensor = tensor.index_select(axis, rows.to(tensor.device))
    return tensor


def _positions(rows: torch.Tensor, size: int, frame: Frame, chosen: Chosen) -> torch.Tensor:
    """Which of `size` given positions belong to a window's rows.

    What was given is either as long as the positions that `where` lists, or holds
    the sequence from its start.
    """
    wanted = [int(r) + frame.offset for r in rows]
    if size == len(chosen.listed):
        return torch.tensor([chosen.listed.index(p) for p in wanted])
    if max(wanted) < size:
        return torch.tensor(wanted)
    return torch.arange(0)


def misfit(got: tuple[int, ...], part: tuple[int, ...], frame: Frame, chosen: Chosen) -> EditError:
    """The error for a value that does not broadcast."""
    axes = ", ".join(f"{a}={n}" for a, n in zip(frame.axes, part, strict=True))
    expected = f"something that broadcasts to ({axes})"
    if tuple(part) != chosen.full:
        expected += f", or the whole site {chosen.full}"
    return EditError(
        f"the value of an edit does not fit site '{frame.label}'",
        got=f"shape {got}",
        expected=expected,
        hint="restrict the edit with where={...} or give the value as a labelled array",
    )


def _plain_index(index: Index) -> Json:
    if isinstance(index, slice):
        return {"start": index.start, "stop": index.stop, "step": index.step}
    listed: list[Json] = [*indices(index)]
    return listed[0] if isinstance(index, int) or getattr(index, "ndim", 1) == 0 else listed


def _plain(value: object) -> Json:
    """An option as JSON; arrays become nested lists."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        data: Json = value.tolist()
        return data
    if hasattr(value, "values") and hasattr(value, "dims"):
        return {"dims": [str(d) for d in value.dims], "values": _plain(value.values)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise EditError("this edit's option cannot be written as JSON", got=type(value).__name__)
