"""Chain of thought in a small world: generalisation, and what its two stages read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from examples.chain_of_thought import (
    PARTS,
    STAGES,
    Run,
    Sizes,
    World,
    as_claimed,
    changed,
    edges,
    gained,
    interval,
    lost,
    pairs,
    readings,
    right_facts,
    train,
    training_rows,
    verdict,
    world,
)
from patchclamp.methods.circuits.comparing.comparison import CircuitComparison
from patchclamp.methods.circuits.network.wiring import wire

pytestmark = pytest.mark.slow

SIZES = Sizes(steps=1000)
"""Half of the example's steps."""


@pytest.fixture(scope="module")
def given() -> World:
    return world(SIZES, 0)


@pytest.fixture(scope="module")
def without(given: World) -> Run:
    return train(given, SIZES, thought=False, seed=0)


@pytest.fixture(scope="module")
def with_it(given: World) -> Run:
    return train(given, SIZES, thought=True, seed=0)


class Planted(nn.Module):
    """A network that looks facts up: the second step by the bridge in the prompt, or by its own."""

    def __init__(self, given: World, *, own_bridge: bool) -> None:
        super().__init__()
        self.leads, self.own_bridge = given.leads, own_bridge

    def forward(self, tokens: Tensor) -> Tensor:
        num = len(self.leads)
        first = self.leads[tokens[:, 0], tokens[:, 1] - num]
        bridge = first if self.own_bridge else tokens[:, 3]
        second = self.leads[bridge, tokens[:, 2] - num]
        said = torch.stack([torch.zeros_like(first), torch.zeros_like(first), first, second], 1)
        return nn.functional.one_hot(said, num).float()


def atoms_of(facts: Tensor) -> set[tuple[int, int]]:
    """(h, r) of both hops."""
    return {(row[0], row[1]) for row in facts.tolist()} | {
        (row[3], row[2]) for row in facts.tolist()
    }


def test_the_facts_follow_and_are_split_as_said(given: World) -> None:
    num = len(given.leads)
    for facts in given.facts.values():
        for h, r1, r2, bridge, answer in facts.tolist():
            assert bridge == given.leads[h, r1 - num]
            assert answer == given.leads[bridge, r2 - num]
    trained, held_out, ood = (
        {tuple(x) for x in given.facts[k].tolist()}
        for k in ("trained", "in distribution", "out of it")
    )
    assert not trained & held_out
    seen = atoms_of(given.facts["trained"])
    assert atoms_of(given.facts["in distribution"]) <= seen
    assert not atoms_of(given.facts["out of it"]) & seen
    assert len(ood) > 100
    assert len(given.atoms) == SIZES.entities * SIZES.relations


@pytest.mark.parametrize("thought", [False, True])
def test_the_only_targets_are_answers_and_the_bridge(given: World, thought: bool) -> None:
    tokens, targets = training_rows(given, SIZES, thought=thought)
    num = len(given.atoms)
    wanted = torch.full_like(targets, -100)
    wanted[:num, 1] = given.atoms[:, 2]
    facts = given.facts["trained"]
    wanted[num:, 2] = facts[:, 3] if thought else facts[:, 4]
    if thought:
        wanted[num:, 3] = facts[:, 4]
    assert torch.equal(targets, wanted)
    assert torch.equal(tokens[:num, :2], given.atoms[:, :2])
    assert torch.equal(tokens[num:], facts[:, : tokens.shape[1]])


@pytest.mark.parametrize("part", PARTS)
def test_one_token_is_changed_and_another_answer_follows(given: World, part: str) -> None:
    facts, prompts, follows = changed(given, given.facts["out of it"], part)
    assert len(facts) > 0.9 * len(given.facts["out of it"])
    differs = facts[:, :4] != prompts
    assert bool(differs[:, PARTS.index(part)].all())
    assert int(differs.sum()) == len(facts)
    assert bool((follows[:, 1] != facts[:, 4]).all())
    assert bool((follows[:, 0] != facts[:, 3]).all()) == (part != "r2")


def test_planted_stages_are_told_apart(given: World) -> None:
    facts = given.facts["in distribution"]
    found = readings(Planted(given, own_bridge=False), given, facts)
    assert as_claimed(found) is True
    for (stage, part), (moved, followed) in found.items():
        own = part in {"one": ("h", "r1"), "two": ("r2", "bridge")}[stage]
        assert bool(moved.all()) == own
        assert bool(moved.any()) == own
        assert not own or bool(followed.all())
    found = readings(Planted(given, own_bridge=True), given, facts)
    assert as_claimed(found) is False  # its second stage reads h and r1, not the bridge
    assert bool(found["two", "h"][1].all())
    assert not bool(found["two", "bridge"][0].any())


def test_verdicts() -> None:
    assert verdict([True, True]) == "holds"
    assert verdict([False, False]) == "does not hold"
    assert verdict([True, None]) == verdict([True, False]) == "inconclusive"


def test_only_chain_of_thought_reaches_out_of_distribution(without: Run, with_it: Run) -> None:
    for run in (without, with_it):  # both have learned what they were shown
        assert interval(run.right["atomic"]).low > 0.9
        assert interval(run.right["trained"]).low > 0.8
    assert with_it.passed is not None
    assert interval(with_it.right["in distribution"]).low > 0.9
    assert gained(without, with_it) is True
    assert gained(without, without) is None
    assert gained(with_it, without) is False
    assert interval(without.right["out of it"]).high < 0.15
    assert interval(with_it.right["out of it"]).low > 0.3


def test_each_stage_reads_its_own_two_tokens(with_it: Run, given: World) -> None:
    found = readings(with_it.module, given, right_facts(with_it, given))
    assert as_claimed(found) is True
    for part in ("h", "r1"):  # the bridge in the prompt wins over the one that follows
        assert float(found["two", part][1].float().mean()) < 0.05


def test_streams_and_edges_of_the_stages(with_it: Run, given: World) -> None:
    facts = right_facts(with_it, given)
    net = patchclamp.open(with_it.module, facts[:2, :4])
    wiring, found = wire(net), {}
    for stage, position in STAGES.items():
        halves = [pairs(net, half, stage) for half in (facts[0::2], facts[1::2])]
        by_place = lost(net, halves[0])
        own = torch.tensor([0, 1] if stage == "one" else [2, 3])
        others = torch.tensor([2, 3] if stage == "one" else [0, 1])
        assert float(by_place[0, own].min()) > 0.25
        assert float(by_place[0, others].abs().max()) < 0.1
        assert float(by_place[-1, position]) > 0.9  # everything has come where it is needed
        a, b, point = edges(wiring, halves)
        assert point.share <= 0.2
        assert point.random_high < 0.3
        found[stage] = a, b, point.size
    (one, again, few), (two, _, more) = found.values()
    size = max(few, more)
    both, same = (
        CircuitComparison(num_nulls=99).run(one.top(size), x.top(size)).row(0, named=True)
        for x in (two, again)
    )
    assert both["jaccard"] > both["null_high"]  # one look-up, used at two places
    assert same["jaccard"] > 0.8
