"""The identity of a network and of data: what a record cites, and a store refuses to mix.

A hash covers what decides the numbers: for a network its anatomy (the classes of
its modules, and the generated code of a `torch.fx` graph) and every entry of its
state dict, bit for bit; for data its names, types, shapes and bytes. Weights are
read in place where they lie on the CPU in memory order; nothing is changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx, nn

from patchclamp.core.errors import InputError, PatchclampError, SourceError

CHUNK_BYTES = 1 << 26
"""Tensors that must be copied (another device, another memory order) go by in pieces of this."""


def model_hash(module: nn.Module) -> str:
    """SHA-256 of the anatomy and the state dict of a network, as 64 hexadecimal digits.

    Two networks have one hash if their modules have the same names and classes,
    and all entries of their state dicts the same names, types, shapes and bytes.
    Memory order, device, tying and the training flag do not matter; signed zeros
    and the payload of NaN do.

    Raises:
        SourceError: an entry holds no data (the meta device), or is not dense.
    """
    total = hashlib.sha256(b"patchclamp model 1\n")
    for name, part in module.named_modules(remove_duplicate=False):
        _line(total, "module", name, type(part).__qualname__)
        if isinstance(part, fx.GraphModule):
            _line(total, "code", name, part.code)
    state = module.state_dict(keep_vars=True)
    seen: dict[tuple[object, ...], str] = {}
    for name in sorted(state):
        value = state[name]
        entry: tuple[str, ...]
        if isinstance(value, Tensor):
            entry = _tensor_entry(value, f"entry '{name}' of the network", SourceError, seen)
        else:
            entry = _extra_entry(name, value)
        _line(total, "entry", name, *entry)
    return total.hexdigest()


def data_hash(tensors: Iterable[Tensor] | Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors, in order if they are a sequence and by name if they are a mapping.

    Raises:
        InputError: a value is not a tensor, holds no data, or is not dense.
    """
    if isinstance(tensors, Tensor):
        tensors = [tensors]
    named = (
        sorted(tensors.items())
        if isinstance(tensors, Mapping)
        else [(str(i), x) for i, x in enumerate(tensors)]
    )
    total = hashlib.sha256(b"patchclamp data 1\n")
    for name, value in named:
        if not isinstance(value, Tensor):
            raise InputError(f"data '{name}' is not a tensor", got=type(value).__name__)
        _line(total, "entry", name, *_tensor_entry(value, f"data '{name}'", InputError, {}))
    return total.hexdigest()


def _line(total: hashlib._Hash, *fields: str) -> None:
    """One record; JSON keeps field borders apart whatever the fields hold."""
    total.update(json.dumps(fields).encode() + b"\n")


def _tensor_entry(
    tensor: Tensor,
    what: str,
    error: type[PatchclampError],
    seen: dict[tuple[object, ...], str],
) -> tuple[str, str, str]:
    """Type, shape and digest of the bytes; one memory that is seen twice is read once."""
    x = tensor.detach()
    if x.is_meta:
        raise error(
            f"{what} holds no data: it is on the meta device",
            hint="load the weights, or call to_empty and initialise, before you open the network",
        )
    if x.layout is not torch.strided or x.is_quantized:
        raise error(f"{what} cannot be hashed", got=f"layout {x.layout}", expected="a dense tensor")
    key = (x.device, x.data_ptr(), x.dtype, x.shape, x.stride(), x.is_conj(), x.is_neg())
    if key not in seen or not x.numel():
        seen[key] = _digest(x.resolve_conj().resolve_neg())
    return str(x.dtype), str(tuple(x.shape)), seen[key]


def _digest(x: Tensor) -> str:
    digest = hashlib.sha256()
    if x.is_contiguous() and x.device.type == "cpu":
        digest.update(_bytes(x))
        return digest.hexdigest()
    rows = x.reshape(1) if x.ndim == 0 else x
    step = max(1, CHUNK_BYTES // max(1, rows[0].numel() * x.element_size())) if x.numel() else 1
    for start in range(0, len(rows), step):
        digest.update(_bytes(rows[start : start + step].cpu().contiguous()))
    return digest.hexdigest()


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, not copied."""
    return x.reshape(-1).view(torch.uint8).numpy().data


def _extra_entry(name: str, value: object) -> tuple[str, str]:
    """State that a module keeps through `get_extra_state`."""
    if isinstance(value, bytes):
        return "bytes", hashlib.sha256(value).hexdigest()
    try:
        return "json", json.dumps(value, sort_keys=True)
    except (TypeError, ValueError) as e:
        raise SourceError(
            f"entry '{name}' of the network cannot be hashed",
            got=type(value).__name__,
            expected="a tensor, bytes or plain data",
        ) from e
