"""Bounds beside auto_LiRPA's: how tight and how dear, on the four networks of `bound_networks`.

The peer goes into an environment of its own. Its newest release in the package index, 0.3, wants
a PyTorch of 2022; NeuralSAT carries a copy of 0.6.0, which is what is measured:

    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 numpy scikit-learn safetensors onnx packaging pyyaml \
        appdirs ninja gurobipy sortedcontainers termcolor jaxtyping xarray
    peers/bin/pip install --no-deps neuralsat==0.2.17
    OMP_NUM_THREADS=1 PYTHONPATH=src:benchmarks peers/bin/python benchmarks/bounds_peers.py

Both bound all outputs of a network over one box, from CROWN and from CROWN with slopes optimised
in all layers (20 steps, and 100 where that takes less than minutes). The peer's learning rate is
0.1, which its own verifier uses; its default of 0.5 gains nothing on sigmoids. Width is the mean
over outputs of upper minus lower bound. Times are CPU-seconds on one thread, medians of
interleaved rounds after one that is not counted; reading the network into either tool is timed
apart. Outside is how far any of 10,000 sampled points (half of them corners) lies outside the
bounds: more than rounding is a wrong bound. A peer that is not there is named with the reason,
and then nothing is written. Writes results/bounds_peers.json.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from bound_networks import NAMES, Problem, problem
from paired import RESULTS, _processor, measure
from torch import Tensor

import patchclamp
from patchclamp.bounding.propagate import Propagation
from patchclamp.bounding.sets import Box
from patchclamp.bounding.slopes import Optimised, SlopeSearch
from patchclamp.methods.bounds.verify import lowered

CROWN, ALPHA, LONG = "CROWN", "alpha-CROWN, 20 steps", "alpha-CROWN, 100 steps"
ROUNDS = {CROWN: 15, ALPHA: 3, LONG: 1}
STEPS = {ALPHA: 20, LONG: 100}
TOO_LONG = {"sigmoid 6x200": (LONG,)}
RATE = 0.1
OURS, PEER = "patchclamp", "auto_LiRPA"

Bounds = tuple[Tensor, Tensor]
Jobs = dict[str, Callable[[], Bounds]]


def ours(given: Problem) -> Jobs:
    """This package's bounds of every output, by method."""
    net = patchclamp.open(given.module, given.example)
    network = lowered(net.graph, [given.example], torch.float32)
    ((leaf, value),) = network.leaves.items()
    box = Box(given.low.reshape(1, *value.shape), given.high.reshape(1, *value.shape))
    num = math.prod(network.output.shape)
    rows = torch.cat([torch.eye(num), -torch.eye(num)]).reshape(1, 2 * num, *network.output.shape)
    start = {network.output: rows}, torch.zeros(1, 2 * num)

    def job(name: str) -> Callable[[], Bounds]:
        def bounded() -> Bounds:
            bounds = Propagation(network, {leaf: box})
            if name == CROWN:
                bounds.run()
                found = bounds.linearise(*start).bound
            else:
                search = SlopeSearch(num_steps=STEPS[name])
                bounds.improve = Optimised(bounds, search)
                bounds.run()
                found, _ = search.improve(bounds, start, bounds.linearise(*start).bound)
            return found[:, :num], -found[:, num:]

        return bounded

    return {name: job(name) for name in ROUNDS if name not in TOO_LONG.get(given.name, ())}


def peer(given: Problem) -> Jobs:
    """auto_LiRPA's.

    Raises: ImportError where NeuralSAT is not installed.
    """
    found = importlib.util.find_spec("src")  # NeuralSAT's name for itself
    places = list(found.submodule_search_locations or ()) if found else []
    if not places or not (Path(places[0]) / "abstractor").is_dir():
        raise ImportError("NeuralSAT, which carries auto_LiRPA, is not installed")
    root = places[0]
    if root not in sys.path:
        sys.path.append(root)
    sys.modules.setdefault("torchvision", types.ModuleType("torchvision"))
    from abstractor.auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

    ball = PerturbationLpNorm(norm=float("inf"), x_L=given.low, x_U=given.high)
    x = BoundedTensor(given.example, ball)

    def job(name: str) -> Callable[[], Bounds]:
        chosen = {"optimize_bound_args": {"iteration": STEPS.get(name, 20), "lr_alpha": RATE}}
        net = BoundedModule(given.module, given.example, bound_opts=chosen, device="cpu")
        method = "CROWN" if name == CROWN else "CROWN-Optimized"

        def bounded() -> Bounds:
            with torch.enable_grad() if name != CROWN else torch.no_grad():
                low, high = net.compute_bounds(x=(x,), method=method)
            return low.detach(), high.detach()

        return bounded

    return {name: job(name) for name in ROUNDS if name not in TOO_LONG.get(given.name, ())}


def outside(given: Problem, bounds: Bounds) -> float:
    """How far the worst of many points of the box lies outside; 0 if none does."""
    random = torch.Generator().manual_seed(0)
    at = torch.rand(10_000, *given.low.shape[1:], generator=random)
    at[::2] = at[::2].round()
    exact = copy.deepcopy(given.module).double()
    y = exact(given.low.double() + (given.high - given.low).double() * at)
    low, high = bounds
    return float(torch.maximum(low - y, y - high).max().clamp(min=0))


def compared(given: Problem, missing: dict[str, str]) -> dict[str, object]:
    """Both tools on one network; prints as it goes."""
    tools: dict[str, Jobs] = {}
    reading: dict[str, float] = {}
    for name, make in ((OURS, ours), (PEER, peer)):
        began = time.process_time()
        try:
            tools[name] = make(given)
        except ImportError as e:
            missing[name] = str(e)
            continue
        if tools[name]:
            reading[name] = time.process_time() - began
    found: dict[str, object] = {"reading_cpu_seconds": reading, "weights": digest(given)}
    for method, rounds in ROUNDS.items():
        jobs = {name: made[method] for name, made in tools.items() if method in made}
        if not jobs:
            continue
        taken = measure(jobs, rounds)
        row: dict[str, dict[str, float]] = {}
        for name, job in jobs.items():
            low, high = bounds = job()
            row[name] = {
                "width": float((high - low).mean()),
                "cpu_seconds": statistics.median(taken[name]),
                "outside": outside(given, bounds),
            }
            line = f"{given.name:<22}{method:<24}{name:<12}width {row[name]['width']:9.5f}"
            line += f"{row[name]['cpu_seconds']:10.4f} s   outside {row[name]['outside']:.0e}"
            if name == PEER and OURS in row:
                line += f"   x ours: width {row[PEER]['width'] / row[OURS]['width']:.3f},"
                line += f" time {row[PEER]['cpu_seconds'] / row[OURS]['cpu_seconds']:.2f}"
            print(line, flush=True)
        found[method] = row
    return found


def digest(given: Problem) -> str:
    """Which weights and box these were."""
    parts = [*given.module.state_dict().values(), given.low, given.high]
    text = b"".join(p.contiguous().numpy().tobytes() for p in parts)
    return hashlib.sha256(text).hexdigest()[:16]


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    missing: dict[str, str] = {}
    networks: dict[str, object] = {}
    for name in NAMES:
        try:
            networks[name] = compared(problem(name), missing)
        except FileNotFoundError as e:
            missing[name] = str(e)
    for name, why in missing.items():
        print(f"{name} is left out: {why}")
    if PEER in missing:
        return
    carried = sys.modules["abstractor.auto_LiRPA"].__version__
    data = {
        "networks": networks,
        "missing": missing,
        "rounds": ROUNDS,
        "learning_rate_of_peer": RATE,
        "hardware": {
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "versions": {
            "auto_LiRPA": f"{carried}, as carried by neuralsat {version('neuralsat')}",
            "torch": version("torch"),
            "numpy": version("numpy"),
        },
        "python": platform.python_version(),
    }
    RESULTS.mkdir(exist_ok=True)
    path: Path = RESULTS / "bounds_peers.json"
    fresh = path.with_suffix(".json.tmp")
    fresh.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(fresh, path)


if __name__ == "__main__":
    main()
