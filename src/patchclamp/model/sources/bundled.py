"""Specimen folders: `config.json` names an architecture of this package, safetensors hold weights.

The bundled networks are such folders. The configuration is data: its `specimen` is
looked up in a fixed table, and no path or code in it is followed.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from patchclamp.core.errors import OptionError, SourceError
from patchclamp.model.sources import safetensors_file
from patchclamp.model.sources.catalogue import read_config
from patchclamp.model.sources.loaded import Loaded, Preprocessing, Task
from patchclamp.model.tokens import NUM_BYTES, ByteTokenizer

EXAMPLE_LENGTH = 8
"""Tokens in a row of example inputs."""


def load_specimen(folder: Path, *, name: str, origin: str) -> Loaded:
    """Open a specimen folder.

    Raises:
        SourceError: the configuration or the weights are missing, damaged, or do not fit.
    """
    config = read_config(folder)
    where = str(folder / "config.json")
    module = _built(config, where)
    _fill(module, folder / "model.safetensors")
    task = _task(config, where)
    described = config.get("input")
    if not isinstance(described, dict):
        raise SourceError(
            f"'{where}' does not describe the input", expected="'input': {'kind': ..}"
        )
    classes = config.get("class_names", [])
    if not isinstance(classes, list):
        raise SourceError(f"'class_names' in '{where}' is not a list", got=repr(classes))
    is_text = described.get("kind") == "tokens"
    context = _count(described, "context", where) if is_text else None
    vocab = _count(described, "vocab", where) if is_text else None
    return Loaded(
        module=module.eval(),
        name=name,
        origin=origin,
        example_inputs=_examples(described, where),
        tokenizer=ByteTokenizer() if vocab == NUM_BYTES else None,
        task=task,
        class_names=tuple(str(c) for c in classes),
        preprocessing=_preprocessing(described, where),
        context=context,
        notes=(f"trained by {config['trained_by']}",) if "trained_by" in config else (),
    )


def _built(config: Mapping[str, object], where: str) -> nn.Module:
    # A string, because models may not depend on specimens: the table names them.
    specimens = importlib.import_module("patchclamp.specimens")
    specimen, options = config.get("specimen"), config.get("options", {})
    if not isinstance(specimen, str) or not isinstance(options, dict):
        raise SourceError(
            f"'{where}' does not name a specimen and its options",
            got=f"specimen={specimen!r}, options={options!r}",
            expected="'specimen': a name, 'options': an object",
        )
    try:
        module = specimens.build(specimen, **options)
    except OptionError as e:
        raise SourceError(f"'{where}' does not fit the specimen: {e.what}") from e
    except (TypeError, ValueError, RuntimeError) as e:
        raise SourceError(f"the options in '{where}' do not build '{specimen}': {e}") from e
    if not isinstance(module, nn.Module):
        raise SourceError(f"the specimen '{specimen}' is no module", got=type(module).__name__)
    return module


def _fill(module: nn.Module, path: Path) -> None:
    """Load weights whose names, shapes and types are exactly those of the module."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    safetensors_file.check(path)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as e:
        raise SourceError(f"weights file '{path}' is damaged: {e}") from e
    wanted = module.state_dict()
    wrong = [f"'{n}' is missing" for n in wanted if n not in weights]
    wrong += [f"'{n}' is not in the network" for n in weights if n not in wanted]
    for name in wanted.keys() & weights.keys():
        want, have = wanted[name], weights[name]
        if want.shape != have.shape or want.dtype != have.dtype:
            wrong.append(
                f"'{name}' is {tuple(have.shape)} {have.dtype}, "
                f"not {tuple(want.shape)} {want.dtype}"
            )
    if wrong:
        raise SourceError(
            f"weights file '{path}' does not fit its config.json in {len(wrong)} places: "
            + "; ".join(sorted(wrong)[:3])
        )
    module.load_state_dict(weights, strict=True)


def _task(config: Mapping[str, object], where: str) -> Task:
    try:
        return Task(str(config.get("task", Task.OTHER)))
    except ValueError:
        raise SourceError(
            f"'{where}' names an unknown task",
            got=repr(config["task"]),
            expected="one of " + ", ".join(f"'{t}'" for t in Task),
        ) from None


def _count(described: Mapping[str, object], key: str, where: str) -> int:
    value = described.get(key)
    if not isinstance(value, int) or value < 1:
        raise SourceError(
            f"'input' in '{where}' has no usable '{key}'", got=repr(value), expected="a count"
        )
    return value


def _shape(described: Mapping[str, object], where: str) -> tuple[int, ...]:
    shape = described.get("shape")
    if (
        not isinstance(shape, list)
        or not shape
        or not all(isinstance(n, int) and n > 0 for n in shape)
    ):
        raise SourceError(
            f"'input' in '{where}' has no usable 'shape'",
            got=repr(shape),
            expected="sizes of one example, such as [1, 8, 8]",
        )
    return tuple(shape)


def _examples(described: Mapping[str, object], where: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    if described.get("kind") == "tokens":
        length = min(EXAMPLE_LENGTH, _count(described, "context", where))
        vocab = _count(described, "vocab", where)
        return (torch.randint(vocab, (2, length), generator=generator),)
    if described.get("kind") == "image":
        return (torch.rand(2, *_shape(described, where), generator=generator),)
    return (torch.randn(2, *_shape(described, where), generator=generator),)


def _preprocessing(described: Mapping[str, object], where: str) -> Preprocessing | None:
    if described.get("kind") != "image":
        return None
    shape = _shape(described, where)
    if len(shape) != 3:
        raise SourceError(
            f"'input' in '{where}' is no image",
            got=f"shape {list(shape)}",
            expected="[channel, row, column]",
        )
    channels, height, width = shape
    return Preprocessing(
        channels=channels, height=height, width=width, mean=(0.0,) * channels, std=(1.0,) * channels
    )
