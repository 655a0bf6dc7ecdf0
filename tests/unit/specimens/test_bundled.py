"""The bundled weights reach, from their files, the figures that their configs record."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import patchclamp.specimens
from patchclamp.data import load_data
from patchclamp.data.induction import HELD_OUT_PERIODS, HELD_OUT_PREFIXES, Repeats, repeats
from patchclamp.specimens import build

BUNDLED = Path(patchclamp.specimens.__file__).parent.parent / "bundled"
NAMES = ("digits-cnn", "digits-mlp", "tiny-lm")


def config(name: str) -> dict:
    return json.loads((BUNDLED / name / "config.json").read_text("utf-8"))


def bundled(name: str) -> nn.Module:
    network = build(config(name)["specimen"], **config(name)["options"])
    network.load_state_dict(load_file(BUNDLED / name / "model.safetensors"))
    return network.eval()


def losses(network: nn.Module, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits = network(input_ids)
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")


def halves(network: nn.Module, seed: int) -> tuple[float, float]:
    """Loss on 64 random bytes, and on the same bytes again."""
    rows = repeats(64, periods=[64], prefixes=[0], seed=seed)
    loss = losses(network, rows.input_ids)
    return loss[:, :63].mean().item(), loss[:, 64:].mean().item()


def head_scores(network: nn.Module, rows: Repeats) -> Tensor:
    """Attention of each head of each layer from repeated bytes to their source (layer, head)."""
    places = rows.source.clamp(min=0)
    parts: dict[str, Tensor] = {}
    handles = [
        network.get_submodule(f"blocks.{layer}.attn.{part}").register_forward_hook(
            lambda module, args, output, key=f"{part}{layer}": parts.update({key: output})
        )
        for layer in range(2)
        for part in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        network(rows.input_ids)
    for handle in handles:
        handle.remove()
    scores = []
    for layer in range(2):
        q, k = (parts[f"{part}{layer}"].unflatten(2, (4, 32)) for part in ("q_proj", "k_proj"))
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(32)
        length = logits.shape[-1]
        pattern = logits.masked_fill(~torch.ones(length, length).tril().bool(), -math.inf)
        pattern = pattern.softmax(-1)
        taken = torch.take_along_dim(pattern, places[:, None, :, None], dim=3).squeeze(3)
        chosen = (rows.source >= 0)[:, None]
        scores.append((taken * chosen).sum((0, 2)) / chosen.sum())
    return torch.stack(scores)


@pytest.mark.parametrize("name", NAMES)
def test_config_says_what_a_loader_needs(name: str) -> None:
    keys = {"specimen", "description", "options", "task", "input", "class_names", "data", "licence"}
    assert keys | {"trained_by", "seed", "figures"} == set(config(name))
    assert (BUNDLED / name / "model.safetensors").stat().st_size < 2_500_000


def test_all_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*.safetensors")) < 3_000_000


@pytest.mark.parametrize(("name", "bar"), [("digits-cnn", 0.98), ("digits-mlp", 0.95)])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_digits_accuracy_is_the_recorded_one(name: str, bar: float, split: str) -> None:
    data = load_data("digits", split=split)
    with torch.no_grad():
        right = (bundled(name)(data.inputs).argmax(-1) == data.labels).sum().item()
    recorded = config(name)["figures"][f"{split}_accuracy"]
    assert right == round(recorded * len(data))
    assert right / len(data) >= bar


@pytest.mark.parametrize("name", ["digits-cnn", "digits-mlp"])
def test_shuffled_labels_are_at_chance(name: str) -> None:
    data = load_data("digits")
    assert data.labels is not None
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = bundled(name)(data.inputs).argmax(-1)
    assert (found == data.labels[order]).double().mean() < 0.2


def test_prose_loss_is_the_recorded_one() -> None:
    found = losses(bundled("tiny-lm"), load_data("prose").inputs).mean().item()
    assert found == pytest.approx(config("tiny-lm")["figures"]["prose_nats_per_byte"], abs=1e-4)


def test_prose_is_learned_beyond_byte_frequencies() -> None:
    train = load_data("prose", split="train").inputs.flatten().bincount(minlength=256).double()
    test = load_data("prose").inputs.flatten().bincount(minlength=256).double()
    unigram = -(test / test.sum() * ((train + 1) / (train + 1).sum()).log()).sum().item()
    assert losses(bundled("tiny-lm"), load_data("prose").inputs).mean().item() < 0.75 * unigram


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_second_half_of_a_repeat_is_predicted_on_fresh_seeds(seed: int) -> None:
    first, second = halves(bundled("tiny-lm"), seed)
    assert first > math.log(95) - 0.1
    assert second <= 0.5 * first
    recorded = config("tiny-lm")["figures"]["repeat_second_half_nats"]
    assert second == pytest.approx(recorded, abs=0.25)


def test_repeats_of_untrained_shape_are_predicted() -> None:
    rows = repeats(64, periods=HELD_OUT_PERIODS, prefixes=HELD_OUT_PREFIXES, seed=21)
    loss, repeated = losses(bundled("tiny-lm"), rows.input_ids), rows.repeated[:, 1:]
    assert loss[repeated].mean() <= 0.5 * loss[~repeated].mean()


def test_prediction_follows_the_earlier_byte_when_it_is_changed() -> None:
    """Change the byte after the first occurrence, and the prediction becomes the new byte.

    This is what tells copying from context apart from any other use of the repeat.
    """
    network = bundled("tiny-lm")
    rows = repeats(200, periods=[40], prefixes=[0], seed=31).input_ids[:, :72].clone()
    generator = torch.Generator().manual_seed(32)
    new = torch.randint(32, 127, (200,), generator=generator)
    rows[:, 32] = new  # predicted again at position 71, from the context up to position 71
    with torch.no_grad():
        logits = network(rows[:, :72])[:, -1]
    copied = (logits.argmax(-1) == new).double().mean().item()
    assert copied > 0.5


def test_one_head_attends_to_where_the_byte_came_before() -> None:
    rows = repeats(64, periods=HELD_OUT_PERIODS, prefixes=HELD_OUT_PREFIXES, seed=41)
    scores = head_scores(bundled("tiny-lm"), rows)
    figures = config("tiny-lm")["figures"]
    best = divmod(int(scores.argmax()), 4)
    assert best == (figures["induction_layer"], figures["induction_head"])
    assert scores.max().item() >= 0.4
    assert scores.max().item() == pytest.approx(figures["induction_score"], abs=0.05)


def test_randomised_weights_show_no_induction() -> None:
    """The negative control: the same weights, each tensor shuffled."""
    network = bundled("tiny-lm")
    generator = torch.Generator().manual_seed(51)
    with torch.no_grad():
        for parameter in network.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    first, second = halves(network, seed=52)
    assert second > 0.95 * first
    rows = repeats(64, periods=HELD_OUT_PERIODS, prefixes=HELD_OUT_PREFIXES, seed=53)
    assert head_scores(network, rows).max().item() < 0.1


def test_bytes_that_do_not_repeat_are_not_predicted() -> None:
    """The other control: trained weights on random bytes without a repeat."""
    generator = torch.Generator().manual_seed(61)
    rows = torch.randint(32, 127, (64, 128), generator=generator)
    assert losses(bundled("tiny-lm"), rows)[:, 64:].mean().item() > math.log(95) - 0.1
