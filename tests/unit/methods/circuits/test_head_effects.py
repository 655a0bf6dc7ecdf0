"""Effects of heads against one edited run each, and a head that writes nothing."""

from __future__ import annotations

import copy

import pytest
import torch

import patchclamp
from patchclamp import edits
from patchclamp.core.errors import DataError, OptionError
from patchclamp.data.behaviours import token_pairs
from patchclamp.data.behaviours.pairs import TokenPairs
from patchclamp.methods.circuits.checking.metrics import metric_for
from patchclamp.methods.circuits.finding.edge_attribution import Direction
from patchclamp.methods.circuits.heads.head_effects import HeadEffects
from patchclamp.net import Net

HEADS = tuple((n, h) for n in range(2) for h in range(4))


@pytest.fixture(scope="module")
def net() -> Net:
    return patchclamp.open("tiny-lm")


@pytest.fixture(scope="module")
def pairs(net: Net) -> tuple[TokenPairs, ...]:
    return token_pairs("induction", 6, tokenizer=net.tokenizer)


def by_hand(
    net: Net, pairs: TokenPairs, layer: int, head: int, direction: Direction
) -> torch.Tensor:
    """One run with the head's output from the other prompt."""
    start, other = pairs.clean, pairs.corrupt
    if direction is Direction.DENOISING:
        start, other = other, start
    site = f"attn.{layer}.z"
    values = net.record(other, [site]).tensor(site)
    metric, rows = metric_for(pairs), torch.arange(len(pairs))
    outputs = [
        net.run(start, edits=patched).output[:, pairs.position]
        for patched in ([], [edits.patch(site, values, head=head)])
    ]
    before, after = (metric(output.detach(), rows) for output in outputs)
    return before - after if direction is Direction.NOISING else after - before


@pytest.mark.parametrize("direction", [Direction.NOISING, Direction.DENOISING])
def test_each_head_equals_one_edited_run(
    net: Net, pairs: tuple[TokenPairs, ...], direction: Direction
) -> None:
    made = HeadEffects(direction=direction, batch_size=4).run(net, pairs)
    assert made.heads == HEADS
    assert made.effects.shape == (8, 6)
    for i, (layer, head) in enumerate(HEADS):
        expected = by_hand(net, pairs[0], layer, head, direction)
        torch.testing.assert_close(made.effects[i].float(), expected, atol=1e-4, rtol=1e-4)


def test_both_is_the_mean_of_the_two(net: Net, pairs: tuple[TokenPairs, ...]) -> None:
    both, *each = (
        HeadEffects(direction=d).run(net, pairs).effects
        for d in (Direction.BOTH, Direction.NOISING, Direction.DENOISING)
    )
    torch.testing.assert_close(both, torch.stack(each).mean(0))
    # the induction heads promote the right answer
    assert float(both[HEADS.index((1, 3))].min()) > 1


def test_a_head_that_writes_nothing_has_no_effect(net: Net, pairs: tuple[TokenPairs, ...]) -> None:
    module = copy.deepcopy(net.module)
    with torch.no_grad():
        module.get_submodule("blocks.1.attn.o_proj").weight[:, 96:] = 0
    cut = patchclamp.open(module, pairs[0].clean[:2])
    effects = HeadEffects().run(cut, pairs).effects
    assert float(effects[HEADS.index((1, 3))].abs().max()) < 1e-5
    assert float(effects[HEADS.index((1, 0))].abs().min()) > 0.1


def test_refused(net: Net) -> None:
    with pytest.raises(OptionError, match=r"no direction 'noisin'.*nearest 'noising'"):
        HeadEffects(direction="noisin")  # type: ignore[arg-type]  # what a user may write
    with pytest.raises(OptionError, match="at least 1"):
        HeadEffects(batch_size=0)
    with pytest.raises(DataError, match="no pairs"):
        HeadEffects().run(net, ())
