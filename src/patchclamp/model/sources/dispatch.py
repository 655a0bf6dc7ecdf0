"""`load`: which kind of source is it, and who reads it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from patchclamp.core.errors import SourceError, nearest
from patchclamp.core.progress import SILENT, Progress
from patchclamp.model.sources.catalogue import BUNDLED, PACKAGED, names, read_config
from patchclamp.model.sources.loaded import Loaded

if TYPE_CHECKING:
    from torch import nn

Source: TypeAlias = "str | os.PathLike[str] | nn.Module"

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
SUFFIXES = (".gguf", ".onnx", ".onnx.gz", ".safetensors", *PICKLES)
KINDS = "an nn.Module, a Hugging Face folder, a .gguf, .onnx, .onnx.gz or .pt file, or a name"
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def load(
    source: Source,
    *,
    allow_pickle: bool = False,
    cache_dir: Path | None = None,
    progress: Progress = SILENT,
) -> Loaded:
    """Open a network. Nothing is fetched from anywhere, and torch's generator is left as it was.

    Args:
        source: a module (kept as it is), a folder, a file, or a name in `catalogue()`.
            A name wins over a folder of that name; write `./name` for the folder.
        allow_pickle: allow files that can run code when they are read.
        cache_dir: where dequantised weights are kept (see `cache.cache_root`).
        progress: told of long work.

    Raises:
        SourceError: it cannot be opened; the message says why and what would do.
        UnsafeFileError: it is a pickle, and `allow_pickle` is not set.
        MissingExtraError: an optional package is needed; the hint installs it.
    """
    if isinstance(source, (str, os.PathLike)):
        import torch

        with torch.random.fork_rng(devices=[]):
            if isinstance(source, str) and source in names():
                return _named(source, cache_dir, progress)
            try:
                return _path(source, allow_pickle, cache_dir, progress)
            except OSError as e:
                reason = e.strerror or e
                raise SourceError(f"'{os.fspath(source)}' cannot be read: {reason}") from e

    from torch import nn

    if isinstance(source, nn.Module):
        from patchclamp.model.sources.module import from_module

        return from_module(source)
    raise _unknown_object(source)


def _unknown_object(source: object) -> SourceError:
    given = f"{type(source).__module__}.{type(source).__qualname__}"
    hint = "pass exported.module()" if given.endswith(".ExportedProgram") else None
    if isinstance(source, type):
        given, hint = f"the class {source.__name__}", f"make one: {source.__name__}(...)"
    return SourceError("this cannot be opened as a network", got=given, expected=KINDS, hint=hint)


def _named(name: str, cache_dir: Path | None, progress: Progress) -> Loaded:
    for model in PACKAGED:
        if model.name == name:
            from patchclamp.model.sources.packages import load_packaged

            return load_packaged(model, cache_dir=cache_dir, progress=progress)
    from patchclamp.model.sources.bundled import load_specimen

    return load_specimen(BUNDLED / name, name=name, origin="bundled")


def _path(
    source: str | os.PathLike[str],
    allow_pickle: bool,
    cache_dir: Path | None,
    progress: Progress,
) -> Loaded:
    if not os.fspath(source):
        raise SourceError("the name of the network is empty", expected=KINDS)
    path = Path(source).expanduser()
    if not path.exists():
        raise _missing(path, is_text=isinstance(source, str))
    if path.is_dir():
        return _folder(path, allow_pickle, cache_dir, progress)
    return _file(path, allow_pickle, cache_dir, progress)


def _folder(folder: Path, allow_pickle: bool, cache_dir: Path | None, progress: Progress) -> Loaded:
    name = folder.resolve().name
    found = sorted(folder.glob("*.gguf"))
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    if (folder / "config.json").is_file() and (has_weights or not found):
        if "specimen" in read_config(folder):
            from patchclamp.model.sources.bundled import load_specimen

            return load_specimen(folder, name=name, origin="specimen folder")
        from patchclamp.model.sources.huggingface import load_folder

        return load_folder(folder, name=name, allow_pickle=allow_pickle)
    if len(found) == 1:
        from patchclamp.model.sources.gguf import load_gguf

        return load_gguf(found[0], name=name, cache_dir=cache_dir, progress=progress)
    if found:
        raise SourceError(
            f"folder '{folder}' holds {len(found)} GGUF files",
            got=", ".join(path.name for path in found[:5]),
            expected="one",
            hint=f"open one of them: '{found[0]}'",
        )
    files = [path.name for path in sorted(folder.iterdir())[:5]]
    raise SourceError(
        f"folder '{folder}' holds no model",
        got="files " + ", ".join(files) if files else "an empty folder",
        expected="config.json with .safetensors beside it, or one .gguf file",
    )


def _file(path: Path, allow_pickle: bool, cache_dir: Path | None, progress: Progress) -> Loaded:
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as e:
        raise SourceError(f"file '{path}' cannot be read: {e.strerror}") from e
    if not start:
        raise SourceError(f"file '{path}' is empty")
    lower = path.name.lower()
    if lower.endswith(".gguf") or start.startswith(b"GGUF"):
        from patchclamp.model.sources.gguf import load_gguf

        return load_gguf(path, name=path.stem, cache_dir=cache_dir, progress=progress)
    if lower.endswith((".onnx", ".onnx.gz")):
        from patchclamp.model.sources.onnx import load_onnx

        return load_onnx(path)
    if lower.endswith(PICKLES) or start.startswith(PICKLE_STARTS):
        from patchclamp.model.sources.checkpoint import load_checkpoint

        return load_checkpoint(path, allow_pickle=allow_pickle)
    if lower.endswith(".safetensors"):
        raise _bare_weights(path)
    raise SourceError(f"file '{path}' is of no kind that can be opened", expected=KINDS)


def _bare_weights(path: Path) -> SourceError:
    from patchclamp.model.sources import safetensors_file

    tensors = [name for name in safetensors_file.check(path) if name != "__metadata__"]
    return SourceError(
        f"'{path}' holds {len(tensors)} tensors but does not say what network they belong to",
        got=", ".join(tensors[:3]),
        expected="a folder with config.json beside the weights",
        hint="open the folder; or build the module, load_state_dict(load_file(path)), pass it",
    )


def _missing(path: Path, *, is_text: bool) -> SourceError:
    known = names()
    looks_like_path = len(path.parts) > 1 or path.name.lower().endswith(SUFFIXES)
    if is_text and not looks_like_path:
        return SourceError(
            f"no network is called '{path}', and no file or folder is either",
            expected="a path, or one of " + ", ".join(known),
            nearest=nearest(str(path), known),
            hint="patchclamp models",
        )
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return SourceError(
        f"there is no file or folder '{path}'",
        nearest=nearest(path.name, beside),
        hint=None if path.parent.is_dir() else f"the folder '{path.parent}' does not exist either",
    )
