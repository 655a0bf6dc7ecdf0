"""The cache: whole or absent, checked when used, and never in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from patchclamp.model.sources import cache

FACTS = {"format": "1"}


def fill(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"abc" * 100)


def test_the_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCLAMP_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.cache_root(Path("/given")) == Path("/given")
    assert cache.cache_root() == Path("/own")
    monkeypatch.delenv("PATCHCLAMP_CACHE")
    assert cache.cache_root() == Path("/xdg/patchclamp")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_root() == Path("/home/someone/.cache/patchclamp")


def test_a_published_folder_is_whole(tmp_path: Path) -> None:
    cache.publish(tmp_path / "x" / "k", fill, FACTS)
    assert cache.fault(tmp_path / "x" / "k", FACTS) is None
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["k"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flip", "'a.bin' has other content"),
        ("cut", "'a.bin' has another size"),
        ("gone", "'a.bin' is missing"),
        ("manifest", "manifest cannot be read"),
        ("facts", "another version"),
    ],
)
def test_any_damage_is_seen_and_repaired(tmp_path: Path, damage: str, message: str) -> None:
    folder = tmp_path / "k"
    cache.publish(folder, fill, FACTS)
    facts, file = dict(FACTS), folder / "a.bin"
    if damage == "flip":
        file.write_bytes(b"abd" + file.read_bytes()[3:])
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "gone":
        file.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        facts["format"] = "2"
    assert message in (cache.fault(folder, facts) or "")
    cache.publish(folder, fill, facts)
    assert cache.fault(folder, facts) is None
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


def test_large_files_are_compared_in_size_and_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "FULL_CHECK_BYTES", 10)
    monkeypatch.setattr(cache, "HEAD_BYTES", 4)
    cache.publish(tmp_path / "k", fill, FACTS)
    assert cache.fault(tmp_path / "k", FACTS) is None
    (tmp_path / "k" / "a.bin").write_bytes(b"x" * 300)
    assert cache.fault(tmp_path / "k", FACTS) == "'a.bin' has other content"


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        cache.publish(tmp_path / "k", fail, FACTS)
    assert list(tmp_path.iterdir()) == []


def test_drafts_of_killed_processes_are_swept(tmp_path: Path) -> None:
    old, new = tmp_path / "k.1.draft", tmp_path / "k.2.draft"
    for draft in (old, new):
        draft.mkdir()
    os.utime(old, (0, 0))
    cache.publish(tmp_path / "k", fill, FACTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k", "k.2.draft"]


def test_a_faster_process_wins(tmp_path: Path) -> None:
    def overtaken(folder: Path) -> None:
        fill(folder)
        cache.publish(tmp_path / "k", fill, FACTS)

    cache.publish(tmp_path / "k", overtaken, FACTS)
    assert cache.fault(tmp_path / "k", FACTS) is None
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


def test_a_file_is_hashed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, hashed = tmp_path / "w", []
    path.write_bytes(b"one")
    real = cache.file_sha256
    monkeypatch.setattr(cache, "file_sha256", lambda p: hashed.append(p) or real(p))
    first = cache.remembered_sha256(path, tmp_path / "root")
    assert cache.remembered_sha256(path, tmp_path / "root") == first == real(path)
    assert len(hashed) == 1
    path.write_bytes(b"three")
    assert cache.remembered_sha256(path, tmp_path / "root") == real(path) != first
