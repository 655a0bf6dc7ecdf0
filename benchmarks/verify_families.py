"""The verifier on kinds of network that ACAS Xu is not, beside two others.

    python benchmarks/verify_families.py [--timeout S] [--only PART] [--peers] [--without-ours]

Runs `patchclamp verify` on every instance that `bound_families.py` writes, and with --peers also
Marabou and NeuralSAT (`verify_peers.py` says how to get them). A verdict is wrong if it is unsat
where a counterexample is known, and two verifiers disagree if one says sat and the other unsat;
either ends with exit status 1. Times are CPU-seconds of the whole process on one thread; the
limit is wall-clock, since every verifier counts it so. Writes results/verify_families.json, but
not with --only or --without-ours.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from bound_families import write_families
from paired import write
from verify_peers import PEERS, VARIABLE, Verdict, asked, interpreter, verdict

OURS = "patchclamp"
DEFINITE = ("sat", "unsat")

Contender = Callable[[Path, Path, float], Verdict]


def ours(network: Path, prop: Path, timeout: float) -> Verdict:
    """This package, from its command line."""
    command = [sys.executable, "-m", "patchclamp.cli", "verify", str(network), str(prop)]
    return asked([*command, "--timeout", str(timeout)], timeout, str(network.parent))


def other(peer: str) -> Contender:
    """One of the peers."""
    return lambda network, prop, timeout: verdict(peer, network, prop, timeout)


def faults(expected: str, got: dict[str, Verdict]) -> list[str]:
    """What cannot be right about the verdicts on one instance."""
    found = [
        f"{name} says unsat, a counterexample is known"
        for name, v in got.items()
        if expected == "sat" and v.word == "unsat"
    ]
    words = {v.word for v in got.values() if v.word in DEFINITE}
    return [*found, "verifiers disagree"] if len(words) > 1 else found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--timeout", type=float, default=20.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--without-ours", action="store_true")
    given = parser.parse_args()
    contenders: dict[str, Contender] = {} if given.without_ours else {OURS: ours}
    if given.peers and interpreter() is None:
        sys.exit(f"{VARIABLE} is not set; the head of verify_peers.py says how to set it")
    if given.peers:
        contenders |= {peer: other(peer) for peer in PEERS}
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_families(folder)
        with (folder / "expected.csv").open(encoding="utf-8", newline="") as file:
            rows = [r for r in csv.DictReader(file) if given.only in r["property"]]
        results, wrong = [], []
        for row in rows:
            paths = folder / "onnx" / row["network"], folder / "vnnlib" / row["property"]
            got = {name: run(*paths, given.timeout) for name, run in contenders.items()}
            bad = faults(row["expected"], got)
            wrong += [f"{row['property']}: {fault}" for fault in bad]
            results.append({**row, **{name: asdict(v) for name, v in got.items()}})
            line = "".join(f"{v.word:>10}{v.cpu_seconds:7.1f} s" for v in got.values())
            print(f"{row['property']:<34}{row['expected']:<6}{line}  {'; '.join(bad)}", flush=True)
    summary = {}
    for name in contenders:
        words = Counter(r[name]["word"] for r in results)
        solved = [r[name]["cpu_seconds"] for r in results if r[name]["word"] in DEFINITE]
        median = statistics.median(solved) if solved else None
        summary[name] = {"verdicts": dict(words), "median_cpu_seconds_of_solved": median}
        print(f"{name}: {dict(words)}, median of solved {median}")
    if not given.only and not given.without_ours:
        data = {"timeout": given.timeout, "instances": results, "summary": summary}
        write("verify_families", {**data, "wrong": wrong})
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
