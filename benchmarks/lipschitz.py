"""Lipschitz bounds side by side: tightness and CPU time of every method, SCS against Clarabel.

    python benchmarks/lipschitz.py [--check] [--clarabel]

Networks: random ReLU networks of 100 neurons in one and in two layers, the bundled digits
network, and a MaxMin network with orthogonal weights, whose constant is 1. --clarabel also
runs Clarabel on 100 neurons (a minute each). --check exits 1 if a bound is below the steepest
place found, if LipSDP is looser than a norm product, or if the MaxMin bound is above 1.001.
Writes results/lipschitz.json.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from typing import Any

import torch
from paired import write

import patchclamp
from patchclamp.methods.bounds.lipschitz import (
    Activation,
    Chain,
    Linear,
    Lipschitz,
    Method,
    Norm,
    Solver,
    SolverOptions,
    max_min,
    read_chain,
    relu,
)


def network(widths: list[int], activation: Activation, *, orthogonal: bool = False) -> Chain:
    """Random weights of spectral norm about 2, or orthogonal ones."""
    generator = torch.Generator().manual_seed(0)
    layers: list[Linear | Activation] = []
    for a, b in itertools.pairwise(widths):
        weight = torch.randn(b, a, generator=generator, dtype=torch.float64) / a**0.5
        layers += [Linear(torch.linalg.qr(weight).Q if orthogonal else weight), activation]
    return Chain(tuple(layers[:-1]), widths[0])


def row(chain: Chain, method: Lipschitz) -> dict[str, Any]:
    """One bound and what it cost."""
    began = time.process_time()
    found = method.run(chain)
    return {
        "upper": found.upper,
        "lower": found.lower,
        "solver_claim": max((a.claim for a in found.solver), default=None),
        "status": sorted({a.status for a in found.solver}),
        "cpu_seconds": time.process_time() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    parser.add_argument("--clarabel", action="store_true", help="100 neurons with Clarabel too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    chains = {
        "relu 10-100-10": network([10, 100, 10], relu()),
        "relu 10-50-50-10": network([10, 50, 50, 10], relu()),
        "digits-mlp 64-64-32-10": read_chain(patchclamp.open("digits-mlp")),
        "max_min orthogonal 16-16-16-16": network([16] * 4, max_min(), orthogonal=True),
    }
    Lipschitz().run(network([2, 2, 2], relu()))  # imports cvxpy, unmeasured
    results: dict[str, dict[str, Any]] = {}
    missed: list[str] = []
    for name, chain in chains.items():
        rows = {m.value: row(chain, Lipschitz(method=m)) for m in Method}
        rows["linf lipsdp"] = row(chain, Lipschitz(norm=Norm.LINF))
        rows["linf recursive"] = row(chain, Lipschitz(norm=Norm.LINF, method=Method.RECURSIVE))
        if given.clarabel and "relu" in name:
            options = SolverOptions(solver=Solver.CLARABEL)
            rows["lipsdp, clarabel"] = row(chain, Lipschitz(solver=options))
        missed += [f"{name}, {m}" for m, r in rows.items() if r["upper"] < r["lower"]]
        if rows["lipsdp"]["upper"] > rows["recursive"]["upper"] * 1.001:
            missed.append(f"{name}: LipSDP is looser than the recursion")
        if "orthogonal" in name and rows["lipsdp"]["upper"] > 1.001:
            missed.append(f"{name}: above 1.001")
        print(name)
        for method, found in rows.items():
            print(
                f"  {method:<18}[{found['lower']:9.4f}, {found['upper']:9.4f}]"
                f"{found['cpu_seconds']:8.2f} s  {', '.join(found['status'])}"
            )
        results[name] = rows
    write("lipschitz", {"networks": results, "missed": missed})
    if given.check and missed:
        sys.exit(f"bar missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
