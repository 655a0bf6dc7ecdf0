"""GGUF files: dequantised to float32 by transformers once, then read from the cache.

Reading a GGUF file takes tens of CPU-seconds, most of it spent on metadata in Python.
The result is kept as a Hugging Face folder, keyed by the SHA-256 of the file, and gives
bit for bit the same network.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError

from patchclamp.core.errors import SourceError
from patchclamp.core.progress import Progress
from patchclamp.model.sources import cache
from patchclamp.model.sources.huggingface import (
    check_complete,
    describe,
    first_line,
    load_folder,
    quiet,
    require,
)
from patchclamp.model.sources.loaded import Loaded
from patchclamp.model.tokens import TransformersTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Item = TypeVar("Item")

CACHE_FORMAT = "1"
MAX_STRING = 1 << 20
FILE_TYPE, ARCHITECTURE = "general.file_type", "general.architecture"
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Value types of the format as `struct` codes."""

STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
AUTO = {"t5": "AutoModelForSeq2SeqLM", "t5encoder": "AutoModel"}
"""GGUF architectures that are not causal language models."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the metadata of a GGUF file say."""

    architecture: str
    quantisation: str


def load_gguf(
    path: Path,
    *,
    name: str,
    origin: str = "GGUF file",
    cache_dir: Path | None,
    progress: Progress,
) -> Loaded:
    """Open a GGUF file as float32.

    Raises:
        SourceError: it is no GGUF file, damaged, or of an architecture that transformers lacks.
        MissingExtraError: transformers, gguf or accelerate is not installed.
    """
    header = read_header(path)
    require("transformers", "gguf", "accelerate")
    import transformers

    root = cache.cache_root(cache_dir)
    digest = cache.remembered_sha256(path, root)
    folder = root / "gguf" / digest
    facts = {
        "format": CACHE_FORMAT,
        "source": digest,
        "transformers": transformers.__version__,
    }
    notes: tuple[str, ...] = (f"dequantised from GGUF {header.quantisation} to float32",)
    wrong = cache.fault(folder, facts) if folder.exists() else "absent"
    if wrong is not None:
        if wrong != "absent":
            progress.note(f"the cache of {path.name} is made again: {wrong}")
        progress.note(f"dequantising {path.name} to float32, once; cached at {folder}")
        module, tokenizer, unused = _dequantise(path, header, progress)
        notes += tuple(f"not used: {n}" for n in unused)
        try:
            cache.publish(folder, lambda draft: _save(module, tokenizer, draft), facts)
        except (OSError, SafetensorError) as e:
            reason = getattr(e, "strerror", None) or first_line(e)
            notes += (f"not cached: {reason}",)
            progress.note(
                f"cannot write the cache at {root} ({reason}); "
                "set PATCHCLAMP_CACHE to a folder that can be written"
            )
            wrapped = TransformersTokenizer(tokenizer)
            return describe(module, name=name, origin=origin, tokenizer=wrapped, notes=notes)
        del module, tokenizer
    loaded = load_folder(folder, name=name, origin=origin, allow_pickle=False)
    return replace(loaded, notes=(*notes, *loaded.notes))


def read_header(path: Path) -> Header:
    """Architecture and quantisation of a GGUF file.

    Raises:
        SourceError: it is no GGUF file.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise SourceError(
                    f"'{path}' is not a GGUF file", expected="a file that starts with 'GGUF'"
                )
            found = _metadata(file)
    except (struct.error, UnicodeDecodeError, EOFError) as e:
        raise SourceError(
            f"GGUF file '{path}' is damaged or was cut short", hint="copy or download it again"
        ) from e
    except OSError as e:
        raise SourceError(f"GGUF file '{path}' cannot be read: {e.strerror}") from e
    architecture = found.get(ARCHITECTURE)
    if not isinstance(architecture, str):
        raise SourceError(f"GGUF file '{path}' does not name its architecture")
    return Header(architecture=architecture, quantisation=_quantisation(found.get(FILE_TYPE)))


def _metadata(file: BinaryIO) -> dict[str, object]:
    """Scalars and strings by key, until both wanted ones are found; arrays are passed over."""
    version, _, count = struct.unpack("<IQQ", file.read(20))
    if version not in VERSIONS:
        raise EOFError(f"version {version}")
    found: dict[str, object] = {}
    for _ in range(count):
        key = _string(file).decode("utf-8")
        (kind,) = struct.unpack("<I", file.read(4))
        if kind == STRING:
            found[key] = _string(file).decode("utf-8")
        elif kind == ARRAY:
            _pass_array(file)
        else:
            (found[key],) = struct.unpack("<" + _code(kind), file.read(_size(kind)))
        if ARCHITECTURE in found and FILE_TYPE in found:
            break
    return found


def _pass_array(file: BinaryIO) -> None:
    kind, count = struct.unpack("<IQ", file.read(12))
    if kind == STRING:
        for _ in range(count):
            _string(file)
    else:
        file.seek(count * _size(kind), 1)


def _code(kind: int) -> str:
    if kind not in SCALARS:
        raise EOFError(f"value type {kind}")
    return SCALARS[kind]


def _size(kind: int) -> int:
    return struct.calcsize("<" + _code(kind))


def _string(file: BinaryIO) -> bytes:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_STRING:
        raise EOFError(f"a string of {length} bytes")
    raw = file.read(length)
    if len(raw) < length:
        raise EOFError("end of file in a string")
    return raw


def _quantisation(file_type: object) -> str:
    """The usual name of a file type number, such as Q4_1."""
    require("gguf")
    from gguf import LlamaFileType

    try:
        return (
            str(LlamaFileType(int(str(file_type))).name)
            .removeprefix("MOSTLY_")
            .removeprefix("ALL_")
        )
    except ValueError:
        return "of an unnamed type"


def _dequantise(
    path: Path, header: Header, progress: Progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, tuple[str, ...]]:
    import transformers

    auto = getattr(transformers, AUTO.get(header.architecture, "AutoModelForCausalLM"))
    try:
        with quiet(), _reporting(progress):
            module, info = auto.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
    except Exception as e:  # the library checks little and raises whatever it meets
        raise SourceError(
            f"GGUF file '{path}' (architecture '{header.architecture}') cannot be opened: "
            f"{first_line(e)}",
            hint="if the file is whole, transformers does not read this architecture from GGUF",
        ) from e
    return module.eval(), tokenizer, check_complete(module, info, path)


@contextmanager
def _reporting(progress: Progress) -> Iterator[None]:
    """One of the library's readers draws a bar of its own, which its switch does not reach."""
    try:
        reader = import_module("transformers.modeling_gguf_pytorch_utils")
        drawn = reader.tqdm
    except (ImportError, AttributeError):  # a version without it
        yield
        return

    def reported(items: Iterable[Item], **_drawing: object) -> Iterator[Item]:
        held = list(items)
        progress.start("dequantising", total=len(held), unit="tensors")
        for item in held:
            yield item
            progress.advance()
        progress.finish()

    reader.tqdm = reported  # type: ignore[attr-defined]  # put back below
    try:
        yield
    finally:
        reader.tqdm = drawn  # type: ignore[attr-defined]


def _save(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that reads back as the same network.

    `save_pretrained` refuses a network that came from a quantised file, although its
    weights are plain float32 by now.
    """
    from safetensors.torch import save_file

    weights, seen = {}, set()
    for name, tensor in module.state_dict().items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if (
            memory not in seen
        ):  # a tied output matrix is the embedding, and is tied again on reading
            seen.add(memory)
            weights[name] = tensor.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = module.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = [type(module).__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    if module.generation_config is not None:
        module.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
