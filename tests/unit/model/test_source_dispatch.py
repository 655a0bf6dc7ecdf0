"""Which source is it, and one clear error for what is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from patchclamp.core.errors import SourceError, UnsafeFileError
from patchclamp.model.sources import Task, catalogue, load


def test_a_given_module_is_the_same_object_untouched() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2)).double().train()
    net[0].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    loaded = load(net)
    assert loaded.module is net
    assert (loaded.name, loaded.origin, loaded.task) == ("Sequential", "module given", Task.OTHER)
    assert all(m.training for m in net.modules())
    assert not net[0].weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_unknown_names_bring_the_nearest() -> None:
    with pytest.raises(SourceError, match=r"no network is called 'smolm2'.*nearest 'smollm2'"):
        load("smolm2")


def test_missing_files_bring_the_nearest_beside_them(tmp_path: Path) -> None:
    (tmp_path / "network.onnx").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"no file or folder.*nearest 'network.onnx'"):
        load(tmp_path / "netwrk.onnx")
    with pytest.raises(SourceError, match="does not exist either"):
        load(tmp_path / "gone" / "net.onnx")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "name of the network is empty"),
        ("x" * 5000, "cannot be read"),
        (nn.Linear, r"the class Linear.*Linear\(\.\.\.\)"),
        (3, "cannot be opened as a network; got builtins.int"),
        (None, "expected an nn.Module"),
    ],
)
def test_what_is_no_source_is_refused(source: object, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a.onnx", "a.gguf", "a.pt", "a.safetensors", "a"])
def test_empty_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(SourceError, match="is empty"):
        load(tmp_path / name, allow_pickle=True)


def test_a_file_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SourceError, match=r"no kind that can be opened; expected an nn.Module"):
        load(tmp_path / "notes.txt")


def test_a_pickle_is_known_whatever_it_is_called(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "weights.data")
    with pytest.raises(UnsafeFileError):
        load(tmp_path / "weights.data")


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="an empty folder"):
        load(tmp_path)
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(SourceError, match=r"got files readme.md; expected config.json"):
        load(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(SourceError, match=r"holds 2 GGUF files.*hint: open one of them"):
        load(tmp_path)


def test_bare_weights_say_how_to_go_on(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(SourceError, match=r"holds 1 tensors.*layer.weight.*load_state_dict"):
        load(tmp_path / "w.safetensors")


def test_damaged_bare_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(100)}, path)
    whole = path.read_bytes()
    for damaged, message in [
        (whole[:-4], "cut short"),
        (whole[:20], "cut short"),
        (b"\xff" * 50, "no safetensors file"),
        (whole[:8] + b"[" + whole[9:], "no readable safetensors header"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match=message):
            load(path)


def test_opening_leaves_the_random_generator_as_it_was() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    names = [entry.name for entry in catalogue() if entry.kind == "bundled"]
    for name in names:
        load(name)
    assert names
    assert torch.equal(state, torch.get_rng_state())


def test_the_catalogue_needs_no_torch() -> None:
    code = (
        "import sys; from patchclamp.model.sources import catalogue, load; catalogue();"
        "print([m for m in ('torch', 'numpy', 'transformers', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
