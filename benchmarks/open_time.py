"""Opening SmolLM2: the first time dequantises and caches, later times read the cache.

    python benchmarks/open_time.py [--check]

CPU time of `patchclamp.open`, imports left out, in one process with a cache folder of its
own. Bar: the second opening costs at most a quarter of the first, and gives the same
logits bit for bit. Writes results/open_time.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers  # noqa: F401 - imported here so that no opening is charged for it

import patchclamp
from patchclamp.net import Net

RESULTS = Path(__file__).parent / "results"
BAR = 0.25


def opened() -> tuple[Net, float]:
    """The network and the CPU-seconds that opening it took."""
    began = time.process_time()
    net = patchclamp.open("smollm2")
    return net, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PATCHCLAMP_CACHE"] = folder
        first, cold = opened()
        ids = torch.arange(3, 67).reshape(2, 32)
        expected = first.run(ids).output
        warm = sorted(opened()[1] for _ in range(3))[1]
        same = torch.equal(opened()[0].run(ids).output, expected)
    data = {
        "first_cpu_seconds": round(cold, 2),
        "later_cpu_seconds": round(warm, 2),
        "ratio": round(warm / cold, 3),
        "bar": BAR,
        "same_logits": same,
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "torch_threads": 1},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "open_time.json").write_text(json.dumps(data, indent=2) + "\n", "utf-8")
    print(json.dumps(data, indent=2))
    if (warm > BAR * cold or not same) and given.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
