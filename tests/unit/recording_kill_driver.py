"""Run by test_recording.py in a process of its own: recordings that are killed by SIGKILL.

The network is opened once; every recording is a forked child, so that a kill costs
milliseconds. Prints one JSON object.

    recording_kill_driver.py FOLDER KILLS SEED
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import patchclamp
from patchclamp.core.progress import Silent

SITES = ("blocks.*.conv", "logits")


class Slow(Silent):
    """Lets every batch take a little longer, so that kills fall between batches too."""

    def advance(self, amount: int = 1) -> None:
        time.sleep(0.003)


def main(folder: Path, kills: int, seed: int) -> dict[str, object]:
    draw = random.Random(seed)
    net = patchclamp.open("digits-cnn")
    data = patchclamp.load_data("digits")

    def record(name: str) -> None:
        # 7 does not divide 20, and 20 does not divide the number of examples.
        net.record_to(folder / name, data, SITES, batch_size=7, shard_examples=20, progress=Slow())

    def start(name: str) -> int:
        child = os.fork()
        if child == 0:
            try:
                record(name)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        return child

    def ended(child: int) -> bool:
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return False
        if os.WEXITSTATUS(status) != 0:
            raise RuntimeError("a recording failed; its traceback is above")
        return True

    def over(child: int) -> bool:
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, child, flags) is not None

    def num_shards(name: str) -> int:
        return len(list((folder / name).glob("shard-*.json")))

    ended(start("whole"))
    done, runs, found = 0, 0, []
    while done < kills:
        runs += 1
        name, finished = f"run{runs}", False
        while not finished:
            child = start(name)
            if done < kills:
                # Wait for some more shards, or for none, and then a moment: on a busy
                # machine moments of the clock alone would all fall into the start.
                target = num_shards(name) + draw.choice((0, 0, 1, 2, 4))
                while num_shards(name) < target and not over(child):
                    time.sleep(0.0005)
                time.sleep(draw.uniform(0, 0.02))
                os.kill(child, signal.SIGKILL)
            finished = ended(child)
            if not finished:
                done += 1
                found.append(num_shards(name))
    return {"kills": done, "runs": runs, "recorded": found}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
