"""Which words an attacker may write in place of which, and which words the smoothing draws.

Two families of sets, kept apart because the certificate needs both:

    synonyms[w]   what the attacker may put in place of w (w itself left out)
    noise[w]      what the smoothing draws, uniformly, where the text says w (w included)

`Substitutions.of` and `from_embeddings` take noise[w] = synonyms[w] with w. `closed` keeps the
attacker's sets and takes whole groups of words that are linked by synonyms as noise: then
noise[w] = noise[w'] for every substitution, and no substitution changes the smoothed score.

Sources: Wu et al. 2022, arXiv 2209.06691; the sets, Ye et al. 2020, arXiv 2005.14424 (SAFER).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchclamp.core.errors import DataError, OptionError
from patchclamp.methods.bounds.ranking.words import FUNCTION_WORDS, problem_with
from patchclamp.model.tokens import Tokenizer

_ROWS = 1024
"""Words whose neighbours are looked for at once: bounds the memory of the search."""


class Retained(NamedTuple):
    """How much of the noise survives the worst substitution of one word.

    Attributes:
        own: least share of noise[w] that lies in noise[w'], over the synonyms w'.
        other: least share of noise[w'] that lies in noise[w].
    """

    own: float
    other: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Substitutions:
    """Sets of the attacker and of the smoothing; see the module's docstring.

    Words without an entry cannot be substituted, and are drawn as they stand.

    Raises: DataError for a word that cannot be written in place of another (see
        `words.problem_with`), that is listed twice, or for noise that lacks its own word.
    """

    synonyms: Mapping[str, tuple[str, ...]]
    noise: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        for sets in (self.synonyms, self.noise):
            for word, others in sets.items():
                _check((word, *others))
                if len(set(others)) < len(others):
                    raise DataError(f"a word is listed twice in the set of '{word}'")
        for word, others in self.synonyms.items():
            if word in others:
                raise DataError(f"'{word}' is listed as a synonym of itself")
        for word, others in self.noise.items():
            if word not in others:
                raise DataError(f"the noise of '{word}' does not hold the word itself")

    @classmethod
    def of(cls, sets: Mapping[str, Iterable[str]]) -> Substitutions:
        """From a dictionary, made symmetric: w' for w implies w for w'.

        A word may be listed in its own set; that changes nothing.
        """
        links: dict[str, set[str]] = {}
        for word, others in sets.items():
            if isinstance(others, str):
                raise DataError(
                    f"the set of '{word}' is one string",
                    got=repr(others),
                    expected="a collection of words",
                )
            for other in others:
                if other != word:
                    links.setdefault(word, set()).add(other)
                    links.setdefault(other, set()).add(word)
        synonyms = {word: tuple(sorted(others)) for word, others in links.items()}
        noise = {word: (word, *others) for word, others in synonyms.items()}
        return cls(synonyms=synonyms, noise=noise)

    @classmethod
    def from_embeddings(
        cls,
        words: Sequence[str],
        vectors: object,
        *,
        threshold: float = 0.5,
        max_neighbours: int = 4,
        exclude: Collection[str] = FUNCTION_WORDS,
    ) -> Substitutions:
        """Words are synonyms if one is among the other's nearest and the cosine is large.

        Neighbours in an embedding are related words, opposites among them ("large", "small"):
        a certificate over such sets says more than one over true synonyms, and is harder to get.

        Args:
            words: distinct; those that cannot be substituted (see `words.problem_with`) and
                those in `exclude` are left out, as words and as neighbours.
            vectors: (word, width), anything that numpy reads.
            threshold: least cosine.
            max_neighbours: how many nearest each word proposes. The sets are the union of both
                directions, so a word that many propose has more.
        """
        table = np.asarray(vectors, dtype=np.float64)
        if table.ndim != 2 or table.shape[0] != len(words):
            raise DataError(
                "vectors do not belong to these words",
                got=f"{len(words)} words and vectors of shape {table.shape}",
                expected="one row a word",
            )
        if len(set(words)) < len(words):
            raise DataError("a word is listed twice among the words of the embedding")
        if not -1 <= threshold <= 1 or max_neighbours < 1:
            raise OptionError(
                "no such neighbours",
                got=f"threshold={threshold}, max_neighbours={max_neighbours}",
                expected="a cosine from -1 to 1, and one neighbour or more",
            )
        kept = [i for i, w in enumerate(words) if w not in exclude and problem_with(w) is None]
        table = table[kept]
        norms = np.linalg.norm(table, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or (norms == 0).any():
            raise DataError("an embedding is zero or not finite, so it has no direction")
        near = _neighbours((table / norms).astype(np.float32), threshold, max_neighbours)
        return cls.of({words[kept[i]]: [words[kept[j]] for j in js] for i, js in near.items()})

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Tokenizer,
        vectors: object,
        *,
        threshold: float = 0.5,
        max_neighbours: int = 4,
        exclude: Collection[str] = FUNCTION_WORDS,
    ) -> Substitutions:
        """From a model's own input embedding (token, width), over tokens that are whole words.

        A whole word is a piece that is written with a space before it, or, where pieces that
        continue a word are marked `##`, one without the mark; of three letters or more, because
        shorter pieces are mostly fragments. See `from_embeddings` for the options.
        """
        table = np.asarray(vectors, dtype=np.float64)
        num = min(tokenizer.vocab_size, len(table))
        pieces = tokenizer.pieces(range(num))
        marked = any(p.startswith("##") and len(p) > 2 for p in pieces)
        rows: dict[str, int] = {}
        for i, piece in enumerate(pieces):
            word = piece if marked else piece.removeprefix(" ")
            if (marked or piece.startswith(" ")) and len(word) > 2 and problem_with(word) is None:
                rows.setdefault(word, i)
        if not rows:
            raise DataError(
                "the tokenizer has no token that is a whole word in lower case",
                hint="give the sets as a dictionary: Substitutions.of({...})",
            )
        return cls.from_embeddings(
            list(rows),
            table[list(rows.values())],
            threshold=threshold,
            max_neighbours=max_neighbours,
            exclude=exclude,
        )

    def closed(self, max_size: int = 100) -> Substitutions:
        """The same attacker; the noise of a word is all that synonyms of synonyms lead to.

        Groups of more than `max_size` words keep the noise they have.
        """
        noise, seen = dict(self.noise), set[str]()
        for word in self.synonyms:
            if word in seen:
                continue
            group, todo = {word}, [word]
            while todo:
                new = set(self.synonyms.get(todo.pop(), ())) - group
                group |= new
                todo += new
            seen |= group
            if len(group) <= max_size:
                noise.update(dict.fromkeys(group, tuple(sorted(group))))
        return Substitutions(synonyms=self.synonyms, noise=noise)

    def drawn_for(self, word: str) -> tuple[str, ...]:
        """What the smoothing draws where the text says `word`."""
        return self.noise.get(word, (word,))

    def written_for(self, word: str) -> tuple[str, ...]:
        """What the attacker may write in place of `word`."""
        return self.synonyms.get(word, ())

    def retained(self, word: str) -> Retained:
        """How much noise survives the worst substitution of `word`; 1 and 1 if it has none."""
        if word not in self._retained:
            own = set(self.drawn_for(word))
            shares = [(1.0, 1.0)]
            for synonym in self.written_for(word):
                other = set(self.drawn_for(synonym))
                common = len(own & other)
                shares.append((common / len(own), common / len(other)))
            self._retained[word] = Retained(
                own=min(a for a, _ in shares), other=min(b for _, b in shares)
            )
        return self._retained[word]

    @cached_property
    def _retained(self) -> dict[str, Retained]:
        return {}


def _check(words: Iterable[str]) -> None:
    for word in words:
        problem = problem_with(word)
        if problem is not None:
            raise DataError(
                f"'{word}' cannot be substituted: {problem}",
                expected="one word in lower case, such as 'harbour'",
            )


def _neighbours(
    unit: NDArray[np.float32], threshold: float, max_neighbours: int
) -> dict[int, list[int]]:
    """The nearest others of each row with a large enough cosine, as indices."""
    found: dict[int, list[int]] = {}
    for start in range(0, len(unit), _ROWS):
        cosine = unit[start : start + _ROWS] @ unit.T
        for row in range(len(cosine)):
            cosine[row, start + row] = -np.inf
            near = np.flatnonzero(cosine[row] >= threshold)
            if len(near):
                nearest = near[np.argsort(-cosine[row, near], kind="stable")[:max_neighbours]]
                found[start + row] = nearest.tolist()
    return found
