"""What it costs to record one residual site per layer, next to the bare forward pass.

    python benchmarks/record_overhead.py [--check]

Bar: at most 1.10 of the bare forward pass, CPU time, median of paired runs. Both
engines are measured, and a plain loop of forward hooks that clone, which is what one
would write by hand. Writes results/record_overhead.json.
"""

from __future__ import annotations

import torch
from paired import measure, opened, options, report

BAR = 1.10


def main() -> None:
    given = options(__doc__ or "")
    net, ids, bare = opened(given.model)
    sites = [f"resid_post.{n}" for n in range(net.num_layers)]
    modules = [net.module.get_submodule(net.sites[s].site.module) for s in sites]

    def by_hand() -> dict[int, torch.Tensor]:
        kept: dict[int, torch.Tensor] = {}

        def hook(number: int) -> object:
            def keep(module: object, args: object, output: object) -> None:
                value = output if isinstance(output, torch.Tensor) else output[0]  # type: ignore[index]
                kept[number] = value.detach().clone()

            return keep

        handles = [m.register_forward_hook(hook(n)) for n, m in enumerate(modules)]  # type: ignore[arg-type]
        try:
            bare()
        finally:
            for handle in handles:
                handle.remove()
        return kept

    taken = measure(
        {
            "bare forward pass": bare,
            "hooks engine": lambda: net.run(ids, record=sites, engine="hooks"),
            "graph engine": lambda: net.run(ids, record=sites, engine="graph"),
            "hooks written by hand": by_hand,
        },
        given.rounds,
    )
    reference, logits = by_hand(), bare()
    quality = {}
    for engine in ("hooks", "graph"):
        run = net.run(ids, record=sites, engine=engine)
        worst = max(
            float((run.acts.tensor(s) - reference[n]).abs().max()) for n, s in enumerate(sites)
        )
        quality[f"{engine}: largest difference of a value"] = worst
        quality[f"{engine}: largest difference of a logit"] = float(
            (run.output - logits).abs().max()  # type: ignore[operator]
        )
    bars = {"hooks engine": BAR, "graph engine": BAR}
    pairs = {name: "bare forward pass" for name in taken if name != "bare forward pass"}
    report("record_overhead", net, taken, pairs, bars, quality, check=given.check)


if __name__ == "__main__":
    main()
