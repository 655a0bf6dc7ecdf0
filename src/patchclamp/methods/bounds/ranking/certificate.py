"""Which documents no substitution of words can lift into the top K of a smoothed ranker.

`overlap.py` bounds what an attack can make of one document's smoothed score g(d). Here:

Ranking. T, the reference, are K documents: those with the best estimates. If the bound for d is
below g(t) for all t in T, then K documents stay above d: d is not in the top K, whether or not T
are the true top K, and whatever happens to other documents outside T. Ties are never certified.

Statistics. p and g(t) are replaced by bounds from draws: for every document one below and one
above, each of which fails with probability at most (1 - confidence) / (2 num_documents). By the
union bound all hold together with probability `confidence`, and then every statement above is
true for every d, T and R at once; so T may be chosen by the same draws. That is a *statistical*
certificate: proved for every attack, up to the chance of unlucky draws, over the exact mean g
(a ranker deployed with few draws has its own sampling error), and over the reals up to
`tolerance`.

The paper's published evaluation allows for one Hoeffding error between the documents at ranks
K and K + 1, which the same draws have chosen among all documents: that takes bounds that hold
for all of them together, as here.

Source: Wu et al. 2022, arXiv 2209.06691.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray

from patchclamp.core.errors import DataError, OptionError
from patchclamp.core.progress import SILENT, Progress
from patchclamp.methods.bounds.ranking.attack import GreedyPromotion
from patchclamp.methods.bounds.ranking.overlap import ceiling
from patchclamp.methods.bounds.ranking.smoothing import (
    Clip,
    Estimate,
    Score,
    ScoreMap,
    SmoothedRanker,
)
from patchclamp.methods.bounds.ranking.substitutions import Substitutions
from patchclamp.methods.bounds.ranking.words import Text

_CERTIFY, _ATTACK, _JUDGE = range(3)
"""What draws are for; each purpose and document has a stream of its own."""
_POINTWISE = 1e-3
"""How far a score may move, in its own units or relatively, when scored beside other documents."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RankingCertificate:
    """What was certified.

    Attributes:
        table: one row a document, in the order given:
            `document` index; `plain` the ranker's own score, unmapped and unsmoothed;
            `rank` by smoothed score (1 is best; the first k are the reference);
            `score`, `low`, `high` smoothed score and interval; `exact` all texts were scored;
            `num_attackable` words that have a synonym;
            `ceiling` the most that an attack can make of its score;
            `margin` floor - ceiling; `certified` (both, like all that follow, null in the
            reference); `radius` the most substitutions it is certified against, null if it is
            not even clear without any; `attacked_score`, `attacked_rank`, `num_substituted` and
            `attacked_text` of the attack that was tried, null if none was.
        floor: least lower bound among the reference documents.
        contradictions: certified documents that the attack lifted beyond the floor, by a lower
            bound of the attacked score. Each means that a bound failed: there should be none.
    """

    table: pl.DataFrame
    floor: float
    k: int
    max_substitutions: int | None
    confidence: float
    contradictions: tuple[int, ...]

    @property
    def num_certified(self) -> int:
        """How many documents are certified."""
        return int(self.table["certified"].fill_null(value=False).sum())

    @property
    def num_outside(self) -> int:
        """How many documents are not in the reference."""
        return self.table.height - self.k

    @property
    def num_promoted(self) -> int | None:
        """How many documents the attack brought into the top K; None if none was tried."""
        ranks = self.table["attacked_rank"]
        if ranks.null_count() == self.table.height:
            return None
        return int((ranks <= self.k).fill_null(value=False).sum())

    @property
    def statement(self) -> str:
        """What is known, with the probability it is known with."""
        if self.num_certified == 0:
            return (
                f"None of the {self.num_outside} documents outside the top {self.k} is certified."
            )
        limit = self.max_substitutions
        words = "any number of words" if limit is None else f"at most {limit} words"
        return (
            f"With probability at least {self.confidence:g} over the draws, none of the "
            f"{self.num_certified} certified documents (of {self.num_outside} outside the top "
            f"{self.k}) enters the top {self.k} of the smoothed ranker, whichever synonyms of "
            f"{words} are written in each document outside the reference."
        )


@dataclass(frozen=True, kw_only=True)
class CertifiedTopK:
    """Certify that documents stay out of the top K under word substitution.

    Options: `k`; `max_substitutions` words an attacker may change in a document, None for all;
    `num_samples` draws a document; `confidence` that every statement made holds; `score_map`
    into [0, 1], part of the smoothed ranker: not to be chosen anew when documents change, nor
    after seeing the draws; `attack` to compare with, None for none; `tolerance` by which margins
    must exceed zero, for rounding in the scores; `batch_size` texts a call of the score.

    Shapes: documents, one string each; scores (document,).
    Units: `plain` in the ranker's; all else in mapped scores, [0, 1].
    Randomness: draws of words, by `seed`; each document's do not depend on the others'.
    Cost: documents x num_samples scores, as much again for the attacked documents, and the attack.
        Texts that repeat are scored once a call; documents with few texts are computed exactly.
    Raises: OptionError for options without meaning, or k >= documents; DataError for no
        documents, or a score that depends on what else is scored; TargetError for scores that
        are no finite numbers.
    Fails when: the sets overlap little, or scores lie close together: then nothing is
        certified. Attacks on the reference documents themselves (to demote them), insertions,
        deletions, changes of casing and words without synonyms are outside the threat model.
    Source: Wu et al. 2022, arXiv 2209.06691; where we differ: this module and `overlap`.
    """

    k: int = 10
    max_substitutions: int | None = None
    num_samples: int = 1000
    confidence: float = 0.95
    score_map: ScoreMap = field(default_factory=Clip)
    attack: GreedyPromotion | None = field(default_factory=GreedyPromotion)
    tolerance: float = 1e-6
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.k, self.num_samples, self.batch_size)
        if min(counts) < 1 or (self.max_substitutions or 0) < 0 or self.seed < 0:
            raise OptionError(
                "a count is out of range",
                got=f"k={self.k}, num_samples={self.num_samples}, batch_size={self.batch_size}, "
                f"max_substitutions={self.max_substitutions}, seed={self.seed}",
                expected="1 or more; max_substitutions and seed 0 or more",
            )
        if not 0 < self.confidence < 1 or not 0 <= self.tolerance < 1:
            raise OptionError(
                "no such probability or tolerance",
                got=f"confidence={self.confidence}, tolerance={self.tolerance}",
                expected="confidence strictly between 0 and 1, tolerance in [0, 1)",
            )

    def run(
        self,
        score: Score,
        query: str,
        documents: Sequence[str],
        substitutions: Substitutions,
        *,
        progress: Progress = SILENT,
    ) -> RankingCertificate:
        """Choose the top K, bound every other document, and attack it."""
        self._check(documents)
        ranker = SmoothedRanker(
            score=score,
            query=query,
            substitutions=substitutions,
            score_map=self.score_map,
            batch_size=self.batch_size,
            progress=progress,
        )
        progress.start("certifying the ranking", None, "texts")
        plain = _pointwise(ranker, documents)
        texts = [Text.cut(d) for d in documents]
        alpha = (1 - self.confidence) / (2 * len(texts))
        bounds = [
            ranker.estimate(text, self.num_samples, alpha, self._stream(_CERTIFY, i))
            for i, text in enumerate(texts)
        ]
        order = _order([e.mean for e in bounds])
        rank = {document: place + 1 for place, document in enumerate(order)}
        floor = min(bounds[i].low for i in order[: self.k])
        rows: list[dict[str, object]] = []
        contradictions = []
        for i, text in enumerate(texts):
            row: dict[str, object] = dict.fromkeys(SCHEMA)
            row |= {"document": i, "rank": rank[i], "plain": float(plain[i])}
            row |= {"score": bounds[i].mean, "low": bounds[i].low, "high": bounds[i].high}
            row |= {"exact": bounds[i].exact, "num_attackable": _num_attackable(ranker, text)}
            if rank[i] > self.k:
                row |= self._certify(substitutions, text, bounds[i], floor)
                attacked, lifted = self._attack(ranker, i, text, bounds, alpha)
                row |= attacked
                if row["certified"] and lifted > floor:
                    contradictions.append(i)
            rows.append(row)
        progress.finish()
        return RankingCertificate(
            table=pl.DataFrame(rows, schema=SCHEMA),
            floor=floor,
            k=self.k,
            max_substitutions=self.max_substitutions,
            confidence=self.confidence,
            contradictions=tuple(contradictions),
        )

    def _check(self, documents: Sequence[str]) -> None:
        if isinstance(documents, str) or not all(isinstance(d, str) for d in documents):
            raise DataError("documents must be strings", expected="one string a document")
        if not documents:
            raise DataError("there are no documents to rank")
        if self.k >= len(documents):
            raise OptionError(
                "every document is in the top K, so there is nothing to certify",
                got=f"k={self.k} of {len(documents)} documents",
                expected=f"k below {len(documents)}",
            )

    def _stream(self, purpose: int, document: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, purpose, document])

    def _certify(
        self, substitutions: Substitutions, text: Text, bound: Estimate, floor: float
    ) -> dict[str, object]:
        ceilings = ceiling(substitutions, text, bound.high)
        clear = ceilings < floor - self.tolerance
        most = len(ceilings) - 1
        limit = most if self.max_substitutions is None else min(self.max_substitutions, most)
        # ceilings never fall, so what is clear are the first so many
        return {
            "ceiling": float(ceilings[limit]),
            "margin": floor - float(ceilings[limit]),
            "certified": bool(clear[limit]),
            "radius": int(clear.sum()) - 1 if clear[0] else None,
        }

    def _attack(
        self,
        ranker: SmoothedRanker,
        document: int,
        text: Text,
        bounds: Sequence[Estimate],
        alpha: float,
    ) -> tuple[dict[str, object], float]:
        """What the attack made of a document, and a lower bound of its score after it."""
        if self.attack is None:
            return {}, -math.inf
        limit = len(text.words) if self.max_substitutions is None else self.max_substitutions
        attacked = self.attack.promote(ranker, text, limit, self._stream(_ATTACK, document))
        after = bounds[document]
        if attacked.words != text.words:
            after = ranker.estimate(
                attacked, self.num_samples, alpha, self._stream(_JUDGE, document)
            )
        scores = [after.mean if i == document else e.mean for i, e in enumerate(bounds)]
        return {
            "attacked_score": after.mean,
            "attacked_rank": _order(scores).index(document) + 1,
            "num_substituted": sum(a != b for a, b in zip(attacked.words, text.words, strict=True)),
            "attacked_text": attacked.write(attacked.words),
        }, after.low


SCHEMA = {
    "document": pl.Int64,
    "rank": pl.Int64,
    "plain": pl.Float64,
    "score": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "exact": pl.Boolean,
    "num_attackable": pl.Int64,
    "ceiling": pl.Float64,
    "margin": pl.Float64,
    "certified": pl.Boolean,
    "radius": pl.Int64,
    "attacked_score": pl.Float64,
    "attacked_rank": pl.Int64,
    "num_substituted": pl.Int64,
    "attacked_text": pl.String,
}


def _order(scores: Sequence[float]) -> list[int]:
    """Documents from the best on; of equal ones the first given is before."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def _num_attackable(ranker: SmoothedRanker, text: Text) -> int:
    return sum(bool(ranker.substitutions.written_for(w)) for w in text.words)


def _pointwise(ranker: SmoothedRanker, documents: Sequence[str]) -> NDArray[np.float64]:
    """The ranker's own scores.

    Raises: DataError if a document's score depends on the documents scored beside it, or is
        drawn anew: then the mean over texts is not the mean of one function.
    """
    together, some = ranker.raw(documents), ranker.raw(documents[::2])
    moved = np.abs(together[::2] - some) / np.maximum(1.0, np.abs(some))
    if moved.max() > _POINTWISE:
        worst = int(moved.argmax())
        raise DataError(
            "a document's score depends on the others that are scored with it, or on chance",
            got=f"{together[2 * worst]:.6g} and {some[worst]:.6g} for document {2 * worst}",
            expected="one score a document (a network in eval mode, scored on its own)",
        )
    return together
