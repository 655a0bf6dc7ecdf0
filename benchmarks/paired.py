"""Paired timing for the benchmarks of the engines: CPU time, interleaved, ratios of pairs.

Every round runs every contender once, in an order that turns with the rounds, so
that a busy machine slows all of them alike. A ratio is taken within each round; its
median over the rounds is the figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch

import patchclamp
from patchclamp.net import Net

RESULTS = Path(__file__).parent / "results"
BATCH, LENGTH = 16, 32

Job = Callable[[], object]


def options(doc: str) -> argparse.Namespace:
    """The command line that all of these scripts have."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", default="smollm2")
    return parser.parse_args()


def opened(name: str) -> tuple[Net, torch.Tensor, Job]:
    """The network, random token ids (16, 32), and its bare forward pass."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = patchclamp.open(name)
    ids = torch.randint(3, net.tokenizer.vocab_size if net.tokenizer else 256, (BATCH, LENGTH))
    call = net.call(ids)

    def bare() -> torch.Tensor:
        with torch.no_grad():
            made = net.module(*call.args, **call.keywords)
        return made if isinstance(made, torch.Tensor) else made.logits

    return net, ids, bare


def measure(jobs: Mapping[str, Job], rounds: int) -> dict[str, list[float]]:
    """CPU-seconds of every job in every round; each runs once unmeasured first."""
    for job in jobs.values():
        job()
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.process_time()
            made = jobs[name]()
            taken[name].append(time.process_time() - began)
            del made
    return taken


def ratio(taken: Mapping[str, list[float]], name: str, to: str) -> dict[str, float]:
    """Median and quartiles of one contender's time over another's, round by round."""
    ratios = [a / b for a, b in zip(taken[name], taken[to], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": middle, "quartile_low": low, "quartile_high": high}


def report(
    file: str,
    net: Net,
    taken: Mapping[str, list[float]],
    pairs: Mapping[str, str],
    bars: Mapping[str, float],
    quality: Mapping[str, float],
    *,
    check: bool,
) -> None:
    """Print the figures, write them to `results/`, and exit 1 on a missed bar if asked to.

    Args:
        pairs: contender -> what it is compared with, measured in the same rounds.
        bars: the largest ratio to that which each contender may have.
        quality: largest differences to the bare forward pass, which should be next to nothing.
    """
    ratios = {name: ratio(taken, name, base) for name, base in pairs.items()}
    missed = [n for n, bar in bars.items() if ratios[n]["median"] > bar]
    data = {
        "model": net.name,
        "tokens": [BATCH, LENGTH],
        "compared_with": dict(pairs),
        "cpu_seconds_median": {n: statistics.median(t) for n, t in taken.items()},
        "ratio": ratios,
        "bars": dict(bars),
        "missed": missed,
        "quality": dict(quality),
        "rounds": {name: len(times) for name, times in taken.items()},
    }
    print(f"{net.name}, {BATCH}x{LENGTH} tokens, CPU time, median")
    for name, times in taken.items():
        line = f"  {name:<42}{statistics.median(times):8.3f} s"
        if name in ratios:
            line += f"{ratios[name]['median']:8.3f} x"
            line += f"  (bar {bars[name]:.2f})" if name in bars else ""
        print(line)
    for name, value in quality.items():
        print(f"  {name:<42}{value:10.1e}")
    write(file, data)
    if check and missed:
        sys.exit(f"bar missed: {', '.join(missed)}")


def write(file: str, data: Mapping[str, object]) -> None:
    """Write figures to `results/`, with what they were measured on."""
    measured_on = {
        "hardware": {
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "versions": {n: version(n) for n in ("torch", "transformers", "numpy")},
        "python": platform.python_version(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{file}.json"
    fresh = path.with_suffix(".json.tmp")
    fresh.write_text(json.dumps({**data, **measured_on}, indent=2) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
