"""Does writing the intermediate step down let a network combine facts it never combined?

In a small world a relation leads from every entity to another, `h r -> t`. All these atomic
facts are trained, and some two-hop facts: from h by r1 to the bridge, from there by r2 to the
answer. One network learns `h r1 r2 -> answer`; the other, with chain of thought, writes the
bridge first, `h r1 r2 -> bridge answer`.

Held-out two-hop facts are *in distribution* where both their atomic facts occur in trained
two-hop facts, in other combinations, and *out of it* where neither does. Then we ask what each
of the two steps of the second network reads: one token is changed at a time, the residual
stream is patched at every layer and position, and every edge of the network is cut.

Run: python examples/chain_of_thought.py [--seeds 3] [--steps 2000]
After Yao et al. 2025, "Unveiling the Mechanisms of Explicit CoT Training"; the kind of data
is that of Wang et al. 2024, "Grokked Transformers".
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  (the name that torch's own documentation uses)
from torch import Tensor, nn

import patchclamp
from patchclamp.core.circuit import Circuit
from patchclamp.core.findings import Interval
from patchclamp.methods.circuits.checking.evaluation import Evaluation, Point
from patchclamp.methods.circuits.checking.metrics import LogitDifference
from patchclamp.methods.circuits.comparing.comparison import CircuitComparison
from patchclamp.methods.circuits.finding.edge_attribution import EdgeAttribution
from patchclamp.methods.circuits.finding.exact_edges import ExactEdges, verified
from patchclamp.methods.circuits.network.contrast import Contrast, contrast
from patchclamp.methods.circuits.network.wiring import Wiring, wire
from patchclamp.methods.statistics import wilson
from patchclamp.net import Net
from patchclamp.specimens import build

PARTS = ("h", "r1", "r2", "bridge")
STAGES = {"one": 2, "two": 3}
"""Where the bridge is predicted, and where the answer is: positions, and the parts so far."""
CLAIMED = {"one": ("h", "r1"), "two": ("r2", "bridge")}
READ, NOT_READ = 0.5, 0.1
"""Changing what a stage reads changes more than half of its answers, changing anything else
fewer than a tenth: the whole interval must lie there. Set before any run."""
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
Readings = dict[tuple[str, str], tuple[Tensor, Tensor]]
"""By stage and changed token: which answers change, and which become what then follows."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the world, the network and its training."""

    entities: int = 40
    relations: int = 8
    ood_share: float = 0.25
    held_out: int = 240
    width: int = 64
    layers: int = 3
    steps: int = 2000
    batch: int = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """What (entity, relation) leads to; atomic facts (fact, 3); two-hop facts (fact, 5) by kind."""

    leads: Tensor
    atoms: Tensor
    facts: dict[str, Tensor]


def world(sizes: Sizes, seed: int) -> World:
    """Draw a world and split its facts."""
    generator = torch.Generator().manual_seed(seed)
    num, kinds = sizes.entities, sizes.relations
    leads = torch.randint(num, (num, kinds), generator=generator)
    order = torch.randperm(num * kinds, generator=generator)
    rare = (order < sizes.ood_share * num * kinds).view(num, kinds)
    h, r = torch.cartesian_prod(torch.arange(num), torch.arange(kinds)).T
    x, r1, r2 = torch.cartesian_prod(*map(torch.arange, (num, kinds, kinds))).T
    bridge = leads[x, r1]
    facts = torch.stack([x, r1 + num, r2 + num, bridge, leads[bridge, r2]], 1)
    common = facts[~rare[x, r1] & ~rare[bridge, r2]]
    common = common[torch.randperm(len(common), generator=generator)]
    hops = {"trained": common[sizes.held_out :], "in distribution": common[: sizes.held_out]}
    hops["out of it"] = facts[rare[x, r1] & rare[bridge, r2]]
    return World(leads=leads, atoms=torch.stack([h, r + num, leads[h, r]], 1), facts=hops)


def training_rows(given: World, sizes: Sizes, *, thought: bool) -> tuple[Tensor, Tensor]:
    """Tokens and targets, (row, position). Targets are answers, and the bridge if written."""
    hops, num, length = given.facts["trained"], len(given.atoms), 4 if thought else 3
    tokens = torch.full((num + len(hops), length), sizes.entities + sizes.relations)
    targets = torch.full_like(tokens, -100)  # which the cross entropy leaves out
    tokens[:num, :2], targets[:num, 1] = given.atoms[:, :2], given.atoms[:, 2]
    tokens[num:], targets[num:, 2:] = hops[:, :length], hops[:, 3 if thought else 4 :]
    return tokens, targets


@torch.no_grad()
def answered(module: nn.Module, facts: Tensor, *, thought: bool) -> Tensor:
    """Which facts are answered rightly, after a bridge of the network's own if it writes one."""
    said = module(facts[:, :3])[:, -1].argmax(-1)
    if thought:
        said = module(torch.cat([facts[:, :3], said[:, None]], 1))[:, -1].argmax(-1)
    right: Tensor = said == facts[:, 4]
    return right


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A network, the facts it answers rightly, the step when 90% in distribution first were."""

    module: nn.Module
    right: dict[str, Tensor]
    passed: int | None


def interval(hits: Tensor) -> Interval:
    """Of a share."""
    return wilson(int(hits.sum()), len(hits))


def shown(hits: Tensor) -> str:
    """A share with its interval."""
    i = interval(hits)
    return f"{float(hits.float().mean()):.0%} [{i.low:.0%}, {i.high:.0%}] of {len(hits)}"


def train(given: World, sizes: Sizes, *, thought: bool, seed: int) -> Run:
    """A seed gives the same initial weights and the same batches with and without thought."""
    torch.manual_seed(seed)
    shape = {"context": 4, "width": sizes.width, "num_layers": sizes.layers}
    module = build("tiny_lm", vocab=sizes.entities + sizes.relations + 1, **shape).train()
    tokens, targets = training_rows(given, sizes, thought=thought)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=0.1)
    passed = None
    for step in range(1, sizes.steps + 1):
        rows = torch.randint(len(tokens), (sizes.batch,), generator=generator)
        logits = module(tokens[rows]).flatten(0, 1)
        loss = F.cross_entropy(logits, targets[rows].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if passed is None and step % 50 == 0:
            share = answered(module, given.facts["in distribution"], thought=thought)
            passed = step if float(share.float().mean()) >= 0.9 else None
    right = {kind: answered(module, rows, thought=thought) for kind, rows in given.facts.items()}
    with torch.no_grad():
        right["atomic"] = module(given.atoms[:, :2])[:, -1].argmax(-1) == given.atoms[:, 2]
        if thought:  # each stage for itself, the second with the right bridge given
            out = given.facts["out of it"]
            stages = (module(out[:, :4])[:, 2:].argmax(-1) == out[:, 3:]).T
            right |= {"stage one, out": stages[0], "stage two, out": stages[1]}
    return Run(module=module.eval(), right=right, passed=passed)


def changed(given: World, facts: Tensor, part: str) -> tuple[Tensor, Tensor, Tensor]:
    """Facts, their prompts (fact, 4) with another token for this part, and what follows (fact, 2):
    a bridge and another answer. After a change of h or r1, the prompt's bridge contradicts them.
    """
    place, num = PARTS.index(part), len(given.leads)
    tokens = torch.arange(num) if part in ("h", "bridge") else torch.unique(facts[:, 1:3])
    prompts = facts[:, None, :4].repeat(1, len(tokens), 1)
    prompts[..., place] = tokens
    h, r1, r2, bridge = prompts.unbind(-1)
    bridge = given.leads[h, r1 - num] if place < 2 else bridge
    follows = torch.stack([bridge, given.leads[bridge, r2 - num]], -1)
    fine = follows[..., 1] != facts[:, None, 4]  # then a bridge by h or r1 is another one, too
    drawn = torch.rand(fine.shape, generator=torch.Generator().manual_seed(place)) * fine
    pick, each, kept = drawn.argmax(1), torch.arange(len(facts)), fine.any(1)
    return facts[kept], prompts[each, pick][kept], follows[each, pick][kept]


@torch.no_grad()
def readings(module: nn.Module, given: World, facts: Tensor) -> Readings:
    """What each stage does when a token that it can see is changed, in facts answered rightly."""
    found = {}
    for number, (stage, position) in enumerate(STAGES.items()):
        for part in PARTS[: position + 1]:
            old, prompts, follows = changed(given, facts, part)
            said = module(prompts)[:, position].argmax(-1)
            found[stage, part] = said != old[:, 3 + number], said == follows[:, number]
    return found


def as_claimed(found: Readings) -> bool | None:
    """Whether the stages read what `CLAIMED` says and nothing else; None if that is not clear."""
    sure = [(interval(x), part in CLAIMED[stage]) for (stage, part), (x, _) in found.items()]
    if any(i.high < READ if own else i.low > NOT_READ for i, own in sure):
        return False
    return all(i.low > READ if own else i.high < NOT_READ for i, own in sure) or None


def pairs(net: Net, facts: Tensor, stage: str, num: int = 64) -> Contrast:
    """Facts against others that differ in every token and in what is predicted."""
    apart = (facts != facts.roll(1, 0)).all(1)
    clean, corrupt = facts[apart][:num], facts.roll(1, 0)[apart][:num]
    right, wrong = (x[:, STAGES[stage] + 1, None] for x in (clean, corrupt))
    metric = LogitDifference(correct=right, wrong=wrong, position=STAGES[stage])
    return contrast(net, clean[:, :4], corrupt[:, :4], metric, name=f"stage {stage}")


def lost(net: Net, of: Contrast) -> Tensor:
    """Share of the effect lost where one position is patched before a layer: (layer, part)."""
    (clean,), (corrupt,) = of.clean.tensors(), of.corrupt.tensors()
    kept = net.sweep(clean, corrupt, of.metric, direction="noising", normalise=True)
    return 1 - torch.from_numpy(kept.values)


def edges(wiring: Wiring, halves: Sequence[Contrast]) -> tuple[Circuit, Circuit, Point]:
    """Exact effects of all edges on each half, and how few do the work on the other half."""
    cut = ExactEdges(batch_size=64)
    first = [EdgeAttribution(batch_size=64).run(wiring, half).circuit for half in halves]
    a, b = (verified(c, cut.run(wiring, half)) for c, half in zip(first, halves, strict=True))
    curve = Evaluation(fractions=SHARES, batch_size=64).run(wiring, halves[1], a)
    point = curve.size_at(0.8)
    assert point is not None  # the whole network is among the sizes
    return a, b, point


def right_facts(run: Run, given: World) -> Tensor:
    """Two-hop facts that were not trained and that the network completes, shuffled."""
    held_out = [given.facts[k][run.right[k]] for k in ("in distribution", "out of it")]
    order = torch.randperm(sum(map(len, held_out)), generator=torch.Generator().manual_seed(0))
    return torch.cat(held_out)[order]


def show_circuits(run: Run, facts: Tensor) -> None:
    """Streams and edges of both stages, and how many edges they share."""
    net = patchclamp.open(run.module, facts[:2, :4])
    wiring, found = wire(net), {}
    for stage in STAGES:
        halves = [pairs(net, half, stage) for half in (facts[0::2], facts[1::2])]
        print(f"  stage {stage}: effect lost by patching {', '.join(PARTS)}")
        for layer, row in enumerate(lost(net, halves[0])):
            print(f"    before layer {layer}" + "".join(f"{x:>8.0%}" for x in row))
        found[stage] = a, _, point = edges(wiring, halves)
        faithful = f"{point.faithfulness:.0%} faithful, random ones {point.random_mean:.0%}"
        print(f"    {point.size} of {a.num_possible} edges are {faithful}; the largest are")
        print(f"    {', '.join(map(str, a.top(6).edges()))}")
    (one, one_again, few), (two, two_again, more) = found.values()
    size = max(few.size, more.size)
    compared = {"both": (one, two), "one, again": (one, one_again), "two, again": (two, two_again)}
    for name, (a, b) in compared.items():
        row = CircuitComparison(num_nulls=199).run(a.top(size), b.top(size)).row(0, named=True)
        jaccard = f"{row['jaccard']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        print(f"  {size} edges, {name:<10} Jaccard {jaccard}, by chance {row['null_mean']:.2f}")


def verdict(held: Sequence[bool | None]) -> str:
    """Of one claim in every seed; None is a seed that does not say."""
    failed = all(x is False for x in held)
    return "holds" if all(held) else "does not hold" if failed else "inconclusive"


def gained(without: Run, with_it: Run) -> bool | None:
    """Whether chain of thought helps out of distribution: None where the intervals meet."""
    a, b = (interval(run.right["out of it"]) for run in (without, with_it))
    return True if b.low > a.high else False if b.high < a.low else None


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Sizes.steps)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes, gains, stages = Sizes(steps=options.steps), [], []
    for seed in range(options.seeds):
        given = world(sizes, seed)
        runs = [train(given, sizes, thought=thought, seed=seed) for thought in (False, True)]
        for name, run in zip(("without", "with"), runs, strict=True):
            print(f"seed {seed}, {name} thought: 90% in distribution at step {run.passed}")
            for kind, right in run.right.items():
                print(f"  {kind:<16} {shown(right)}", flush=True)
        facts = right_facts(runs[1], given)
        found = readings(runs[1].module, given, facts)
        for (stage, part), (moved, followed) in found.items():
            print(f"  stage {stage}, {part:<6} changed: {shown(moved)} answers change", end="")
            print(f", {float(followed.float().mean()):.0%} to what follows")
        show_circuits(runs[1], facts)
        gains.append(gained(*runs))
        stages.append(as_claimed(found))
    print(f"more right out of distribution with chain of thought: {verdict(gains)}")
    print(f"each stage reads its own two tokens and no other: {verdict(stages)}")
    print(f"{time.process_time():.0f} s of CPU time")


if __name__ == "__main__":
    main()
