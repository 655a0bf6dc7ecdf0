"""Whatever moment a writer is killed at, the finished store is that of an undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from patchclamp.store import open_store

DRIVER = Path(__file__).with_name("kill_driver.py")


def drive(*arguments: str) -> dict[str, object]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, str(DRIVER), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def check_equal(folder: Path, num_shards: int, contents: Callable[[Path], dict[str, bytes]]) -> int:
    whole = contents(folder / "whole")
    shards = {f"shard-{index:05d}.safetensors" for index in range(num_shards)}
    assert set(whole) == {"manifest.json", *shards}
    others = [path for path in folder.iterdir() if path.name != "whole"]
    for path in others:
        assert contents(path) == whole, path.name
        open_store(path).verify()
    return len(others)


def test_ten_kills_at_random_moments(
    tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    result = drive("moments", str(tmp_path), "10", "0")
    assert result["kills"] >= 10
    assert any(0 < n < 11 for n in result["recorded"]), "no kill fell into the middle"
    assert check_equal(tmp_path, 11, contents) == result["runs"]


def test_a_kill_at_every_file_operation(
    tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    result = drive("steps", str(tmp_path))
    # 3 shards with a record each: open, write, fsync, rename, open and fsync of the folder.
    assert result["kills"] > 3 * 2 * 6
    assert set(range(4)) <= set(result["recorded"]), "not every state was visited"
    assert check_equal(tmp_path, 3, contents) == result["kills"] + 1
