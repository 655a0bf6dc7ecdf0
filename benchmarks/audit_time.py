"""Audits end within their time: the default audit, and SmolLM2 with a budget of five minutes.

    python benchmarks/audit_time.py [--check] [--quick]

Each audit is a process of its own, start and imports included. Bars: 90 s of wall time
for the default audit; the budget itself for SmolLM2. Beside the time stands what was
measured in it and what was left out. Writes results/audit_time.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
AUDITS = {
    "digits-cnn, default budget": (["digits-cnn"], 90.0),
    "smollm2, --budget 5m": (["smollm2", "--budget", "5m"], 300.0),
}


def measured(arguments: list[str]) -> dict[str, object]:
    """One audit in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        findings = Path(folder) / "findings.json"
        command = [sys.executable, "-m", "patchclamp.cli", "audit", *arguments, "--exit-zero"]
        command += ["--out", str(Path(folder) / "report.html"), "--json", str(findings)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.monotonic()
        subprocess.run(command, check=True, capture_output=True)
        wall = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        document = json.loads(findings.read_text("utf-8"))
    return {
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(
            after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, 1
        ),
        "peak_mib": after.ru_maxrss // 1024,
        "findings": sum(len(s["findings"]) for s in document["sections"]),
        "section_cpu_seconds": {s["id"]: s["cpu_seconds"] for s in document["sections"]},
        "left_out": [entry["what"] for entry in document["left_out"]],
    }


def _cpu(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    parser.add_argument("--quick", action="store_true", help="only the default audit")
    given = parser.parse_args()
    results, missed = {}, []
    for name, (arguments, bar) in AUDITS.items():
        if given.quick and "smollm2" in name:
            continue
        results[name] = {**measured(arguments), "bar_wall_seconds": bar}
        if float(str(results[name]["wall_seconds"])) > bar:
            missed.append(name)
        print(name, json.dumps(results[name], indent=2))
    RESULTS.mkdir(exist_ok=True)
    hardware = {"machine": platform.machine(), "cores": os.cpu_count()}
    data = {"audits": results, "missed": missed, "hardware": hardware}
    (RESULTS / "audit_time.json").write_text(json.dumps(data, indent=2) + "\n", "utf-8")
    if missed:
        print("missed:", ", ".join(missed))
        sys.exit(1 if given.check else 0)


if __name__ == "__main__":
    main()
