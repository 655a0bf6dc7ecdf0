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
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from paired import write
from verify_families import OURS, Contender, other, ours
from verify_peers import PEERS, VARIABLE, Verdict, interpreter

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
CONTROLS = ("relu_5", "relu_6")
REPLAYED = f"{Fault.LOW_LINE}, replayed"
NUM_PLANTED, NUM_CLEAN = 2, 1


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
    seed: int = 0,
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
        seed=seed,
    )


RECIPES = {
    "relu_5": recipe((5,), (24, 24, 24), num_rounds=1000, seed=1),
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
    "attention_1x6x4": recipe((1, 6, 4), (32,), kind=Kind.ATTENTION, channels=(16,)),
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


def controlled(network: Path, prop: Property) -> dict[str, str]:
    """What verifiers with a fault say, and the one whose search is replayed."""
    said = {str(fault): str(FaultyVerifier(fault=fault).run(network, prop)) for fault in Fault}
    replayed = FaultyVerifier(fault=Fault.LOW_LINE, replayed=True)
    return {**said, REPLAYED: str(replayed.run(network, prop))}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One instance and what was said of it.

    Attributes:
        margin: by how much the planted point's class is ahead; None in a clean instance.
        lost: inputs of the network whose training failed.
        attack, strong_attack: whether they found a counterexample.
        controls: words of the verifiers that are wrong on purpose; empty where they did not run.
    """

    network: str
    instance: int
    planted: bool
    margin: float | None
    training_cpu_seconds: float
    lost: int
    attack: bool
    strong_attack: bool
    verdicts: dict[str, Verdict]
    controls: dict[str, str]


def measured(
    name: str, folder: Path, contenders: dict[str, Contender], timeout: float
) -> list[Row]:
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
        row = Row(
            network=name,
            instance=n,
            planted=planted,
            margin=checked(instance, network, prop) if planted else None,
            training_cpu_seconds=seconds,
            lost=hidden.num_lost,
            attack=attacked(network, prop),
            strong_attack=probed(instance),
            verdicts={who: run(network, path, timeout) for who, run in contenders.items()},
            controls=controlled(network, prop) if name in CONTROLS else {},
        )
        rows.append(row)
        words = ", ".join(f"{who} {v.word}" for who, v in row.verdicts.items())
        print(
            f"{name:<18}{'planted' if planted else 'clean':<9}{words}; attacks"
            f" {row.attack:d}{row.strong_attack:d} {row.controls or ''}",
            flush=True,
        )
    return rows


def unsound(rows: list[Row]) -> list[str]:
    """Verdicts that are wrong: of verifiers, and of the control without a fault."""
    found = []
    for row in rows:
        right = {k: w for k, w in row.controls.items() if k in (str(Fault.NONE), REPLAYED)}
        words = {who: v.word for who, v in row.verdicts.items()} | right
        found += [
            f"{who} says unsat on {row.network} {row.instance}, which has a counterexample"
            for who, word in words.items()
            if row.planted and word == "unsat"
        ]
    return found


def missed(rows: list[Row]) -> list[str]:
    """Faults that no instance here notices."""
    caught = {k for r in rows if r.planted for k, word in r.controls.items() if word == "unsat"}
    faults = [str(f) for f in Fault if f is not Fault.NONE]
    return [f"no instance notices {fault}" for fault in faults if fault not in caught]


def summary(rows: list[Row]) -> dict[str, object]:
    """Counts, over instances of one kind."""
    said = [{who: v.word for who, v in r.verdicts.items()} for r in rows]
    said += [{f"control: {k}": word for k, word in r.controls.items()} for r in rows]
    words = Counter((who, word) for one in said for who, word in one.items())
    return {
        "instances": len(rows),
        "found_by_attack": sum(r.attack for r in rows),
        "found_by_strong_attack": sum(r.strong_attack for r in rows),
        **{
            name: {w: count for (who, w), count in words.items() if who == name}
            for name in dict.fromkeys(who for who, _ in words)
        },
    }


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
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in RECIPES:
            if given.only in name:
                rows += measured(name, Path(folder), contenders, given.timeout)
    counts = {
        "planted": summary([r for r in rows if r.planted]),
        "clean": summary([r for r in rows if not r.planted]),
    }
    for kind, part in counts.items():
        print(kind, part)
    wrong = unsound(rows)
    if not given.only:  # a few instances need not notice every fault
        wrong += missed(rows)
        instances = [asdict(r) for r in rows]
        data = {"timeout": given.timeout, "instances": instances, "summary": counts}
        write("soundness", {**data, "wrong": wrong})
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
