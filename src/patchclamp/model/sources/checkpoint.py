"""Pickled checkpoints: `.pt`, `.pth`, `.bin`, `.ckpt`.

A pickle can run code when it is read, so nothing is read unless it was asked for by
name. Then the restricted reader of torch goes first, and the full one only where that
one refuses, with a note. Most such files are weights without an architecture, which
no reader can turn into a network; the error says how to go on.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from patchclamp.core.errors import SourceError, UnsafeFileError
from patchclamp.model.sources.loaded import Loaded

NESTS = ("state_dict", "model_state_dict", "model", "net", "network")
"""Keys under which training scripts keep the state dict, or the module."""


def load_checkpoint(path: Path, *, allow_pickle: bool) -> Loaded:
    """Open a pickled module.

    Raises:
        UnsafeFileError: `allow_pickle` is not set.
        SourceError: the file is damaged, or holds weights without an architecture.
    """
    if not allow_pickle:
        raise UnsafeFileError(
            f"'{path}' is a pickle, and reading a pickle can run any code that is in it",
            expected="safetensors with a config.json, GGUF or ONNX",
            hint="convert it; or, if you trust who made it, allow_pickle=True (--allow-pickle)",
        )
    _refuse_torchscript(path)
    held, note = _read(path)
    module = _module_in(held)
    if module is None:
        raise _no_network(path, held)
    return Loaded(
        module=module.eval(), name=path.stem, origin="pickled module", notes=(note,) if note else ()
    )


def _read(path: Path) -> tuple[object, str]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True), ""
    except pickle.UnpicklingError:
        pass  # not weights only: the reader below was asked for by name
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as e:
        raise SourceError(f"'{path}' cannot be read as a checkpoint: {_first_line(e)}") from e
    try:
        held = torch.load(path, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as e:
        raise SourceError(
            f"'{path}' needs a class that cannot be imported: {_first_line(e)}",
            hint="put the code that defines it on PYTHONPATH, or save the network as safetensors",
        ) from e
    except Exception as e:  # any exception may leave code that the file itself brings
        raise SourceError(f"'{path}' cannot be unpickled: {_first_line(e)}") from e
    return held, "unpickled in full, because it is more than weights: code in the file was run"


def _module_in(held: object) -> nn.Module | None:
    if isinstance(held, nn.Module):
        return held
    if isinstance(held, Mapping):
        return next((held[k] for k in NESTS if isinstance(held.get(k), nn.Module)), None)
    return None


def _no_network(path: Path, held: object) -> SourceError:
    found = _state_dict_in(held)
    if found is None:
        return SourceError(
            f"'{path}' holds no network", got=type(held).__name__, expected="an nn.Module"
        )
    key, weights = found
    read = f"torch.load('{path}', weights_only=True)" + (f"['{key}']" if key else "")
    return SourceError(
        f"'{path}' holds {len(weights)} tensors but does not say what network they belong to",
        got=", ".join(list(weights)[:3]),
        expected="a pickled nn.Module",
        hint=f"build the module, module.load_state_dict({read}), and open the module",
    )


def _state_dict_in(held: object) -> tuple[str, Mapping[str, torch.Tensor]] | None:
    if not isinstance(held, Mapping):
        return None
    nested = [(k, held[k]) for k in NESTS if isinstance(held.get(k), Mapping)]
    for key, inner in [("", held), *nested]:
        if inner and all(isinstance(v, torch.Tensor) for v in inner.values()):
            return key, inner
    return None


def _refuse_torchscript(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            inside = {name.partition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError) as e:
        raise SourceError(f"'{path}' is a damaged archive: {e}") from e
    if "constants.pkl" in inside:
        raise SourceError(
            f"'{path}' is a TorchScript archive, whose modules cannot be recorded or edited",
            hint="open the nn.Module that it was made from, or export it to ONNX",
        )


def _first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
