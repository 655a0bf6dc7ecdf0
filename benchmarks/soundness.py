"""Networks with hidden counterexamples: does a verifier say `unsat` where there is one?

    python benchmarks/soundness.py [--timeout S] [--only NAME] [--peers]

Trains the networks of `RECIPES`, writes them as files, and asks on every instance: two attacks
(our verifier's own, and `STRONG`), `patchclamp verify`, with --peers Marabou and NeuralSAT
(`verify_peers.py` says how to get them), and on the small dense ReLU networks verifiers that
are wrong on purpose. Before anything is asked, every planted point is checked in the files: in
float64 and in onnxruntime, and inside the box by exact comparison. Exit status 1 if a verifier
says unsat on an instance with a planted point, if one that is wrong on purpose is not caught
(each fault has to be, at least once), or if the same search without a fault is. Writes
results/soundness.json, but not with --only.

Source: Zhou et al. 2024, arXiv 2412.03154.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from paired import write
from verify_families import OURS, Contender, other, ours
from verify_peers import PEERS, VARIABLE, interpreter

import patchclamp
from patchclamp.methods.bounds.counterexample import Replay
from patchclamp.methods.bounds.property import Property
from patchclamp.methods.bounds.search.attack import Attack
from patchclamp.methods.bounds.search.goal import goals
from patchclamp.methods.bounds.search.limits import Limits
from patchclamp.methods.bounds.verify import lowered
from patchclamp.methods.bounds.vnnlib import read_property
from patchclamp.truth.hidden_counterexamples import (
    Activation,
    Anatomy,
    Fault,
    FaultyVerifier,
    HiddenCounterexamples,
    Instance,
    Kind,
    Probe,
    write_network,
    write_property,
)

STRONG = Probe(num_restarts=1000, num_steps=50)
CONTROLS = ("relu_5", "relu_6", "relu_8")
REPLAYED = f"{Fault.LOW_LINE}, replayed"
NUM_PLANTED, NUM_CLEAN = 3, 1


def recipe(
    shape: tuple[int, ...],
    widths: tuple[int, ...],
    *,
    kind: Kind = Kind.DENSE,
    activation: Activation = Activation.RELU,
    channels: tuple[int, ...] = (8,),
    num_classes: int = 2,
    eps: float = 0.2,
    num_rounds: int = 1500,
) -> HiddenCounterexamples:
    """Inputs within five radii of 0."""
    return HiddenCounterexamples(
        anatomy=Anatomy(
            kind=kind,
            activation=activation,
            shape=shape,
            widths=widths,
            channels=channels,
            num_classes=num_classes,
        ),
        eps=eps,
        spread=5 * eps,
        num_planted=NUM_PLANTED,
        num_clean=NUM_CLEAN,
        num_rounds=num_rounds,
    )


RECIPES = {
    "relu_5": recipe((5,), (24, 24, 24)),
    "relu_6": recipe((6,), (32, 32)),
    "relu_8": recipe((8,), (32, 32, 32)),
    "relu_10_wide_box": recipe((10,), (64, 64), eps=0.5, num_classes=3),
    "sigmoid_8": recipe((8,), (64, 64), activation=Activation.SIGMOID, num_rounds=2500),
    "tanh_8": recipe((8,), (64, 64), activation=Activation.TANH, num_rounds=2500),
    "relu_25": recipe((25,), (128, 64), num_classes=3),
    "conv_1x5x5": recipe((1, 5, 5), (64,), kind=Kind.CONV, channels=(8, 8)),
    "conv_tanh_1x5x5": recipe(
        (1, 5, 5), (64,), kind=Kind.CONV, channels=(8,), activation=Activation.TANH
    ),
    "conv_3x8x8": recipe((3, 8, 8), (64,), kind=Kind.CONV, channels=(8, 8), num_rounds=1000),
    "attention_1x4x4": recipe((1, 4, 4), (32,), kind=Kind.ATTENTION, channels=(16,)),
}


def checked(instance: Instance, network: Path, prop: Property) -> float:
    """The planted point's margin in the files, the worse of float64 and onnxruntime.

    Raises: RuntimeError if the files have no counterexample there.
    """
    if instance.planted is None:
        raise ValueError("a clean instance has no planted point")
    point = instance.planted.flatten().double().numpy()
    found = Replay(network).confirm(prop, point)
    inside = all((c.lower <= point).all() and (point <= c.upper).all() for c in prop.cases)
    unmoved = (found.x == point).all()
    ahead = float(instance.margin(instance.planted))
    if not inside or not unmoved or found.margin > 0 or not found.holds_in_runtime or ahead <= 0:
        raise RuntimeError(f"the planted point is no counterexample of {network.name}")
    return ahead


def attacked(network: Path, prop: Property) -> bool:
    """Whether our verifier's attack, alone, finds a counterexample."""
    net = patchclamp.open(network)
    rules = lowered(net.graph, [x[:1] for x in net.example.tensors()], torch.float32)
    return any(Attack().run(rules, goal, Limits(60)) is not None for goal in goals(prop.cases))


def probed(instance: Instance) -> bool:
    """Whether the strong attack does."""
    _, margin = STRONG.run(
        instance.module,
        instance.x,
        torch.tensor([instance.label]),
        instance.eps,
        torch.Generator().manual_seed(1),
    )
    return bool(margin > 0)


def controlled(network: Path, prop: Property, timeout: float) -> dict[str, str]:
    """What verifiers with a fault say, and the one whose search is replayed."""
    said = {
        str(fault): str(FaultyVerifier(fault=fault, timeout=timeout).run(network, prop))
        for fault in Fault
    }
    replayed = FaultyVerifier(fault=Fault.LOW_LINE, replayed=True, timeout=timeout)
    return {**said, REPLAYED: str(replayed.run(network, prop))}


def measured(
    name: str, folder: Path, contenders: dict[str, Contender], timeout: float
) -> list[dict[str, object]]:
    """Train one network, and a row for each of its instances."""
    began = time.process_time()
    hidden = RECIPES[name].run()
    seconds = time.process_time() - began
    network = folder / f"{name}.onnx"
    write_network(hidden.planted[0], network)
    rows = []
    for n, instance in enumerate((*hidden.planted, *hidden.clean)):
        path = folder / f"{name}_{n}.vnnlib"
        write_property(instance, path)
        prop = read_property(path)
        planted = instance.planted is not None
        row: dict[str, object] = {"network": name, "instance": n, "planted": planted}
        row["margin"] = checked(instance, network, prop) if planted else None
        row |= {"training_cpu_seconds": seconds, "lost": hidden.num_lost}
        row |= {"attack": attacked(network, prop), "strong_attack": probed(instance)}
        words = {}
        for contender, run in contenders.items():
            verdict = run(network, path, timeout)
            row[contender] = asdict(verdict)
            words[contender] = verdict.word
        if name in CONTROLS:
            row["controls"] = controlled(network, prop, timeout)
        rows.append(row)
        attacks = [k for k in ("attack", "strong_attack") if row[k]]
        print(
            f"{name:<18}{'planted' if planted else 'clean':<9}{words} "
            f"found by {attacks} {row.get('controls', '')}",
            flush=True,
        )
    return rows


def faults(rows: list[dict[str, object]], contenders: list[str]) -> list[str]:
    """What may not be: unsound verdicts of verifiers, and faults that were not caught."""
    planted = [r for r in rows if r["planted"]]
    wrong = [
        f"{name} says unsat on {r['network']} {r['instance']}, which has a counterexample"
        for r in planted
        for name in contenders
        if r[name]["word"] == "unsat"  # type: ignore[index]  # a verdict
    ]
    said = [r["controls"] for r in planted if "controls" in r]
    if said:
        caught = {k: any(words[k] == "unsat" for words in said) for k in said[0]}  # type: ignore[index,union-attr]  # words
        right = (str(Fault.NONE), REPLAYED)
        wrong += [f"{k} says unsat where a counterexample is" for k in right if caught[k]]
        wrong += [f"nothing here notices {k}" for k in caught if k not in right and not caught[k]]
    return wrong


def summary(rows: list[dict[str, object]], contenders: list[str]) -> dict[str, object]:
    """Counts over the instances with a planted point and the clean ones."""
    made: dict[str, object] = {}
    for kind, part in (
        ("planted", [r for r in rows if r["planted"]]),
        ("clean", [r for r in rows if not r["planted"]]),
    ):
        counts: dict[str, object] = {"instances": len(part)}
        counts |= {k: sum(bool(r[k]) for r in part) for k in ("attack", "strong_attack")}
        for name in contenders:
            counts[name] = dict(Counter(r[name]["word"] for r in part))  # type: ignore[index]  # a verdict
        said = [r["controls"] for r in part if "controls" in r]
        for k in said[0] if said else ():  # type: ignore[attr-defined]  # words
            counts[f"control {k}"] = dict(Counter(words[k] for words in said))  # type: ignore[index]
        made[kind] = counts
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--timeout", type=float, default=20.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--peers", action="store_true")
    given = parser.parse_args()
    if given.peers and interpreter() is None:
        sys.exit(f"{VARIABLE} is not set; the head of verify_peers.py says how to set it")
    contenders: dict[str, Contender] = {OURS: ours}
    if given.peers:
        contenders |= {peer: other(peer) for peer in PEERS}
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in RECIPES:
            if given.only in name:
                rows += measured(name, Path(folder), contenders, given.timeout)
    wrong, counts = faults(rows, list(contenders)), summary(rows, list(contenders))
    for kind, part in counts.items():
        print(kind, part)
    if not given.only:
        data = {"timeout": given.timeout, "instances": rows, "summary": counts, "wrong": wrong}
        write("soundness", data)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
