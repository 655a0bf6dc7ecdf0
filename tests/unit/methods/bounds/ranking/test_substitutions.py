"""Sets of synonyms: symmetric, with their overlaps; from dictionaries, vectors and tokenizers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from torch import Tensor

from patchclamp.core.errors import DataError, OptionError
from patchclamp.methods.bounds.ranking import Substitutions


def test_a_dictionary_is_made_symmetric() -> None:
    sets = Substitutions.of({"sea": ["ocean", "sea"], "ocean": ["main"], "calm": []})
    assert sets.synonyms == {"sea": ("ocean",), "ocean": ("main", "sea"), "main": ("ocean",)}
    assert sets.drawn_for("ocean") == ("ocean", "main", "sea")
    assert sets.drawn_for("calm") == ("calm",)
    assert sets.written_for("calm") == ()


def test_overlaps_of_the_worst_substitution() -> None:
    # sea - ocean - main: N(sea) = {sea, ocean}, N(ocean) = {sea, ocean, main}
    sets = Substitutions.of({"ocean": ["sea", "main"]})
    assert sets.retained("sea") == (1.0, 2 / 3)
    assert sets.retained("ocean") == (2 / 3, 1.0)
    assert sets.retained("whale") == (1.0, 1.0)
    far = Substitutions(synonyms={"sea": ("land",)}, noise={})
    assert far.retained("sea") == (0.0, 0.0)


def test_closed_sets_retain_everything_and_leave_the_attacker_as_he_was() -> None:
    sets = Substitutions.of({"ocean": ["sea", "main"], "big": ["large"]})
    closed = sets.closed()
    assert closed.synonyms == sets.synonyms
    assert all(closed.retained(w) == (1.0, 1.0) for w in sets.synonyms)
    assert set(closed.drawn_for("sea")) == {"sea", "ocean", "main"}
    capped = sets.closed(max_size=2)
    assert capped.drawn_for("sea") == ("sea", "ocean")
    assert capped.retained("sea") == sets.retained("sea")


def test_neighbours_of_vectors_without_function_words() -> None:
    words = ["sea", "ocean", "the", "land", "Sea", "a", "x-ray"]
    angles = np.deg2rad([0.0, 10.0, 5.0, 90.0, 1.0, 2.0, 3.0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1) * np.arange(1, 8)[:, None]
    sets = Substitutions.from_embeddings(words, vectors, threshold=0.9)
    assert sets.synonyms == {"sea": ("ocean",), "ocean": ("sea",)}
    with_grammar = Substitutions.from_embeddings(words, vectors, threshold=0.9, exclude=())
    assert with_grammar.written_for("the") == ("ocean", "sea")


def test_sets_are_the_union_of_what_both_words_propose() -> None:
    # the hub at 0 is nearest to all; it proposes one itself
    angles = np.deg2rad([0.0, 10.0, -12.0, 14.0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    words = ["hub", "ba", "bo", "bi"]
    sets = Substitutions.from_embeddings(words, vectors, threshold=0.9, max_neighbours=1)
    assert sets.synonyms == {
        "hub": ("ba", "bo"),
        "ba": ("bi", "hub"),
        "bo": ("hub",),
        "bi": ("ba",),
    }
    alone = Substitutions.from_embeddings(["ba"], vectors[:1], threshold=0.9)
    assert alone.synonyms == {}


class Pieces:
    """A tokenizer of which only the pieces matter."""

    pad_id = 0

    def __init__(self, pieces: list[str]) -> None:
        self.all = pieces
        self.vocab_size = len(pieces)

    def encode(self, texts: Sequence[str], *, max_length: int | None = None) -> dict[str, Tensor]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        raise NotImplementedError

    def pieces(self, ids: Sequence[int] | Tensor) -> list[str]:
        return [self.all[int(i)] for i in ids]


@pytest.mark.parametrize(
    "pieces",
    [
        ["[PAD]", "sea", "##sea", "ocean", "the", "se"],
        ["<s>", " sea", "sea", " ocean", " the", " se"],
    ],
)
def test_whole_words_of_a_tokenizer(pieces: list[str]) -> None:
    vectors = np.ones((6, 2))
    sets = Substitutions.from_tokenizer(Pieces(pieces), vectors)
    assert sets.synonyms == {"sea": ("ocean",), "ocean": ("sea",)}
    with pytest.raises(DataError, match="no token that is a whole word"):
        Substitutions.from_tokenizer(Pieces(["a", "b"]), vectors)


def test_sets_that_break_the_proof_are_refused() -> None:
    with pytest.raises(DataError, match="'deep sea' cannot be substituted"):
        Substitutions.of({"ocean": ["deep sea"]})
    with pytest.raises(DataError, match="one string"):
        Substitutions.of({"ocean": "sea"})
    with pytest.raises(DataError, match="does not hold the word itself"):
        Substitutions(synonyms={}, noise={"sea": ("ocean",)})
    with pytest.raises(DataError, match="listed twice"):
        Substitutions(synonyms={}, noise={"sea": ("sea", "ocean", "ocean")})
    with pytest.raises(DataError, match="synonym of itself"):
        Substitutions(synonyms={"sea": ("sea",)}, noise={})


def test_vectors_that_have_no_neighbours_are_refused() -> None:
    with pytest.raises(DataError, match="do not belong"):
        Substitutions.from_embeddings(["sea"], np.ones((2, 2)))
    with pytest.raises(DataError, match="no direction"):
        Substitutions.from_embeddings(["sea", "ocean"], np.zeros((2, 2)))
    with pytest.raises(DataError, match="no direction"):
        Substitutions.from_embeddings(["sea", "ocean"], np.full((2, 2), np.nan))
    with pytest.raises(DataError, match="listed twice"):
        Substitutions.from_embeddings(["sea", "sea"], np.ones((2, 2)))
    with pytest.raises(OptionError, match="no such neighbours"):
        Substitutions.from_embeddings(["sea"], np.ones((1, 2)), threshold=2.0)
