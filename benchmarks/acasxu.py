"""The 186 ACAS Xu instances of VNN-COMP: verdicts against the known ones, and what they cost.

    python benchmarks/acasxu.py [--timeout 116] [--only prop_3] [--check]

Every instance is solved in one process, so that importing is counted once and apart. CPU time is
the solver's own, reading the network and capturing it included. A wrong verdict, or fewer than
180 solved, ends with exit code 1. With --check every certificate is checked afterwards.

The networks are read from ../shared/data/acasxu beside the repository, or from the folder that
PATCHCLAMP_ACASXU names: onnx/, vnnlib/ and expected.csv as there.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from bound_networks import acas_folder

from patchclamp.methods.bounds.certificate.check import check
from patchclamp.methods.bounds.verify import Verify
from patchclamp.methods.bounds.vnnlib import read_property

BAR_SOLVED, BAR_MEDIAN = 180, 3.0
RESULTS = Path(__file__).parent / "results" / "acasxu.json"


def solved(
    folder: Path, row: dict[str, str], timeout: float, *, checked: bool
) -> dict[str, object]:
    """One instance."""
    network, text = folder / "onnx" / row["network"], folder / "vnnlib" / row["property"]
    stated = read_property(text)
    wall = time.monotonic()
    verdict = Verify(timeout=timeout).run(network, stated, text)
    wall = time.monotonic() - wall
    made: dict[str, object] = {
        "network": row["network"].removesuffix("_batch_2000.onnx.gz").removeprefix("ACASXU_run2a_"),
        "property": row["property"].removesuffix(".vnnlib.gz"),
        "expected": row["expected"],
        "answer": str(verdict.answer),
        "cpu_seconds": round(verdict.cpu_seconds, 3),
        "wall_seconds": round(wall, 3),
        "boxes": verdict.boxes,
    }
    if checked and verdict.certificate is not None:
        made["certificate"] = check(verdict.certificate, network, stated, text).valid
    return made


def main() -> int:
    """Run them all; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timeout", type=float, default=116.0)
    parser.add_argument("--only", default="", help="instances whose names contain this")
    parser.add_argument("--check", action="store_true", help="check every certificate")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = acas_folder()
    if not (folder / "expected.csv").is_file():
        print(f"skipped: no networks in {folder}")
        return 0
    with (folder / "expected.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if options.only in r["network"] + r["property"]]
    made = []
    for number, row in enumerate(rows):
        made.append(solved(folder, row, options.timeout, checked=options.check))
        print(f"{number + 1}/{len(rows)}", *made[-1].values(), flush=True)
    right = [m for m in made if m["answer"] == m["expected"]]
    wrong = [m for m in made if {m["answer"], m["expected"]} == {"sat", "unsat"}]
    refused = [m for m in made if m.get("certificate") is False]
    cpu = [float(str(m["cpu_seconds"])) for m in made]
    summary = {
        "instances": len(made),
        "solved": len(right),
        "wrong": len(wrong),
        "certificates_refused": len(refused),
        "median_cpu_seconds": statistics.median(cpu),
        "total_cpu_seconds": round(sum(cpu), 1),
        "timeout": options.timeout,
        "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
    }
    print(json.dumps(summary, indent=1))
    if not options.only:
        RESULTS.write_text(json.dumps({"summary": summary, "instances": made}, indent=1) + "\n")
    missed = wrong or refused
    if not options.only:
        missed = missed or len(right) < BAR_SOLVED or summary["median_cpu_seconds"] > BAR_MEDIAN
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
