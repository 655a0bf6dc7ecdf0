"""Write the figures of benchmarks/results into the README, between its two marks.

    python scripts/readme_figures.py [--check]

With --check nothing is written, and the exit code is 1 if the README is behind.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKS = re.compile(r"<!-- figures -->\n.*?<!-- /figures -->", re.DOTALL)


def read(name: str) -> dict:
    """One benchmark's results."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def table() -> str:
    """The figures as a Markdown table: what, measured, bar."""
    rows: list[tuple[str, str, str]] = []
    record, graph, early = read("record_overhead"), read("graph_overhead"), read("early_stop")
    what = "recording one residual site per layer, over the bare forward pass"
    for engine in ("hooks engine", "graph engine"):
        rows.append((f"{what}: {engine}", ratio(record, engine), bar(record, engine)))
    rows.append(("graph run over eager", ratio(graph, "graph run"), bar(graph, "graph run")))
    every = next(name for name in graph["ratio"] if name != "graph run")
    rows.append((f"{every}, over eager", ratio(graph, every), ""))
    for engine in ("hooks engine, stops", "graph engine, stops"):
        label = f"a run that needs layer 3 only ({engine.split(',')[0]}), over a whole one"
        rows.append((label, ratio(early, engine), bar(early, engine)))
    opening = read("open_time")
    rows.append(
        (
            "opening SmolLM2 again, over the first time",
            f"{opening['ratio']:.2f} ({opening['later_cpu_seconds']:.1f} of "
            f"{opening['first_cpu_seconds']:.0f} CPU s)",
            f"{opening['bar']:.2f}",
        )
    )
    for name, audit in read("audit_time")["audits"].items():
        rows.append(
            (
                f"audit of {name}, wall time on two cores",
                f"{audit['wall_seconds']:.0f} s",
                f"{audit['bar_wall_seconds']:.0f} s",
            )
        )
    store = read("store_throughput")["results"]["float16"]["rows_per_cpu_second"]
    for name in ("store_slices", "store_shuffled"):
        label = name.replace("_", " ") + ", rows of 576 values in fp16 per CPU second"
        rows.append((label, f"{store[name]['median'] / 1e6:.1f} M", ""))
    rows += circuits()
    rows += bounds()
    rows += attribution()
    lines = ["| what | measured | bar |", "|---|---|---|"]
    lines += [f"| {a} | {b} | {c} |" for a, b, c in rows]
    return "\n".join(lines)


def circuits() -> list[tuple[str, str, str]]:
    """Sweeps, edges, and how well planted circuits are found."""
    sweep, peers, edges = read("sweep_speed"), read("sweep_peers"), read("edge_cost")
    rows = [
        (f"sweep of SmolLM2, {name}", f"{value:.1f} x", f"{sweep['bars'][name]:.0f} x")
        for name, value in sweep["ratio"].items()
    ]
    for what, times in peers["ratio_to_ours"].items():
        label = f"sweep of a GPT-2-small-shaped network, {what}, over TransformerLens / nnsight"
        rows.append((label, f"{times['transformer-lens']:.1f} x / {times['nnsight']:.1f} x", ""))
    for name, value in edges["ratio"].items():
        bar = f"{edges['bars'][name]:.0f}" if name in edges["bars"] else ""
        rows.append((f"{name}, over a forward and backward pass", f"{value['median']:.1f}", bar))
    rows.append(
        (
            "exact edges in the time of one forward pass",
            f"{edges['forward_over_exact_edge']:.0f}",
            f"{edges['bars']['exact edges']:.0f}",
        )
    )
    for name, bar in read("circuit_recovery")["bars"].items():
        if "AUROC" in name and not name.startswith("random"):
            found = f"{bar['found']:.3f}"
            rows.append((f"planted edges found: {name}", found, f"{bar['at_least']:.2f}"))
    return rows


def bounds() -> list[tuple[str, str, str]]:
    """Bounds beside a peer's, and the verifier on the networks with known verdicts."""
    rows = []
    for name, methods in read("bounds_peers")["networks"].items():
        for method, made in methods.items():
            if not method.startswith(("CROWN", "alpha")) or "100" in method:
                continue
            ours, theirs = made["patchclamp"], made["auto_LiRPA"]
            speed = theirs["cpu_seconds"] / ours["cpu_seconds"]
            rows.append(
                (
                    f"{method} of {name}: width, theirs / ours (auto_LiRPA 0.6); times faster",
                    f"{theirs['width']:.4g} / {ours['width']:.4g}; {speed:.1f} x",
                    "2 x",
                )
            )
    found = read("acasxu")["summary"]
    rows.append(("ACAS Xu, 116 s each: solved of 186", str(found["solved"]), "180"))
    rows.append(("ACAS Xu: wrong verdicts", str(found["wrong"]), "0"))
    median = f"{found['median_cpu_seconds']:.2f}"
    rows.append(("ACAS Xu: median CPU seconds, imports apart", median, "3"))
    planted = read("soundness")["summary"]["planted"]
    for who in ("patchclamp", "marabou", "neuralsat"):
        said = planted[who]
        found_by = f"{said.get('sat', 0)} / {said.get('unsat', 0)}"
        label = f"of {planted['instances']} hidden counterexamples: found / denied by {who}"
        rows.append((label, found_by, "none denied"))
    return rows


def attribution() -> list[tuple[str, str, str]]:
    """What maps cost, and how far integrated gradients are off."""
    cost = read("attribution_cost")
    rows = [
        (
            f"{name} on EfficientNet-Lite0, in passes forwards and backwards",
            f"{cost['passes'][name]['median']:.3g}",
            f"{limit:g}",
        )
        for name, limit in cost["bars"].items()
    ]
    for name, limit in cost["memory_bars"].items():
        mib, peer = (cost["mib_above_the_model"][k] for k in (name, f"captum: {name}"))
        rows.append(
            (f"{name}: MiB above the model, ours / captum", f"{mib:.0f} / {peer:.0f}", f"{limit}")
        )
    complete = cost["completeness"]
    num = len(complete["rows"])
    rows.append(
        (
            f"integrated gradients: of {num} {complete['images']}, error at most 5%",
            str(complete["met"]),
            "18",
        )
    )
    return rows


def ratio(data: dict, name: str) -> str:
    """A median ratio."""
    return f"{data['ratio'][name]['median']:.2f}"


def bar(data: dict, name: str) -> str:
    """Its bar, where it has one."""
    return f"{data['bars'][name]:.2f}" if name in data["bars"] else ""


def main() -> None:
    path = ROOT / "README.md"
    old = path.read_text("utf-8")
    new = MARKS.sub(f"<!-- figures -->\n{table()}\n<!-- /figures -->", old)
    if "--check" in sys.argv[1:]:
        sys.exit(old != new)
    path.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
