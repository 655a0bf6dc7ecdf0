"""Pickles: refused, then restricted, then full with a note; and never a traceback."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from patchclamp.core.errors import SourceError, UnsafeFileError
from patchclamp.model.sources import load

RAN: list[str] = []


class Hostile:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return RAN.append, ("ran",)


class Vanishing(nn.Linear):
    """A class that is gone when the file is read."""


def test_a_pickle_is_refused_before_it_is_read(tmp_path: Path) -> None:
    RAN.clear()
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UnsafeFileError, match=r"is a pickle.*hint: .*--allow-pickle"):
        load(tmp_path / "a.pkl")
    assert RAN == []


def test_a_pickled_module_opens_when_asked_for_with_a_note(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout()).train()
    torch.save(net, tmp_path / "net.pt")
    loaded = load(tmp_path / "net.pt", allow_pickle=True)
    x = torch.ones(1, 2)
    assert torch.equal(loaded.module(x), net.eval()(x))
    assert loaded.name == "net"
    assert "code in the file was run" in loaded.notes[0]


def test_a_module_beside_other_state_is_found(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "model": nn.Linear(2, 2)}, tmp_path / "net.pth")
    assert isinstance(load(tmp_path / "net.pth", allow_pickle=True).module, nn.Linear)


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
def test_a_state_dict_says_how_to_go_on(tmp_path: Path, nest: str | None) -> None:
    state = nn.Linear(2, 2).state_dict()
    torch.save({nest: state, "epoch": 1} if nest else state, tmp_path / "w.pt")
    with pytest.raises(SourceError, match=r"holds 2 tensors.*weight, bias.*load_state_dict") as e:
        load(tmp_path / "w.pt", allow_pickle=True)
    assert (f"['{nest}']" in str(e.value)) == (nest is not None)


def test_other_content_is_named(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(SourceError, match=r"holds no network; got list"):
        load(tmp_path / "w.pt", allow_pickle=True)


@pytest.mark.parametrize("kept", [4, 100, -30])
def test_damaged_files_are_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "w.pt"
    torch.save(nn.Linear(20, 20).state_dict(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SourceError, match="cannot be"):
        load(path, allow_pickle=True)


def test_a_class_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(Vanishing(2, 2), tmp_path / "w.pt")
    monkeypatch.delitem(globals(), "Vanishing")
    with pytest.raises(SourceError, match=r"cannot be imported: .*Vanishing.*PYTHONPATH"):
        load(tmp_path / "w.pt", allow_pickle=True)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "s.pt", "w") as archive:
        archive.writestr("s/constants.pkl", b"x")
    with pytest.raises(SourceError, match="TorchScript"):
        load(tmp_path / "s.pt", allow_pickle=True)
