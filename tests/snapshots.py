"""A module's whole outward state, to compare before and after."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


class Snapshot(NamedTuple):
    """Everything of a module that a recorder could change by accident."""

    weights: dict[str, str]
    objects: dict[str, int]
    versions: dict[str, int]
    hooks: dict[str, dict[str, int]]
    modes: dict[str, bool]
    needs_grad: dict[str, bool]
    has_grad: dict[str, bool]
    attributes: dict[str, dict[str, str]]
    rng: str
    function_apply: int
    grad_mode: bool


def snapshot(module: nn.Module) -> Snapshot:
    """See `Snapshot`. Values are compared bit for bit, through their digests."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    named = list(module.named_modules())
    return Snapshot(
        weights={n: digest(t) for n, t in tensors.items()},
        objects={n: id(t) for n, t in tensors.items()},
        versions={n: t._version for n, t in module.named_parameters()},
        hooks={n: {h: len(getattr(m, h, ())) for h in _HOOKS} for n, m in named},
        modes={n: m.training for n, m in named},
        needs_grad={n: t.requires_grad for n, t in tensors.items()},
        has_grad={n: t.grad is not None for n, t in tensors.items()},
        attributes={n: {k: _brief(v) for k, v in vars(m).items()} for n, m in named},
        rng=digest(torch.random.get_rng_state()),
        function_apply=id(vars(torch.autograd.Function).get("apply")),
        grad_mode=torch.is_grad_enabled(),
    )


def digest(x: torch.Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bits."""
    x = x.detach().contiguous()
    bits = x.reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""
    return hashlib.sha256(f"{x.dtype}{tuple(x.shape)}".encode() + bits).hexdigest()


def _brief(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return digest(value)
    if isinstance(value, dict):
        return f"dict of {len(value)}"
    if isinstance(value, (int, float, str, bool, tuple, list)) or value is None:
        return repr(value)
    return f"{type(value).__name__} at {id(value)}"
