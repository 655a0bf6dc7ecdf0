"""Operators that exist only while a network is captured.

`tag` marks a module's input or output: the identity with a name. `call` stands
for one `autograd.Function.apply`, so that the function's own backward is kept:
traced through, its backward is lost and gradients change silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

_LIBRARY = torch.library.Library("patchclamp", "FRAGMENT")
_LIBRARY.define("tag(Tensor x, str name) -> Tensor")
_LIBRARY.define("call(Tensor[] xs, int number) -> Tensor[]")

TAG = "patchclamp::tag"
CALL = "patchclamp::call"


class Application:
    """One `apply` of an autograd function, with its tensors left out."""

    def __init__(self, function: type[torch.autograd.Function], args: tuple[object, ...]) -> None:
        self.function = function
        self.leaves, self.spec = pytree.tree_flatten(args)
        self.single = True
        self.apply: Callable[..., object] = function.apply

    def tensors(self) -> list[torch.Tensor]:
        """The tensor arguments, in order."""
        return [x for x in self.leaves if isinstance(x, torch.Tensor)]

    def __call__(self, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Apply the function to these tensors and the remembered other arguments."""
        fresh = iter(xs)
        args = [next(fresh) if isinstance(x, torch.Tensor) else x for x in self.leaves]
        made = self.apply(*pytree.tree_unflatten(args, self.spec))
        self.single = isinstance(made, torch.Tensor)
        return [made] if isinstance(made, torch.Tensor) else list(made)  # type: ignore[call-overload]  # a tuple of tensors


_APPLICATIONS: list[Application] = []
"""Filled during one capture; read by the fake rule of `call` and taken by the capture."""


def _fake_tag(x: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _fake_call(xs: list[torch.Tensor], number: int) -> list[torch.Tensor]:
    with torch.no_grad():
        made = _APPLICATIONS[number](xs)
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in made]


has_side_effect(torch.ops.patchclamp.tag.default)
"""So that export keeps the marks of module values that nothing reads, such as an LSTM's states."""

torch.library.register_fake(TAG, _fake_tag, lib=_LIBRARY)
torch.library.register_fake(CALL, _fake_call, lib=_LIBRARY)


def tag(x: torch.Tensor, name: str) -> torch.Tensor:
    """Mark a value during capture."""
    made: torch.Tensor = torch.ops.patchclamp.tag(x, name)
    return made


@contextmanager
def opaque_functions() -> Iterator[list[Application]]:
    """Within, every `autograd.Function.apply` becomes one `call` operator; yields the list."""
    own = torch.autograd.Function.__dict__.get("apply")
    original = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]  # a classmethod
    _APPLICATIONS.clear()

    def apply(cls: type[torch.autograd.Function], /, *args: object, **kwargs: object) -> object:
        application = Application(cls, args)
        tensors = application.tensors()
        if kwargs or not tensors:
            return original(cls, *args, **kwargs)
        application.apply = lambda *a: original(cls, *a)
        _APPLICATIONS.append(application)
        made = torch.ops.patchclamp.call(tensors, len(_APPLICATIONS) - 1)
        return made[0] if application.single else tuple(made)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
    try:
        yield _APPLICATIONS
    finally:
        if own is None:
            del torch.autograd.Function.apply
        else:
            torch.autograd.Function.apply = own  # type: ignore[method-assign]
        _APPLICATIONS.clear()
