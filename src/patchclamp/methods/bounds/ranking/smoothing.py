"""The smoothed ranker: a document's mean score over random substitutions of its words.

Every word is drawn on its own, uniformly from its noise set (`Substitutions.noise`). The score
of each drawn text is first mapped into [0, 1], by a map that is part of the ranker's definition:
`Clip` keeps differences of scores inside a range, `Vote` counts the texts that reach a threshold.
A narrow range or a vote pulls relevant and irrelevant documents apart, which is what a
certificate needs; it also makes documents on the same side of it equal.

Source: Wu et al. 2022, arXiv 2209.06691; the maps into [0, 1] are ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from patchclamp.core.errors import OptionError, TargetError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.methods.bounds.ranking.intervals import betting_upper, binomial_upper
from patchclamp.methods.bounds.ranking.substitutions import Substitutions
from patchclamp.methods.bounds.ranking.words import Text

Values: TypeAlias = NDArray[np.float64]
Score: TypeAlias = Callable[[str, Sequence[str]], Tensor | NDArray[np.floating]]
"""A ranker: score(query, documents) is (document,), larger for more relevant; each document's
score must not depend on which others are scored with it."""

_BLOCK = 4096
"""Drawn texts that are held at once."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A score in [low, high] is mapped linearly to [0, 1]; one beyond is cut to 0 or 1."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise OptionError(
                "no range of scores",
                got=f"low={self.low}, high={self.high}",
                expected="finite numbers, low below high",
            )

    def __call__(self, scores: Values) -> Values:
        """Scores as numbers in [0, 1]."""
        mapped: Values = np.clip((scores - self.low) / (self.high - self.low), 0.0, 1.0)
        return mapped

    def upper(self, values: Values, alpha: float) -> float:
        """A number that the mean of the mapped scores exceeds with probability at most alpha."""
        return betting_upper(values, alpha)


@dataclass(frozen=True, kw_only=True)
class Vote:
    """A score counts as 1 if it reaches the threshold, else as 0."""

    threshold: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise OptionError("the threshold of a vote is not finite", got=str(self.threshold))

    def __call__(self, scores: Values) -> Values:
        """Scores as 0 or 1."""
        return np.asarray(scores >= self.threshold, dtype=np.float64)

    def upper(self, values: Values, alpha: float) -> float:
        """A number that the share of votes exceeds with probability at most alpha (exact)."""
        return binomial_upper(int(values.sum()), len(values), alpha)


ScoreMap: TypeAlias = Clip | Vote


class Estimate(NamedTuple):
    """A smoothed score.

    Attributes:
        mean: over the draws, or over all texts if `exact`.
        low, high: each fails to bound the smoothed score with probability at most alpha.
        exact: whether every text was scored: low and high then differ by rounding only.
    """

    mean: float
    low: float
    high: float
    exact: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class SmoothedRanker:
    """Scores of texts and of smoothed documents for one query.

    Raises: TargetError if the score is not one finite number a document.
    """

    score: Score
    query: str
    substitutions: Substitutions
    score_map: ScoreMap
    batch_size: int = 64
    progress: Progress = SILENT

    def raw(self, documents: Sequence[str]) -> Values:
        """Scores as the ranker gives them, (document,)."""
        parts = [
            self._batch(documents[i : i + self.batch_size])
            for i in range(0, len(documents), self.batch_size)
        ]
        return np.concatenate(parts)

    def mapped(self, documents: Sequence[str]) -> Values:
        """Scores in [0, 1], (document,). A text that occurs twice is scored once."""
        distinct = list(dict.fromkeys(documents))
        # texts of like length share a batch: less padding, the same scores
        distinct.sort(key=len)
        of = dict(zip(distinct, self.score_map(self.raw(distinct)), strict=True))
        return np.array([of[d] for d in documents])

    def num_texts(self, text: Text) -> int:
        """How many texts the smoothing can draw for a document."""
        return math.prod(len(self.substitutions.drawn_for(w)) for w in text.words)

    def estimate(
        self, text: Text, num_samples: int, alpha: float, generator: np.random.Generator
    ) -> Estimate:
        """The smoothed score: over all texts if they are at most `num_samples`, else drawn."""
        if self.num_texts(text) <= num_samples:
            everything = itertools.product(*map(self.substitutions.drawn_for, text.words))
            values = self.mapped([text.write(words) for words in everything])
            mean = math.fsum(values) / len(values)
            # fsum rounds once and the division once; two steps outward hold the exact mean
            low, high = (math.nextafter(math.nextafter(mean, end), end) for end in (-1.0, 2.0))
            return Estimate(mean, max(0.0, low), min(1.0, high), exact=True)
        uniform = generator.random((num_samples, len(text.words)))
        values = self.at(text, uniform)
        return Estimate(
            mean=float(values.mean()),
            low=max(0.0, 1 - self.score_map.upper(1 - values, alpha)),
            high=self.score_map.upper(values, alpha),
            exact=False,
        )

    def at(self, text: Text, uniform: Values) -> Values:
        """Mapped scores of the texts that numbers in [0, 1), (draw, word), pick: (draw,)."""
        parts = [
            self.mapped(list(self._texts(text, uniform[i : i + _BLOCK])))
            for i in range(0, len(uniform), _BLOCK)
        ]
        return np.concatenate(parts)

    def means(self, texts: Sequence[Text], uniform: Values) -> Values:
        """The mean of `at` for several texts with the same number of words: (text,)."""
        drawn = [document for text in texts for document in self._texts(text, uniform)]
        means: Values = self.mapped(drawn).reshape(len(texts), -1).mean(1)
        return means

    def _texts(self, text: Text, uniform: Values) -> Iterator[str]:
        choices = [self.substitutions.drawn_for(w) for w in text.words]
        sizes = np.array([len(c) for c in choices], dtype=np.int64)
        for row in np.minimum((uniform * sizes).astype(np.int64), sizes - 1):
            yield text.write([c[i] for c, i in zip(choices, row, strict=True)])

    def _batch(self, documents: Sequence[str]) -> Values:
        scores = self.score(self.query, documents)
        if isinstance(scores, Tensor):
            scores = scores.detach().cpu().numpy()
        values = np.asarray(scores, dtype=np.float64)
        if values.shape != (len(documents),):
            raise TargetError(
                "the ranker does not give one score a document",
                got=f"shape {values.shape} for {len(documents)} documents",
                expected=f"({len(documents)},)",
            )
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            raise TargetError(
                "the ranker's score is not a finite number",
                got=f"{values[wrong[0]]} for '{documents[wrong[0]][:60]}'",
            )
        self.progress.advance(len(documents))
        return values
