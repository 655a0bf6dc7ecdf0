"""Train the networks that come with the package, and record what they reach.

    python scripts/train_bundled.py [digits-cnn] [digits-mlp] [tiny-lm] [--threads 1]

Each takes from seconds (digits) to about ten minutes (the language model) on
one thread. Seeds are fixed; the figures in each config.json were measured on
held-out data by this script, on the weights as saved. A network below its bar
is not written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812  (the name that torch's own documentation uses)
from torch import Tensor, nn

from patchclamp.data import load_data
from patchclamp.data.dataset import Dataset
from patchclamp.data.induction import (
    HELD_OUT_PERIODS,
    HELD_OUT_PREFIXES,
    Repeats,
    repeats,
)
from patchclamp.specimens import build
from patchclamp.specimens.tiny_lm import TinyLM

BUNDLED = Path(__file__).parent.parent / "src" / "patchclamp" / "bundled"
VALIDATION_SEED, EVALUATION_SEED = 80_110, 90_210

Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one network is trained. `bars` are the least or greatest values of its figures."""

    specimen: str
    description: str
    options: dict[str, object]
    task: str
    data: str
    seed: int
    train: Callable[[nn.Module, Recipe], None]
    measure: Callable[[nn.Module], Figures]
    at_least: Figures
    at_most: Figures


def accuracy(network: nn.Module, data: Dataset) -> float:
    """Share of rows whose largest logit is the label's."""
    assert data.labels is not None
    with torch.no_grad():
        return float((network(data.inputs).argmax(-1) == data.labels).double().mean())


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixels along both axes, zeros moving in.

    Shapes: (batch, 1, row, column) to the same.
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1))[:, 0]
    dy, dx = torch.randint(0, 3, (2, batch, 1, 1), generator=generator)
    rows, columns = torch.arange(height)[None, :, None] + dy, torch.arange(width)[None, None] + dx
    return padded[torch.arange(batch)[:, None, None], rows, columns].unsqueeze(1)


def train_digits(network: nn.Module, recipe: Recipe, *, shift: bool) -> None:
    """AdamW with a one-cycle rate, on shifted images if asked; the epoch count is fixed."""
    data = load_data("digits", split="train")
    assert data.labels is not None
    generator = torch.Generator().manual_seed(recipe.seed)
    epochs, batch = 60, 64
    steps = epochs * math.ceil(len(data) / batch)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data), generator=generator).split(batch):
            images = data.inputs[rows]
            logits = network(shifted(images, generator) if shift else images)
            loss = F.cross_entropy(logits, data.labels[rows], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()


def measure_digits(network: nn.Module) -> Figures:
    """Accuracy on the held-out splits."""
    return {
        "test_accuracy": accuracy(network, load_data("digits", split="test")),
        "validation_accuracy": accuracy(network, load_data("digits", split="validation")),
        "train_accuracy": accuracy(network, load_data("digits", split="train")),
    }


def next_byte_losses(network: nn.Module, input_ids: Tensor) -> Tensor:
    """Nats for each byte after the first. Shapes: (row, length) to (row, length - 1)."""
    with torch.no_grad():
        logits = network(input_ids)
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")


def attention_patterns(network: nn.Module, input_ids: Tensor) -> list[Tensor]:
    """Softmax of scaled query-key products at each layer, from the recorded projections.

    Shapes: input_ids (row, length); each pattern (row, head, query, key).
    """
    assert isinstance(network, TinyLM)
    config = network.config
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.update({name: output})

    handles = []
    for index in range(config.num_layers):
        for part in "qk":
            projection = network.get_submodule(f"blocks.{index}.attn.{part}_proj")
            handles.append(projection.register_forward_hook(keep(f"{part}{index}")))
    with torch.no_grad():
        network(input_ids)
    for handle in handles:
        handle.remove()
    rows, length = input_ids.shape
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    patterns = []
    for index in range(config.num_layers):
        q, k = (
            seen[f"{part}{index}"].view(rows, length, config.num_heads, -1).transpose(1, 2)
            for part in "qk"
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(config.head_dim)
        patterns.append(scores.masked_fill(future, -math.inf).softmax(-1))
    return patterns


def induction_scores(network: nn.Module, rows: Repeats) -> Tensor:
    """Mean attention of each head to the byte after the last occurrence of the current one.

    Shapes: (layer, head).
    """
    queries = rows.source >= 0
    keys = rows.source.clamp(min=0)[:, None, :, None]
    scores = []
    for pattern in attention_patterns(network, rows.input_ids):
        index = keys.expand(-1, pattern.shape[1], -1, -1)
        found = pattern.gather(3, index).squeeze(3).transpose(0, 1)
        scores.append(found[:, queries].mean(1))
    return torch.stack(scores)


def previous_scores(network: nn.Module, input_ids: Tensor) -> Tensor:
    """Mean attention of each head to the byte before. Shapes: (layer, head)."""
    patterns = attention_patterns(network, input_ids)
    return torch.stack([p.diagonal(-1, 2, 3).mean((0, 2)) for p in patterns])


def measure_language(
    network: nn.Module, *, split: str = "test", seed: int = EVALUATION_SEED
) -> Figures:
    """Loss on held-out prose, and induction on repeats of trained and untrained shape."""
    halves = repeats(256, periods=[64], prefixes=[0], seed=seed)
    losses = next_byte_losses(network, halves.input_ids)
    fresh = repeats(256, periods=HELD_OUT_PERIODS, prefixes=HELD_OUT_PREFIXES, seed=seed + 1)
    fresh_losses, repeated = next_byte_losses(network, fresh.input_ids), fresh.repeated[:, 1:]
    induction, prose = induction_scores(network, fresh), load_data("prose", split=split)
    previous = previous_scores(network, fresh.input_ids)
    layer, head = divmod(int(induction.argmax()), induction.shape[1])
    previous_layer, previous_head = divmod(int(previous.argmax()), previous.shape[1])
    return {
        "prose_nats_per_byte": next_byte_losses(network, prose.inputs).mean().item(),
        "repeat_first_half_nats": losses[:, :63].mean().item(),
        "repeat_second_half_nats": losses[:, 64:].mean().item(),
        "unseen_shape_first_nats": fresh_losses[~repeated].mean().item(),
        "unseen_shape_repeat_nats": fresh_losses[repeated].mean().item(),
        "induction_score": induction.max().item(),
        "induction_layer": layer,
        "induction_head": head,
        "previous_token_score": previous.max().item(),
        "previous_token_layer": previous_layer,
        "previous_token_head": previous_head,
    }


LM_STEPS = 2600
LM_PROSE_ROWS, LM_REPEAT_ROWS = 16, 16


def train_language(network: nn.Module, recipe: Recipe) -> None:
    """AdamW, warm-up and cosine; half of every batch is prose, half repeating bytes."""
    prose = load_data("prose", split="train").inputs.flatten()
    generator = torch.Generator().manual_seed(recipe.seed)
    length = 128
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=2e-3, weight_decay=0.05, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=2e-3, total_steps=LM_STEPS, pct_start=0.05
    )
    network.train()
    start = time.perf_counter()
    for step in range(LM_STEPS):
        first = torch.randint(len(prose) - length, (LM_PROSE_ROWS, 1), generator=generator)
        text = prose[first + torch.arange(length)]
        rows = torch.cat([text, repeats(LM_REPEAT_ROWS, length=length, seed=generator).input_ids])
        logits = network(rows)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 200 == 0:
            network.eval()
            figures = measure_language(network, split="validation", seed=VALIDATION_SEED)
            network.train()
            print(f"step {step} {time.perf_counter() - start:.0f} s {brief(figures)}", flush=True)


def brief(figures: Figures) -> str:
    """One line of figures."""
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


RECIPES: dict[str, Recipe] = {
    "digits-cnn": Recipe(
        specimen="digits_cnn",
        description="convolutional network on handwritten digits of 8 x 8 pixels",
        options={"channels": [16, 32, 32], "num_classes": 10, "size": 8},
        task="image classification",
        data="digits",
        seed=1,
        train=partial(train_digits, shift=True),
        measure=measure_digits,
        at_least={"test_accuracy": 0.98},
        at_most={},
    ),
    "digits-mlp": Recipe(
        specimen="digits_mlp",
        description="fully connected network on handwritten digits of 8 x 8 pixels",
        options={"hidden": [64, 32], "num_classes": 10, "size": 8},
        task="image classification",
        data="digits",
        seed=2,
        train=partial(train_digits, shift=False),
        measure=measure_digits,
        at_least={"test_accuracy": 0.95},
        at_most={},
    ),
    "tiny-lm": Recipe(
        specimen="tiny_lm",
        description="transformer of 2 layers over bytes, with an induction head",
        options={
            "vocab": 256,
            "context": 128,
            "width": 128,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 4,
            "mlp_width": 256,
        },
        task="language modelling",
        data="prose",
        seed=3,
        train=train_language,
        measure=measure_language,
        at_least={"induction_score": 0.4},
        at_most={"repeat_second_half_over_first": 0.5, "prose_nats_per_byte": 2.2},
    ),
}


def below_bar(recipe: Recipe, figures: Figures) -> list[str]:
    """The bars that were missed."""
    shown = dict(figures)
    if "repeat_first_half_nats" in figures:
        ratio = figures["repeat_second_half_nats"] / figures["repeat_first_half_nats"]
        shown["repeat_second_half_over_first"] = ratio
    missed = [f"{n} {shown[n]:.4f} < {bar}" for n, bar in recipe.at_least.items() if shown[n] < bar]
    return missed + [
        f"{n} {shown[n]:.4f} > {bar}" for n, bar in recipe.at_most.items() if shown[n] > bar
    ]


def write_beside(path: Path, content: bytes) -> None:
    """Write a file next to `path`, then move it there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def save(name: str, recipe: Recipe, network: nn.Module, figures: Figures) -> None:
    """Weights as safetensors, then the config that describes them."""
    image = recipe.task == "image classification"
    options = recipe.options
    config = {
        "specimen": recipe.specimen,
        "description": recipe.description,
        "options": options,
        "task": recipe.task,
        "input": {"kind": "image", "shape": [1, 8, 8]}
        if image
        else {"kind": "tokens", "vocab": options["vocab"], "context": options["context"]},
        "class_names": list(load_data("digits").class_names) if image else [],
        "data": recipe.data,
        "licence": "Apache-2.0",
        "trained_by": "scripts/train_bundled.py",
        "seed": recipe.seed,
        "figures": figures,
    }
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    folder = BUNDLED / name
    write_beside(folder / "model.safetensors", safetensors.torch.save(weights))
    text = json.dumps(config, indent=2) + "\n"
    write_beside(folder / "config.json", text.encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in RECIPES]:
        parser.error(f"unknown {', '.join(unknown)}; choose from {', '.join(RECIPES)}")
    torch.set_num_threads(options.threads)
    failed = False
    for name in options.names or RECIPES:
        recipe, start = RECIPES[name], time.perf_counter()
        torch.manual_seed(recipe.seed)
        network = build(recipe.specimen, **recipe.options)
        recipe.train(network, recipe)
        network.eval()
        figures = recipe.measure(network)
        print(f"{name}: {brief(figures)} ({time.perf_counter() - start:.0f} s)", flush=True)
        if missed := below_bar(recipe, figures):
            failed = True
            print(f"{name}: not written, {'; '.join(missed)}", file=sys.stderr)
        else:
            save(name, recipe, network, figures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
