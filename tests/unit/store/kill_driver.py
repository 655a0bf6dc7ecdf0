"""Run by test_store_kill.py in a process of its own: writers that are killed by SIGKILL.

Torch is imported once; every writer is a forked child, so that a kill costs
milliseconds. Prints one JSON object.

    kill_driver.py moments FOLDER KILLS SEED   kill at random moments
    kill_driver.py steps FOLDER                kill before or in every file operation
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from patchclamp.store import Manifest, SiteSpec, StoreWriter

NUM_EXAMPLES, BATCH = 103, 7
SHARD = {"moments": 10, "steps": 40}[sys.argv[1]]
MANIFEST = Manifest(
    sites=(
        SiteSpec(name="a", axes=("position", "unit"), shape=(8, 16), dtype="float16"),
        SiteSpec(name="b", axes=("unit",), shape=(31,), dtype="float32"),
    ),
    num_examples=NUM_EXAMPLES,
    shard_examples=SHARD,
    dtype="float16",
    model_name="toy",
    model_hash="m",
    data_name="d",
    data_hash="d",
)


def record(folder: Path, pause: float = 0.0) -> None:
    """The job: the same values for the same example numbers, whoever asks."""
    with StoreWriter(folder, MANIFEST) as writer:
        for start in range(writer.next_example, NUM_EXAMPLES, BATCH):
            n = torch.arange(start, min(start + BATCH, NUM_EXAMPLES), dtype=torch.float32)
            a = torch.sin(n[:, None, None] + torch.arange(128.0).reshape(8, 16))
            writer.append({"a": a, "b": n[:, None].expand(-1, 31) / 7})
            time.sleep(pause)
        writer.finish()


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def wait(child: int) -> bool:
    """True if the child ended by itself, False if SIGKILL ended it."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            raise RuntimeError(f"ended by signal {os.WTERMSIG(status)}")
        return False
    if os.WEXITSTATUS(status) != 0:
        raise RuntimeError("a writer failed; its traceback is above")
    return True


def num_recorded(folder: Path) -> int:
    return len(list(folder.glob("shard-*.json")))


def moments(folder: Path, kills: int, seed: int) -> dict[str, object]:
    draw = random.Random(seed)
    began = time.perf_counter()
    wait(fork(lambda: record(folder / "whole", 0.002)))
    span = time.perf_counter() - began
    done, found, runs = 0, [], 0
    while done < kills:
        runs += 1
        store = folder / f"run{runs}"
        finished = False
        while not finished:
            child = fork(lambda store=store: record(store, 0.002))
            if done < kills:
                time.sleep(draw.uniform(0, span / 3))
                os.kill(child, signal.SIGKILL)
            finished = wait(child)
            if not finished:
                done += 1
                found.append(num_recorded(store))
    return {"kills": done, "recorded": found, "runs": runs}


def die_at(step: int) -> None:
    """Let this process kill itself at its file operation number `step`; a write is cut in half."""
    seen = 0

    def deadly(name: str) -> None:
        plain = getattr(os, name)

        def wrapped(*args: object, **options: object) -> object:
            nonlocal seen
            seen += 1
            if seen == step:
                if name == "write":
                    plain(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **options)

        setattr(os, name, wrapped)

    for name in ("open", "write", "fsync", "replace", "unlink", "mkdir"):
        deadly(name)


def steps(folder: Path) -> dict[str, object]:
    record(folder / "whole")
    step, found, finished = 0, [], False
    while not finished:
        step += 1
        store = folder / f"step{step}"

        def doomed(store: Path = store, step: int = step) -> None:
            die_at(step)
            record(store)

        finished = wait(fork(doomed))
        if not finished:
            found.append(num_recorded(store))
            wait(fork(lambda store=store: record(store)))
    return {"kills": step - 1, "recorded": found}


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, place = sys.argv[1], Path(sys.argv[2])
    if mode == "moments":
        result = moments(place, int(sys.argv[3]), int(sys.argv[4]))
    else:
        result = steps(place)
    print(json.dumps(result))
