"""What edges cost: all of them to first order, and each of them exactly.

    python benchmarks/edge_cost.py [--check] [--every 4]

On a GPT-2-small-shaped network (12 layers, 12 heads, random weights, 4 x 12 tokens; the
pairs differ in one token of the ninth position). Bars: edge attribution from one run
costs at most 3 times a plain forward and backward; an exact edge at most 1/20 of a
plain forward. CPU time, medians of paired rounds; exact edges are measured for all
writers of every n-th reader. Writes results/edge_cost.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import numpy as np
import torch
from paired import measure, ratio, write
from transformers import GPT2Config, GPT2LMHeadModel

import patchclamp
from patchclamp.methods.circuits.checking.metrics import LogitDifference
from patchclamp.methods.circuits.finding.edge_attribution import Direction, EdgeAttribution, Path
from patchclamp.methods.circuits.finding.exact_edges import ExactEdges
from patchclamp.methods.circuits.network.ablation import Ablation, References
from patchclamp.methods.circuits.network.contrast import contrast
from patchclamp.methods.circuits.network.masks import metric_rows
from patchclamp.methods.circuits.network.wiring import wire

ROWS, LENGTH, CHANGED = 4, 12, 8
ATTRIBUTION_BAR, EXACT_BAR = 3.0, 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--every", type=int, default=4, help="measure every n-th reader exactly")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=2)).eval()
    clean = torch.randint(3, 50_000, (ROWS, LENGTH))
    corrupt = clean.clone()
    corrupt[:, CHANGED] = torch.randint(3, 50_000, (ROWS,))
    net = patchclamp.open(module, {"input_ids": clean})
    answers = torch.randint(3, 50_000, (2, ROWS, 1))
    metric = LogitDifference(correct=answers[0], wrong=answers[1])
    wiring = wire(net)
    pairs = contrast(net, {"input_ids": clean}, {"input_ids": corrupt}, metric)

    def forward() -> None:
        with torch.no_grad():
            module(input_ids=clean)

    def forward_and_backward() -> None:
        logits = module(input_ids=clean).logits[:, -1]
        metric(logits, torch.arange(ROWS)).sum().backward()
        module.zero_grad()

    one_run = EdgeAttribution(direction=Direction.NOISING, path=Path.NONE)
    both_ends = EdgeAttribution(direction=Direction.BOTH, path=Path.NONE)
    jobs = {
        "forward": forward,
        "forward and backward": forward_and_backward,
        "edge attribution, one run": lambda: one_run.run(wiring, pairs),
        "edge attribution, both ends": lambda: both_ends.run(wiring, pairs),
        "edge attribution, default": lambda: EdgeAttribution().run(wiring, pairs),
    }
    taken = measure(jobs, given.rounds)
    base = "forward and backward"
    ratios = {name: ratio(taken, name, base) for name in jobs if name.startswith("edge")}

    where = [
        circuit_edge
        for circuit_edge in np.argwhere(wiring.possible)
        if circuit_edge[0] % given.every == 0
    ]
    edges = [wiring.edge(int(r), int(w)) for r, w in where]
    exact = ExactEdges(direction=Direction.NOISING, max_rows=512)
    began = time.process_time()
    effects = exact.run(wiring, pairs, edges)
    seconds = time.process_time() - began
    forwards = measure({"forward": forward}, given.rounds)["forward"]
    times = statistics.median(forwards) * len(edges) / seconds

    sample = where[:: max(1, len(where) // 24)]
    masks = [wiring.possible.copy() for _ in sample]
    for mask, (r, w) in zip(masks, sample, strict=True):
        mask[r, w] = False
    rows = metric_rows(
        wiring, [pairs], [wiring.possible, *masks], References(kind=Ablation.RESAMPLE)
    )
    place = {(int(r), int(w)): i for i, (r, w) in enumerate(where)}
    measured = effects.noising[[place[int(r), int(w)] for r, w in sample]]
    error = float((measured - (rows[1:] - rows[0])).abs().max())

    print(f"{wiring.possible.sum()} edges, {ROWS} x {LENGTH} tokens, CPU time, median")
    for name, times_taken in taken.items():
        shown = f"{ratios[name]['median']:8.2f} x" if name in ratios else ""
        print(f"  {name:<34}{statistics.median(times_taken):8.3f} s{shown}")
    print(f"  {'exact edge, of ' + str(len(edges)):<34}{seconds / len(edges):8.4f} s")
    print(f"  forwards per exact edge: 1 / {times:.1f}; largest difference to masks {error:.1e}")
    missed = []
    if ratios["edge attribution, one run"]["median"] > ATTRIBUTION_BAR:
        missed.append("edge attribution")
    if times < EXACT_BAR:
        missed.append("exact edges")
    write(
        "edge_cost",
        {
            "model": "GPT-2-small-shaped, random weights",
            "tokens": [ROWS, LENGTH],
            "edges": int(wiring.possible.sum()),
            "cpu_seconds_median": {n: statistics.median(t) for n, t in taken.items()},
            "ratio": ratios,
            "exact_edges_measured": len(edges),
            "exact_edge_cpu_seconds": seconds / len(edges),
            "forward_over_exact_edge": times,
            "bars": {"edge attribution, one run": ATTRIBUTION_BAR, "exact edges": EXACT_BAR},
            "missed": missed,
            "quality": {"largest difference of an effect to masks": error},
        },
    )
    if given.check and missed:
        raise SystemExit(f"bar missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
