"""Networks inside other packages, found where they are installed.

The packages themselves are not imported, because some pull in an inference
engine of their own; only their files are read.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch

from patchclamp.core.errors import SourceError
from patchclamp.core.progress import Progress
from patchclamp.model.sources.catalogue import PackagedModel, require_packaged
from patchclamp.model.sources.loaded import Loaded, Preprocessing, Task

EFFICIENTNET_SIDE = 224


def load_packaged(model: PackagedModel, *, cache_dir: Path | None, progress: Progress) -> Loaded:
    """Open the network of an installed package.

    Raises:
        MissingExtraError: something is not installed; the hint is the exact install line.
    """
    path = require_packaged(model)
    origin = f"package {model.distribution} {importlib.metadata.version(model.distribution)}"
    if path.suffix == ".gguf":
        from patchclamp.model.sources.gguf import load_gguf

        return load_gguf(
            path, name=model.name, origin=origin, cache_dir=cache_dir, progress=progress
        )
    if path.is_dir():
        from patchclamp.model.sources.huggingface import load_folder

        return load_folder(path, name=model.name, origin=origin, allow_pickle=False)
    return _efficientnet(path, name=model.name, origin=origin)


def _efficientnet(path: Path, *, name: str, origin: str) -> Loaded:
    """EfficientNet-Lite0 with its ImageNet weights (Tan & Le 2019, the Lite variant)."""
    from efficientnet_lite_pytorch import EfficientNet

    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        module = EfficientNet.from_name("efficientnet-lite0")
        module.load_state_dict(weights, strict=True)
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, ValueError) as e:
        raise SourceError(f"the weights of '{name}' in '{path}' are damaged: {e}") from e
    side = EFFICIENTNET_SIDE
    example = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return Loaded(
        module=module.eval(),
        name=name,
        origin=origin,
        example_inputs=(example,),
        task=Task.CLASSIFY_IMAGES,
        preprocessing=Preprocessing(
            channels=3,
            height=side,
            width=side,
            crop=0.875,
            scale=255.0,
            mean=(127.0,) * 3,
            std=(128.0,) * 3,
        ),
        notes=("the package names no classes",),
    )
