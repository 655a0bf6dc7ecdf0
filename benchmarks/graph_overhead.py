"""What the graph engine costs: a plain run, and a run that hands back every value there is.

    python benchmarks/graph_overhead.py [--check]

Bar: a plain run takes at most 1.05 of eager, CPU time, median of paired runs. Writes
results/graph_overhead.json.
"""

from __future__ import annotations

import torch
from paired import measure, opened, options, report

BAR = 1.05


def main() -> None:
    given = options(__doc__ or "")
    net, ids, bare = opened(given.model)
    everything = [a for a in net.graph.sites() if not a.endswith((".scores", ".pattern"))]
    call = net.call(ids)

    def all_values() -> object:
        with torch.no_grad():
            return net.graph.run(call, record=everything)

    every = f"graph run, all {len(everything)} values"
    taken = measure(
        {"eager": bare, "graph run": lambda: net.run(ids, engine="graph")}, given.rounds
    )
    # apart, because gigabytes of values that come and go slow down whoever runs next
    taken |= measure({"eager beside it": bare, every: all_values}, max(5, given.rounds // 3))
    difference = float((net.run(ids, engine="graph").output - bare()).abs().max())  # type: ignore[operator]
    quality = {"largest difference of a logit": difference}
    pairs = {"graph run": "eager", every: "eager beside it"}
    bars = {"graph run": BAR}
    report("graph_overhead", net, taken, pairs, bars, quality, check=given.check)


if __name__ == "__main__":
    main()
