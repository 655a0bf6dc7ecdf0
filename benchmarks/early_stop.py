"""A run that only needs an early layer stops there: the cost of layer 3 against all layers.

    python benchmarks/early_stop.py [--check]

Layers up to and including number 3 are the first four, so the bar is their share
of the layers, plus five hundredths for embedding and overhead. The bar is for CPU time,
median of paired runs, of both engines. Writes results/early_stop.json.
"""

from __future__ import annotations

from paired import measure, opened, options, report

LAYER = 3
MARGIN = 0.05


def main() -> None:
    given = options(__doc__ or "")
    net, ids, bare = opened(given.model)
    layer = min(LAYER, net.num_layers - 1)
    site = f"resid_post.{layer}"
    taken = measure(
        {
            "bare forward pass": bare,
            "hooks engine, stops": lambda: net.record(ids, site, engine="hooks"),
            "graph engine, stops": lambda: net.record(ids, site, engine="graph"),
            "hooks engine, runs on": lambda: net.run(ids, record=site, engine="hooks"),
        },
        given.rounds,
    )
    whole = net.run(ids, record=site, engine="hooks").acts.tensor(site)
    quality = {
        f"{engine}: largest difference of a value": float(
            (net.record(ids, site, engine=engine).tensor(site) - whole).abs().max()
        )
        for engine in ("hooks", "graph")
    }
    bar = (layer + 1) / net.num_layers + MARGIN
    bars = {"hooks engine, stops": bar, "graph engine, stops": bar}
    pairs = {name: "bare forward pass" for name in taken if name != "bare forward pass"}
    report("early_stop", net, taken, pairs, bars, quality, check=given.check)


if __name__ == "__main__":
    main()
