"""Promoting a document by substituting words: what a certificate is compared with.

A certificate says which documents no attack can lift into the top K; an attack shows some that
one can. Between the two lies what neither decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from patchclamp.core.errors import OptionError
from patchclamp.methods.bounds.ranking.smoothing import SmoothedRanker
from patchclamp.methods.bounds.ranking.words import Text


@dataclass(frozen=True, kw_only=True)
class GreedyPromotion:
    """Raise a document's smoothed score by the substitutions that raise it most one by one.

    Every allowed substitution is tried alone, on the same draws of the other words. Places are
    then taken in order of their best gain, and a substitution is kept if it still raises the
    score with those before it in place.

    Shapes: a text of n words; the result has the same places.
    Units: none.  Randomness: the draws, from the generator that is given.
    Cost: num_draws x (substitutions of the text + places) scores.
    Fails when: words only help together, or num_draws is too small for the noise; the attack
        is a lower bound of what an attacker can do, never an upper one.
    """

    num_draws: int = 8

    def __post_init__(self) -> None:
        if self.num_draws < 1:
            raise OptionError("an attack needs a draw", got=f"num_draws={self.num_draws}")

    def promote(
        self,
        ranker: SmoothedRanker,
        text: Text,
        max_substitutions: int,
        generator: np.random.Generator,
    ) -> Text:
        """The text with at most `max_substitutions` words replaced; itself if nothing helps."""
        uniform = generator.random((self.num_draws, len(text.words)))
        single = [
            (place, synonym)
            for place, word in enumerate(text.words)
            for synonym in ranker.substitutions.written_for(word)
        ]
        means = ranker.means([text, *(_with(text, p, s) for p, s in single)], uniform).tolist()
        start = value = means[0]
        best: dict[int, tuple[float, str]] = {}
        for (place, synonym), mean in zip(single, means[1:], strict=True):
            best[place] = max(best.get(place, (start, "")), (mean, synonym))
        left = max_substitutions
        for place, (mean, synonym) in sorted(best.items(), key=lambda b: (-b[1][0], b[0])):
            if left == 0 or mean <= start:
                break
            tried = _with(text, place, synonym)
            raised = float(ranker.means([tried], uniform)[0])
            if raised > value:
                text, value, left = tried, raised, left - 1
        return text


def _with(text: Text, place: int, word: str) -> Text:
    return text.replaced((*text.words[:place], word, *text.words[place + 1 :]))
