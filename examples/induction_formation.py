"""Which part of an induction head does its formation wait for?

A two-layer transformer learns random tokens that repeat. For a while it guesses; then,
within a few dozen steps, it copies: an induction head has formed, made of a head that
looks one token back (layer 0) and a head that looks up what followed last time (layer 1).
Here parts are held at values from the first step on, and we see when the change comes:

    plain       nothing is held
    previous    layer-0 patterns held at the ideal previous-token pattern
    match       one layer-1 pattern held at the ideal induction pattern
    knocked out layer-0 heads write zeros throughout
    itself      layer-0 patterns held at "look at yourself": the control for holding as such

Run: python examples/induction_formation.py [--seeds 3] [--steps 1500]
It takes about five minutes on one core and prints one line a run, then a table.
After Singh et al. 2024, "What needs to go right for an induction head?".
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  (the name that torch's own documentation uses)
from torch import Tensor

import patchclamp
from patchclamp.core.edit_kinds import zero
from patchclamp.methods.circuits.training_clamp import (
    HeldPattern,
    TrainingClamp,
    induction_pattern,
    previous_token_pattern,
)
from patchclamp.specimens import build

VOCAB, LENGTH = 48, 32
LEVELS = (0.5, 0.9)
"""Accuracies on repeated tokens whose first crossing is noted."""


def itself(tokens: Tensor) -> Tensor:
    """Every position attends to itself."""
    return torch.eye(tokens.shape[1])


def _layer_0(pattern: Callable[[Tensor], Tensor]) -> TrainingClamp:
    return TrainingClamp(patterns=[HeldPattern(attention="blocks.0.attn", pattern=pattern)])


CONDITIONS: dict[str, TrainingClamp] = {
    "plain": TrainingClamp(),
    "previous": _layer_0(previous_token_pattern),
    "match": TrainingClamp(
        patterns=[HeldPattern(attention="blocks.1.attn", pattern=induction_pattern, heads=(0,))]
    ),
    "knocked out": TrainingClamp(values=[zero("attn.0.z")]),
    "itself": _layer_0(itself),
}


@dataclass(frozen=True, kw_only=True)
class Formation:
    """One training run.

    Attributes:
        crossed: the first measured step at which each of `LEVELS` was passed; None for never.
        accuracy: the last one measured, on repeated tokens.
        steps: how many were trained.
        seconds: of CPU time.
    """

    condition: str
    seed: int
    crossed: tuple[int | None, ...]
    accuracy: float
    steps: int
    seconds: float


def draw(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of a random prefix and a random segment that repeats, and which next tokens repeat.

    No token occurs twice in prefix and segment, so that one earlier occurrence of the
    current token says what comes next. Period and prefix vary, so that no fixed distance does.
    """
    period = torch.randint(6, 15, (num, 1), generator=generator)
    prefix = torch.randint(0, 6, (num, 1), generator=generator)
    fresh = torch.rand(num, VOCAB, generator=generator).argsort(1)
    places = torch.arange(LENGTH)[None]
    inside = (places - prefix) % period + prefix
    tokens = fresh.gather(1, torch.where(places < prefix, places, inside))
    return tokens, (places > prefix + period)[:, 1:]


def train(condition: str, seed: int, *, steps: int = 1500, every: int = 25) -> Formation:
    """Train under a condition until the last level is passed or the steps are used up.

    The same seed gives the same initial weights and the same batches in every condition.
    """
    started = time.process_time()
    torch.manual_seed(seed)
    module = build(
        "tiny_lm", vocab=VOCAB, context=LENGTH, width=64, num_layers=2, num_heads=4, mlp_width=64
    ).train()
    generator = torch.Generator().manual_seed(seed)

    tokens, repeated = draw(256, generator)
    net = patchclamp.open(module, tokens[:2])
    optimiser = torch.optim.AdamW(module.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    crossed: list[int | None] = [None] * len(LEVELS)
    accuracy, step = 0.0, 0
    with CONDITIONS[condition].on(net):
        while step < steps and crossed[-1] is None:
            for _ in range(every):
                batch, _ = draw(64, generator)
                loss = F.cross_entropy(module(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            step += every
            with torch.no_grad():
                right = module(tokens)[:, :-1].argmax(-1) == tokens[:, 1:]
            accuracy = float(right[repeated].float().mean())
            for i, level in enumerate(LEVELS):
                if accuracy >= level and crossed[i] is None:
                    crossed[i] = step
    return Formation(
        condition=condition,
        seed=seed,
        crossed=tuple(crossed),
        accuracy=accuracy,
        steps=step,
        seconds=time.process_time() - started,
    )


def table(runs: Sequence[Formation]) -> str:
    """Steps to each level by condition: one number a seed, and their median."""
    lines = ["condition     level  steps by seed              median"]
    for condition in CONDITIONS:
        own = [r for r in runs if r.condition == condition]
        for i, level in enumerate(LEVELS):
            steps = [r.crossed[i] for r in own]
            middle = statistics.median(float("inf") if s is None else s for s in steps)
            shown = ", ".join("not reached" if s is None else str(s) for s in steps)
            name = condition if i == 0 else ""
            lines.append(f"{name:<12}  {level:>5.0%}  {shown:<39}  {middle:g}")
    return "\n".join(lines)


def main() -> None:
    """Train every condition with every seed and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for condition in CONDITIONS:
        for seed in range(options.seeds):
            runs.append(train(condition, seed, steps=options.steps))
            last = runs[-1]
            print(f"{condition}, seed {seed}: {last.accuracy:.0%} right after {last.steps} steps")
    print(table(runs))
    print(f"{sum(r.seconds for r in runs):.0f} s of CPU time")


if __name__ == "__main__":
    main()
