"""The hooks engine: the live module with forward hooks. Ground truth for all others.

It reaches the inputs and outputs of modules, call by call, works with every
module, with autograd and with `generate()`. Hooks are put on the modules that
a request needs and taken off when it ends, however it ends.

Trap: a later in-place operation (`relu_`) would change a recorded tensor, so
recorded values are copies, taken before the next operation runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils import _pytree as pytree

from patchclamp.core.errors import EngineError
from patchclamp.core.sites import Site
from patchclamp.engine.protocol import EngineName, Transform
from patchclamp.model.inputs import Call


class _Stop(BaseException):
    """Everything asked for is recorded. Not an Exception, so that no module swallows it."""


@dataclass(frozen=True)
class Point:
    """Where a hook acts: a module's input or output, one call of it, one leaf."""

    module: str
    call: int | None
    leaf: int
    is_input: bool


@dataclass
class _Request:
    """The points of one module that a run wants, and how often it was called so far."""

    record: dict[Point, str] = field(default_factory=dict)
    transform: dict[Point, Transform] = field(default_factory=dict)
    calls: int = 0


@dataclass
class HooksEngine:
    """Runs the live module; see the module docstring.

    Attributes:
        module: the network, left as found.
        table: sites by address.
        points: where each address is hooked.
    """

    module: nn.Module
    table: Mapping[str, Site]
    points: Mapping[str, Point]
    name: EngineName = EngineName.HOOKS

    def sites(self) -> Mapping[str, Site]:
        """Module inputs and outputs."""
        return self.table

    def run(
        self,
        call: Call,
        *,
        record: Sequence[str] = (),
        transforms: Mapping[str, Transform] | None = None,
        output: bool = True,
    ) -> tuple[object, dict[str, torch.Tensor]]:
        """One forward pass of the live module.

        Raises:
            EngineError: an address is not a module's value, or was not reached.
        """
        found: dict[str, torch.Tensor] = {}
        wanted = set(record)

        def keep(address: str, value: torch.Tensor) -> None:
            found[address] = value.clone() if value.requires_grad else value.detach().clone()
            if not output and len(found) == len(wanted):
                raise _Stop

        result: object = None
        with self._hooked(record, transforms or {}, keep):
            try:
                result = self.module(*call.args, **call.keywords)
            except _Stop:
                result = None
        unreached = wanted - found.keys()
        if unreached:
            raise EngineError(
                f"site '{sorted(unreached)[0]}' was not reached in this forward pass",
                hint="the module is called conditionally, or fewer times than with the examples",
            )
        return (result if output else None), {address: found[address] for address in record}

    @contextmanager
    def transformed(self, transforms: Mapping[str, Transform]) -> Iterator[None]:
        """Keep transforms on the live module, for `generate()` and for foreign code."""
        with self._hooked((), transforms, lambda address, value: None):
            yield

    @contextmanager
    def _hooked(
        self,
        record: Sequence[str],
        transforms: Mapping[str, Transform],
        keep: Callable[[str, torch.Tensor], None],
    ) -> Iterator[None]:
        requests: dict[str, _Request] = {}
        for address in record:
            point = self._point(address)
            requests.setdefault(point.module, _Request()).record[point] = address
        for address, transform in transforms.items():
            point = self._point(address)
            requests.setdefault(point.module, _Request()).transform[point] = transform
        handles = []
        try:
            for path, request in requests.items():
                handles += _install(self.module.get_submodule(path), path, request, keep)
            if any(
                p.call is not None for r in requests.values() for p in (*r.record, *r.transform)
            ):
                handles.append(self.module.register_forward_pre_hook(_reset(requests)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _point(self, address: str) -> Point:
        if address not in self.points:
            raise EngineError(
                f"the hooks engine cannot reach '{address}': it is not a module's value",
                hint="use engine='graph'",
            )
        return self.points[address]


def _reset(requests: Mapping[str, _Request]) -> Callable[[nn.Module, object], None]:
    def reset(module: nn.Module, args: object) -> None:
        for path, request in requests.items():
            if path:
                request.calls = 0

    return reset


def _install(
    module: nn.Module,
    path: str,
    request: _Request,
    keep: Callable[[str, torch.Tensor], None],
) -> list[torch.utils.hooks.RemovableHandle]:
    points = [*request.record, *request.transform]

    def before(
        module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        return _touch((args, kwargs), request, keep, path, is_input=True)  # type: ignore[return-value]  # of the form it was given

    def after(module: nn.Module, args: object, kwargs: dict[str, object], output: object) -> object:
        made = _touch(output, request, keep, path, is_input=False)
        request.calls += 1
        return made

    handles = []
    if any(p.is_input for p in points):
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    handles.append(module.register_forward_hook(after, with_kwargs=True))
    return handles


def _touch(
    value: object,
    request: _Request,
    keep: Callable[[str, torch.Tensor], None],
    path: str,
    *,
    is_input: bool,
) -> object:
    """Apply and record what the request wants of this value; same object if nothing changed.

    A module that is given one tensor several times (self-attention: query, key and value)
    has one input, which is changed everywhere. The network's own arguments stay separate.
    """
    leaves, spec = pytree.tree_flatten(value)
    tensors = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
    changed = False
    for number, at in enumerate(tensors):
        for called in (None, request.calls):
            point = Point(path, called, number, is_input)
            if point in request.transform:
                before, made = leaves[at], request.transform[point](leaves[at])
                for i in tensors if is_input and path else (at,):
                    if leaves[i] is before:
                        leaves[i] = made
                changed = True
            if point in request.record:
                keep(request.record[point], leaves[at])
        if is_input:
            break
    return pytree.tree_unflatten(leaves, spec) if changed else value
