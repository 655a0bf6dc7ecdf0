"""Benches for attribution: bars of the planted truth, and what gradients and controls score.

    python benchmarks/attribution_benches.py [--check] [--seeds N] [--quick]

Blocks: signal mass of plain gradients in the standard, the top and the robust network, for a
perceptron and a convolutional network. Glyphs, lesions, region, slabs: the gate, gradients and
controls. DiffROAR on the digits, with mask-only accuracies; layers made random. --quick leaves
out the convolutional blocks. --check exits 1 if a bar is missed. Writes
results/attribution_benches.json; five minutes on one core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from paired import write

import patchclamp
from patchclamp.data import load_data
from patchclamp.methods.attribution.gradients.plain import Gradient, GradientTimesValue
from patchclamp.truth.attribution import (
    AbsoluteValue,
    Blocks,
    BrightRegion,
    Build,
    DiffRoar,
    Glyphs,
    Lesions,
    PlantedMaps,
    RandomiseLayers,
    RandomMap,
    RandomWeights,
    Recipe,
    SlabMaps,
    Slabs,
    Variant,
    controls_of,
    convolutional,
    perceptron,
)

BARS = {"perceptron": (0.30, 0.25), "convolutional": (0.10, 0.15)}
"""Least signal mass of the top, and of the robust network, above the standard one's."""

BLOCKS: dict[str, tuple[Build, Recipe]] = {
    "perceptron": (perceptron, Recipe(radius=1.0)),
    "convolutional": (convolutional, Recipe(epochs=15, radius=1.0)),
}
AWAY = 0.05
"""How far a control may be from chance."""


def looked_at(planted: PlantedMaps) -> dict[str, Any]:
    """The gate, and the signal mass of gradients and of every control."""
    in_space = planted.inputs.ndim == 4
    methods = [Gradient(), GradientTimesValue()]
    controls = controls_of(Gradient(), space=in_space, moving=planted.moving)
    scores = {}
    for method in (*methods, *controls):
        maps = method.run(planted.net, planted.inputs, planted.labels)
        found = planted.scores(maps, allow_empty=True)
        scores[method.name] = {
            "signal_mass": found.signal_mass.mean,
            "interval": [found.signal_mass.interval.low, found.signal_mass.interval.high],
            "pointing": found.pointing.mean,
            "area": found.area.mean,
        }
    gate = planted.gate
    return {
        "accuracy": gate.accuracy.value,
        "without_target": gate.without_target.value,
        "without_distractor": gate.without_distractor and gate.without_distractor.value,
        "failures": list(gate.failures),
        "scores": scores,
        "controls": [c.name for c in controls],
    }


def mass(row: dict[str, Any], method: str = "gradient") -> float:
    """Signal mass of one method."""
    return float(row["scores"][method]["signal_mass"])


def blocks(kinds: list[str], seeds: range) -> tuple[dict[str, Any], list[str]]:
    """All three variants, and which bars are missed."""
    rows: dict[str, Any] = {}
    missed = []
    for kind in kinds:
        build, recipe = BLOCKS[kind]
        for seed in seeds:
            made = {}
            for variant in Variant:
                began = time.process_time()
                planted = Blocks(variant=variant, build=build, recipe=recipe, seed=seed).run()
                made[variant.value] = looked_at(planted) | {
                    "cpu_seconds": time.process_time() - began
                }
            base = mass(made["standard"])
            for variant, bar in zip(("top", "robust"), BARS[kind], strict=True):
                above = mass(made[variant]) - base
                print(f"blocks {kind} seed {seed}: {variant} - standard {above:.3f} (bar {bar})")
                made[variant]["above_standard"] = above
                if above < bar:
                    missed.append(f"blocks {kind} seed {seed}: {variant}")
            # where the digit is always on top, another image's map and edges are no controls
            for variant in ("standard", "robust"):
                missed += far(f"blocks {kind} seed {seed} {variant}", made[variant])
            rows[f"{kind}/{seed}"] = made
    return rows, missed


def far(name: str, row: dict[str, Any]) -> list[str]:
    """Controls that are not at chance."""
    values = {c: mass(row, c) for c in row["controls"]}
    shown = ", ".join(f"{c} {v:.3f}" for c, v in values.items())
    print(f"{name}: gradient {mass(row):.3f}; {shown}")
    return [f"{name}: {c} at {v:.3f}" for c, v in values.items() if abs(v - 0.5) > AWAY]


def others(seeds: range) -> tuple[dict[str, Any], list[str]]:
    """The benches with a gate that must hold."""
    made: dict[str, Callable[[int], PlantedMaps]] = {
        "glyphs": lambda seed: Glyphs(seed=seed).run(),
        "lesions": lambda seed: Lesions(seed=seed).run(),
        "bright_region": lambda seed: BrightRegion(seed=seed).run(),
        "slabs": lambda seed: Slabs(seed=seed).run(),
        "slabs, control": lambda seed: Slabs(simple=False, seed=seed).run(),
    }
    rows: dict[str, Any] = {}
    missed = []
    for name, bench in made.items():
        for seed in seeds:
            began = time.process_time()
            planted = bench(seed)
            row = looked_at(planted) | {"cpu_seconds": time.process_time() - began}
            if isinstance(planted, SlabMaps):
                row["areas"] = [planted.area, planted.area_simple, planted.area_complex]
                hidden = planted.area_complex if "control" in name else planted.area_simple
                if abs(hidden - 0.5) > AWAY:
                    missed.append(f"{name} seed {seed}: randomised area {hidden:.3f}")
            missed += [f"{name} seed {seed}: {f}" for f in planted.gate.failures]
            away = far(f"{name} seed {seed}", row)
            missed += [m for m in away if "sobel" in m]
            rows[f"{name}/{seed}"] = row
    return rows, missed


def retrained() -> dict[str, Any]:
    """DiffROAR on the bundled digits."""
    train, test = (load_data("digits", split=s) for s in ("train", "test"))
    net = patchclamp.open("digits-mlp")
    rows: dict[str, Any] = {}
    methods = (Gradient(), GradientTimesValue(), RandomWeights(method=Gradient()))
    for method in (*methods, AbsoluteValue(), RandomMap()):
        assert train.labels is not None
        assert test.labels is not None
        found = DiffRoar().of_method(
            method, net, (train.inputs, train.labels), (test.inputs, test.labels)
        )
        names = ("whole", "top", "bottom", "mask_top", "mask_bottom", "difference", "beyond_mask")
        rows[method.name] = {n: getattr(found, n).mean for n in names}
        shown = ", ".join(f"{n} {v:.3f}" for n, v in rows[method.name].items())
        print(f"DiffROAR {method.name}: {shown}")
    return rows


def randomised() -> dict[str, Any]:
    """Rank correlation of gradients after layers are made random, from the output down."""
    data = load_data("digits").subset(60)
    found = RandomiseLayers().run(
        Gradient(), patchclamp.open("digits-cnn"), data.inputs, data.labels
    )
    return {step.layer: step.spearman.mean for step in found.steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="no convolutional blocks")
    given = parser.parse_args()
    torch.set_num_threads(1)
    kinds = ["perceptron"] if given.quick else [*BLOCKS]
    seeds = range(given.seeds)
    in_blocks, missed = blocks(kinds, seeds)
    in_others, more = others(seeds)
    missed += more
    medians = {
        kind: {
            v: statistics.median(in_blocks[f"{kind}/{s}"][v]["above_standard"] for s in seeds)
            for v in ("top", "robust")
        }
        for kind in kinds
    }
    print(medians, "missed:", missed or "nothing")
    write(
        "attribution_benches",
        {
            "bars": {k: list(v) for k, v in BARS.items()},
            "above_standard_median": medians,
            "blocks": in_blocks,
            "benches": in_others,
            "diffroar": retrained(),
            "randomised_layers_spearman": randomised(),
            "missed": missed,
        },
    )
    if given.check and missed:
        sys.exit(f"bar missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
