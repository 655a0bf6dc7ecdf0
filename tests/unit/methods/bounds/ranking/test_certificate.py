"""The bound against every attack, its tightness, the statistics, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchclamp.core.errors import DataError, OptionError, TargetError
from patchclamp.methods.bounds.ranking import (
    CertifiedTopK,
    Clip,
    GreedyPromotion,
    SmoothedRanker,
    Substitutions,
    Vote,
    ceiling,
)
from patchclamp.methods.bounds.ranking.smoothing import Score
from patchclamp.methods.bounds.ranking.words import Text

LETTERS = ["ab", "cd", "ef", "gh", "ij", "kl"]
EVERYTHING = 10**6
"""So many draws that every smoothed score is computed exactly."""


def smoothed(score: Score, sets: Substitutions, text: Text) -> float:
    ranker = SmoothedRanker(score=score, query="", substitutions=sets, score_map=Clip())
    estimate = ranker.estimate(text, EVERYTHING, 0.1, np.random.default_rng(0))
    assert estimate.exact
    return estimate.mean


def attacks(sets: Substitutions, text: Text, most: int) -> list[Text]:
    """Every text with at most `most` words replaced."""
    choices = [(w, *sets.written_for(w)) for w in text.words]
    return [
        text.replaced(words)
        for words in itertools.product(*choices)
        if sum(a != b for a, b in zip(words, text.words, strict=True)) <= most
    ]


def random_sets(generator: np.random.Generator) -> Substitutions:
    """Synonyms at random, and noise that need not have to do with them."""
    links = {w: [v for v in LETTERS if v != w and generator.random() < 0.4] for w in LETTERS}
    synonyms = Substitutions.of(links).synonyms
    if generator.random() < 0.5:
        return Substitutions.of(links)
    noise = {w: (w, *[v for v in LETTERS if v != w and generator.random() < 0.6]) for w in LETTERS}
    return Substitutions(synonyms=synonyms, noise=noise)


def table_score(generator: np.random.Generator) -> Score:
    """Any function of the text: a number drawn when a text is first seen, mostly near 0 or 1."""
    known: dict[str, float] = {}

    def score(query: str, documents: Sequence[str]) -> NDArray[np.float64]:
        for d in documents:
            known.setdefault(d, float(generator.beta(0.3, 1.0)))
        return np.array([known[d] for d in documents])

    return score


@pytest.mark.parametrize("seed", range(12))
def test_no_attack_of_all_passes_the_ceiling(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sets, score = random_sets(generator), table_score(generator)
    text = Text.cut(" ".join(generator.choice(LETTERS, 3)))
    before = smoothed(score, sets, text)
    bounds = ceiling(sets, text, before)
    assert bounds[0] == pytest.approx(before)
    assert (np.diff(bounds) >= 0).all()
    for most in range(len(bounds)):
        worst = max(smoothed(score, sets, attacked) for attacked in attacks(sets, text, most))
        assert worst <= bounds[most] + 1e-12


def test_the_ceiling_is_attained_by_the_worst_score() -> None:
    # N(sea) = {sea, ocean}, N(ocean) = {sea, ocean, main}: a = 1, b = 2/3
    sets = Substitutions.of({"ocean": ["sea", "main"]})
    text = Text.cut("sea")

    def worst(query: str, documents: Sequence[str]) -> NDArray[np.float64]:
        return np.array([0.2 if d in ("sea", "ocean") else 1.0 for d in documents])

    assert ceiling(sets, text, 0.2)[1] == pytest.approx(1 - 2 / 3 * 0.8)
    assert smoothed(worst, sets, Text.cut("ocean")) == pytest.approx(1 - 2 / 3 * 0.8)
    # the bound of the paper takes the share of N(sea) alone, which is all of it: no change
    own = sets.retained("sea").own
    assert smoothed(worst, sets, Text.cut("ocean")) > 0.2 + (1 - own)


def test_equal_sets_give_the_papers_bound_and_closed_ones_no_change() -> None:
    ring = {"ab": ["cd"], "cd": ["ef"], "ef": ["gh"], "gh": ["ab"]}
    sets, text = Substitutions.of(ring), Text.cut("ab cd ef")
    assert ceiling(sets, text, 0.05).tolist() == pytest.approx(
        [0.05, 0.05 + 1 / 3, 0.05 + 1 - 4 / 9, 0.05 + 1 - 8 / 27]
    )
    assert ceiling(sets.closed(), text, 0.05).tolist() == pytest.approx([0.05] * 4)
    assert ceiling(Substitutions.of({}), text, 0.05).tolist() == pytest.approx([0.05])
    nothing = Substitutions(synonyms={"ab": ("cd",)}, noise={})
    assert ceiling(nothing, text, 0.0).tolist() == pytest.approx([0.0, 1.0])
    tiny = Substitutions.of({"ab": [f"x{'y' * i}" for i in range(1, 40)]})
    assert ceiling(tiny, Text.cut("ab " * 400), 0.5)[-1] == 1.0


def test_the_worst_words_count_wherever_they_stand() -> None:
    sets = Substitutions.of({"ocean": ["sea", "main"], "ab": ["cd"]})
    # ab loses nothing, sea loses b = 2/3, ocean a = 2/3
    expected = [0.1, *[1 - 2 / 3 * (1 - 0.1 / (2 / 3))] * 3]
    for words in itertools.permutations(["ab", "sea", "ocean"]):
        assert ceiling(sets, Text.cut(" ".join(words)), 0.1).tolist() == pytest.approx(expected)


GOOD, BAD = "good", "bad"


def share_of_good(query: str, documents: Sequence[str]) -> Tensor:
    """A linear ranker: the share of words that are good."""
    return torch.tensor([d.lower().split().count(GOOD) / len(d.split()) for d in documents])


def test_without_substitutions_the_smoothed_ranker_is_the_ranker() -> None:
    documents = [
        "good good", "good bad", "bad bad", "good good bad", "bad bad bad good",
    ]  # fmt: skip
    result = CertifiedTopK(k=2).run(share_of_good, "", documents, Substitutions.of({}))
    table = result.table
    assert table["score"].to_list() == pytest.approx(table["plain"].to_list())
    assert table["rank"].to_list() == [1, 3, 5, 2, 4]
    assert table["exact"].all()
    assert table["certified"].to_list() == [None, True, True, None, True]
    assert table["radius"].to_list() == [None, 0, 0, None, 0]
    assert table["attacked_rank"].to_list() == [None, 3, 5, None, 4]
    assert result.floor == pytest.approx(2 / 3)
    assert (result.num_certified, result.num_outside, result.num_promoted) == (3, 3, 0)
    assert "none of the 3 certified documents (of 3 outside the top 2)" in result.statement


def test_ties_and_duplicates_are_not_certified() -> None:
    documents = ["good bad", "good bad", "bad bad", "bad good"]
    result = CertifiedTopK(k=1).run(share_of_good, "", documents, Substitutions.of({}))
    assert result.table["certified"].to_list() == [None, False, True, False]
    assert result.table["margin"].to_list()[1] == pytest.approx(0)
    assert result.table["radius"].to_list()[1] is None
    drawn = ["one two three four five six good bad"] * 5
    sets = Substitutions.of({w: [w + "s", w + "er"] for w in drawn[0].split()[:6]})
    result = CertifiedTopK(k=2, num_samples=50).run(share_of_good, "", drawn, sets.closed())
    assert result.num_certified == 0
    assert not result.table["exact"].any()
    assert result.statement == "None of the 3 documents outside the top 2 is certified."


def test_a_margin_within_the_tolerance_is_none() -> None:
    def score(query: str, documents: Sequence[str]) -> NDArray[np.float64]:
        return np.array([0.5 + 1e-8 * (d == "good") for d in documents])

    for tolerance, certified in ((1e-6, False), (1e-9, True)):
        method = CertifiedTopK(k=1, tolerance=tolerance)
        table = method.run(score, "", ["bad", "good"], Substitutions.of({})).table
        assert table["certified"].to_list() == [certified, None]


def test_a_clear_document_is_certified_up_to_the_words_it_stands() -> None:
    # every word's sets overlap by 9 in 10: N(w) are windows of ten on a ring
    ring = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(40)]
    noise = {w: tuple(ring[(i + s) % 40] for s in range(-4, 6)) for i, w in enumerate(ring)}
    synonyms = {w: (ring[i - 1], ring[(i + 1) % 40]) for i, w in enumerate(ring)}
    sets = Substitutions(synonyms=synonyms, noise=noise)

    def score(query: str, documents: Sequence[str]) -> Tensor:
        return torch.tensor([1.0 if d.startswith(GOOD) else 0.0 for d in documents])

    documents = [f"good {' '.join(ring[:7])}", f"bad {' '.join(ring[5:12])}"]
    method = CertifiedTopK(k=1, num_samples=2000, max_substitutions=3, score_map=Vote(threshold=1))
    result = method.run(score, "", documents, sets)
    row = result.table.row(1, named=True)
    high = 1 - (0.05 / 4) ** (1 / 2000)
    assert row["high"] == pytest.approx(high, abs=1e-6)
    assert result.floor == pytest.approx(1 - high, abs=1e-6)
    assert row["ceiling"] == pytest.approx(high + 1 - 0.9**3, abs=1e-6)
    assert row["certified"]
    assert row["radius"] == row["num_attackable"] == 7
    everything = CertifiedTopK(k=1, num_samples=2000, score_map=Vote(threshold=1))
    assert everything.run(score, "", documents, sets).table["certified"].to_list() == [None, True]


def test_false_certificates_are_as_rare_as_stated() -> None:
    # the second document lies a hair above the first: to certify it is false
    filler = " ".join(f"x{chr(97 + i)}" for i in range(10))
    sets = Substitutions.of({w: [w + "s"] for w in filler.split()}).closed()

    def score(query: str, documents: Sequence[str]) -> NDArray[np.float64]:
        cut = [d.split() for d in documents]
        return np.array([sum(w.endswith("s") for w in d) / 10 + (d[0] == GOOD) / 1e4 for d in cut])

    false = misranked = 0
    for seed in range(120):
        method = CertifiedTopK(k=1, num_samples=30, confidence=0.7, attack=None, seed=seed)
        table = method.run(score, "", [f"bad {filler}", f"good {filler}"], sets).table
        false += table["certified"].to_list()[1] is True
        misranked += table["rank"].to_list()[1] == 2
    assert false <= 0.3 * 120
    assert misranked > 0.3 * 120  # so that going by the estimates alone would fail this test


def test_attack_and_certificate_leave_no_document_to_both() -> None:
    sets = Substitutions.of({"fine": ["good"], "poor": ["fine"]})
    documents = ["good good bad", "poor fine fine", "bad bad bad", "fine bad bad"]
    method = CertifiedTopK(k=1, confidence=0.9, attack=GreedyPromotion(num_draws=400))
    result = method.run(share_of_good, "", documents, sets)
    table = result.table
    assert table["attacked_rank"].to_list()[1] == 1
    assert table["attacked_text"].to_list()[1] == "fine good good"
    assert table["num_substituted"].to_list() == [None, 3, 0, 1]
    assert table["certified"].to_list() == [None, False, True, True]
    # N(good) and N(poor) lie in N(fine): a = 2/3, b = 1; the attack attains the ceiling
    last = table.row(3, named=True)
    assert last["ceiling"] == pytest.approx(1 - (1 - 1 / 9 / (2 / 3)))
    assert last["attacked_score"] == pytest.approx(last["ceiling"])
    assert result.contradictions == ()
    assert result.num_promoted == 1


def test_the_attack_keeps_to_its_budget() -> None:
    sets = Substitutions.of({"fine": ["good"]})
    ranker = SmoothedRanker(
        score=share_of_good, query="", substitutions=Substitutions(
            synonyms=sets.synonyms, noise={}), score_map=Clip()
    )  # fmt: skip
    text = Text.cut("fine fine FINE bad")
    for limit, expected in [(0, 0), (1, 1), (2, 2), (9, 3)]:
        attacked = GreedyPromotion(num_draws=1).promote(
            ranker, text, limit, np.random.default_rng(0)
        )
        assert attacked.words.count("good") == expected


def test_the_attack_leaves_out_what_spoils_the_rest() -> None:
    def score(query: str, documents: Sequence[str]) -> NDArray[np.float64]:
        return np.array([[0.1, 0.6, 0.2][d.split().count(GOOD)] for d in documents])

    sets = Substitutions(synonyms={"fine": ("good",)}, noise={})
    ranker = SmoothedRanker(score=score, query="", substitutions=sets, score_map=Clip())
    attacked = GreedyPromotion().promote(ranker, Text.cut("fine fine"), 2, np.random.default_rng(0))
    assert attacked.words == ("good", "fine")


def test_the_same_seed_gives_the_same_certificate_and_another_seed_another() -> None:
    document = " ".join(f"x{chr(97 + i)}" for i in range(12))
    sets = Substitutions.of({w: ["good"] for w in document.split()})

    def run(seed: int) -> list[object]:
        method = CertifiedTopK(k=1, num_samples=40, seed=seed)
        table = method.run(share_of_good, "", [document, document + " bad"], sets).table
        return [table.drop("plain").to_dicts()]

    assert run(1) == run(1)
    assert run(1) != run(2)


BadScore = Callable[[str, Sequence[str]], NDArray[np.float64]]


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (lambda q, d: np.full(len(d), np.nan), TargetError, "not a finite number; got nan"),
        (lambda q, d: np.full(len(d), np.inf), TargetError, "not a finite number; got inf"),
        (lambda q, d: np.zeros((len(d), 2)), TargetError, "one score a document"),
        (lambda q, d: np.zeros(1), TargetError, "one score a document"),
        (lambda q, d: np.full(len(d), 1 / len(d)), DataError, "depends on the others"),
    ],
)
def test_scores_that_make_no_ranking_are_refused(
    score: BadScore, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CertifiedTopK(k=1).run(score, "", ["ab", "cd", "ef"], Substitutions.of({}))


def test_a_score_that_is_not_finite_for_a_drawn_text_is_refused() -> None:
    def score(query: str, documents: Sequence[str]) -> NDArray[np.float64]:
        return np.array([np.nan if "main" in d else 0.0 for d in documents])

    sets = Substitutions.of({"sea": ["main"]})
    with pytest.raises(TargetError, match="got nan for 'main'"):
        CertifiedTopK(k=1).run(score, "", ["sea", "land"], sets)


def test_options_and_documents_without_meaning_are_refused() -> None:
    sets = Substitutions.of({})
    for k in (2, 5):
        with pytest.raises(OptionError, match=f"nothing to certify; got k={k} of 2"):
            CertifiedTopK(k=k).run(share_of_good, "", ["a", "b"], sets)
    with pytest.raises(DataError, match="no documents"):
        CertifiedTopK(k=1).run(share_of_good, "", [], sets)
    with pytest.raises(DataError, match="must be strings"):
        CertifiedTopK(k=1).run(share_of_good, "", "good bad", sets)
    for options in ({"k": 0}, {"num_samples": 0}, {"max_substitutions": -1}, {"seed": -1}):
        with pytest.raises(OptionError, match="out of range"):
            CertifiedTopK(**options)  # type: ignore[arg-type]
    for confidence in (0.0, 1.0, float("nan")):
        with pytest.raises(OptionError, match="no such probability"):
            CertifiedTopK(confidence=confidence)
    with pytest.raises(OptionError, match="no range"):
        Clip(low=1.0, high=1.0)
    with pytest.raises(OptionError, match="not finite"):
        Vote(threshold=float("nan"))
    with pytest.raises(OptionError, match="needs a draw"):
        GreedyPromotion(num_draws=0)
