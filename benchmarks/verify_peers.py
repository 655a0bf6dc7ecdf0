"""Two other verifiers on the same files as ours: Marabou and NeuralSAT.

    python benchmarks/verify_peers.py                       ten ACAS Xu instances, both peers
    python benchmarks/verify_peers.py PEER NET PROP SECONDS  one verdict on the first line

They go into an environment of their own, because they pin what they need; PATCHCLAMP_PEERS is
its interpreter. NeuralSAT's own list of dependencies asks for much that verifying does not use:

    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 numpy onnx onnxruntime scipy psutil sortedcontainers \
        termcolor beartype tqdm coloredlogs joblib gurobipy requests
    peers/bin/pip install --no-deps neuralsat==0.2.17 maraboupy==2.0.0
    export PATCHCLAMP_PEERS=$PWD/peers/bin/python

NeuralSAT is run with an empty module in place of torchvision, which it imports for an operator
that is not used here, and on the CPU; everything else is its default, with Gurobi's licence for
small models. Marabou runs its own command with its own readers of ONNX and vnnlib. Both get one
thread. A word is sat, unsat, unknown, timeout, or error where a peer stopped without a verdict;
what it said last is kept. Without PATCHCLAMP_PEERS this says so and measures nothing. The ten
instances are those that `PICKED` names, at 116 s each. Writes results/verify_peers.json.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bound_networks import acas_folder
from paired import RESULTS, _processor

PEERS = ("marabou", "neuralsat")
VARIABLE = "PATCHCLAMP_PEERS"
TIMEOUT = 116.0
GRACE = 30.0  # seconds after its time limit in which a peer may still stop by itself
PICKED = (
    ("1_1", 1),
    ("2_1", 2),
    ("1_1", 3),
    ("4_2", 4),
    ("1_7", 3),
    ("1_1", 5),
    ("1_9", 7),
    ("2_9", 8),
    ("3_3", 9),
    ("4_5", 10),
)

MARABOU = """
import sys
from maraboupy.MarabouCore import maraboupyMain
sys.exit(maraboupyMain(["Marabou", *sys.argv[1:]]))
"""
NEURALSAT = """
import importlib.util, pathlib, runpy, sys, types
sys.modules["torchvision"] = types.ModuleType("torchvision")
root = pathlib.Path(importlib.util.find_spec("src").submodule_search_locations[0])
sys.path.insert(0, str(root))
runpy.run_path(str(root / "main.py"), run_name="__main__")
"""
WORDS = {"sat": "sat", "unsat": "unsat", "unknown": "unknown", "timeout": "timeout"}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a peer answered.

    Attributes:
        word: sat, unsat, unknown, timeout or error.
        cpu_seconds: of the whole process, start and imports included.
        wall_seconds: likewise.
        said: its last line; why, where the word is error.
    """

    word: str
    cpu_seconds: float
    wall_seconds: float
    said: str


def interpreter() -> str | None:
    """The interpreter of the peers' environment, or None where none is named."""
    return os.environ.get(VARIABLE) or None


def verdict(peer: str, network: Path, prop: Path, timeout: float) -> Verdict:
    """Ask a peer about one instance; .gz files are unpacked for it.

    Raises: ValueError for a peer that is not one of `PEERS`; RuntimeError where no environment
        of theirs is named.
    """
    python = interpreter()
    if python is None:
        raise RuntimeError(f"{VARIABLE} is not set; the head of {Path(__file__).name} says how")
    with tempfile.TemporaryDirectory() as folder:
        net, spec = (str(_unpacked(path, Path(folder))) for path in (network, prop))
        if peer == "marabou":
            limit = f"--timeout={max(1, round(timeout))}"
            command = [python, "-c", MARABOU, limit, "--verbosity=0", net, spec]
        elif peer == "neuralsat":
            command = [python, "-W", "ignore", "-c", NEURALSAT, "--net", net, "--spec", spec]
            command += ["--timeout", str(timeout), "--device", "cpu", "--verbosity", "0"]
        else:
            raise ValueError(f"no peer {peer!r}; there are {', '.join(PEERS)}")
        return asked(command, timeout, folder)


def asked(command: list[str], timeout: float, folder: str) -> Verdict:
    """Run a verifier in a folder, on one thread, and read the verdict that it prints."""
    one = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | one
    used, began = _children(), time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as run:
        try:
            word, last = _read(run.communicate(timeout=timeout + GRACE)[0])
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # with whatever it started
            word, last = "timeout", f"stopped {GRACE:.0f} s after its limit"
    return Verdict(
        word=word,
        cpu_seconds=_children() - used,
        wall_seconds=time.perf_counter() - began,
        said=last,
    )


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _unpacked(path: Path, folder: Path) -> Path:
    if path.suffix != ".gz":
        return path.resolve()
    out = folder / path.stem
    out.write_bytes(gzip.decompress(path.read_bytes()))
    return out


def _read(said: str) -> tuple[str, str]:
    """The verdict among what a peer printed, and its last line.

    A line is a verdict if it is one of the words, alone or before NeuralSAT's run time.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    found = [m[1].lower() for line in lines if (m := re.fullmatch(r"(\w+)(,[\d.]+)?", line))]
    words = [WORDS[w] for w in found if w in WORDS]
    return (words[-1] if words else "error"), (lines[-1] if lines else "")


def _expected(folder: Path) -> dict[tuple[str, str], str]:
    with (folder / "expected.csv").open(encoding="utf-8", newline="") as file:
        return {(r["network"], r["property"]): r["expected"] for r in csv.DictReader(file)}


def versions(python: str) -> dict[str, str]:
    """What the peers' environment holds."""
    names = ("neuralsat", "maraboupy", "torch", "numpy", "gurobipy", "onnx")
    code = "import importlib.metadata as m, json, sys\n"
    code += "print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
    out = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(json.loads(out.stdout))


def compare() -> None:
    """Both peers on the picked instances of ACAS Xu."""
    python = interpreter()
    if python is None:
        print(f"nothing measured: {VARIABLE} is not set; the head of this file says how to set it")
        return
    try:
        folder = acas_folder()
    except FileNotFoundError as e:
        print(f"nothing measured: {e}")
        return
    known = _expected(folder)
    rows = []
    for net, number in PICKED:
        network, prop = f"ACASXU_run2a_{net}_batch_2000.onnx.gz", f"prop_{number}.vnnlib.gz"
        row: dict[str, object] = {"network": net, "property": number}
        row["expected"] = known[network, prop]
        for peer in PEERS:
            got = verdict(peer, folder / "onnx" / network, folder / "vnnlib" / prop, TIMEOUT)
            row[peer] = asdict(got)
            print(
                f"{net} prop {number:<3}{row['expected']:<8}{peer:<11}{got.word:<9}"
                f"{got.cpu_seconds:8.1f} s",
                flush=True,
            )
        rows.append(row)
    data = {
        "timeout": TIMEOUT,
        "instances": rows,
        "threads": 1,
        "hardware": {
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": os.cpu_count(),
        },
        "versions": versions(python),
        "python": platform.python_version(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "verify_peers.json"
    fresh = path.with_suffix(".json.tmp")
    fresh.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def main() -> None:
    given = sys.argv[1:]
    if not given:
        compare()
    elif len(given) == 4 and given[0] in PEERS:
        if interpreter() is None:
            sys.exit(f"{VARIABLE} is not set; the head of this file says how to set it")
        print(verdict(given[0], Path(given[1]), Path(given[2]), float(given[3])).word)
    else:
        sys.exit(f"usage: verify_peers.py [{'|'.join(PEERS)} NET PROP SECONDS]")


if __name__ == "__main__":
    main()
