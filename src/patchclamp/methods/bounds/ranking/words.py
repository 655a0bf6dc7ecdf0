"""A document cut at its words, so that words can be substituted and the text written again.

Substituted words are lower-case keys; the text keeps the casing that each place has ("Sea" is
replaced by "Ocean", "SEA" by "OCEAN"). The certificate needs that an attacked text, cut again,
shows the same places with the same casings: `problem_with` names the words that would break this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")

_GRAMMAR = """
    a an the this that these those such same other another each every either neither both all any
    some no none not nor and or but if then else than as so because since while until although
    though unless whether of in on at by for from to with without within into onto upon over under
    above below between among through during before after about against along across around behind
    beside besides beyond despite except inside outside near off out per toward towards up down via
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his
    himself she her hers herself it its itself they them their theirs themselves who whom whose
    which what where when why how there here am is are was were be been being do does did done
    doing have has had having can could may might must shall should will would ought only very too
    also just even still yet again ever never more most less least much many few several own
"""

FUNCTION_WORDS = frozenset(_GRAMMAR.split())
"""English words that carry grammar, not topic. They are not substituted unless asked for."""


def problem_with(word: str) -> str | None:
    """Why a word cannot be substituted or be a substitute; None for one that can."""
    if not _WORD.fullmatch(word):
        return "it is not one word of letters"
    title, upper = word.capitalize(), word.upper()
    if word != word.lower():
        return "it is not in lower case"
    if len({word, title, upper}) < 3:
        return "its casings cannot be told apart (two letters or more, of a script with case)"
    if {title.lower(), upper.lower()} != {word} or not _WORD.fullmatch(upper):
        return "its casings do not lead back to it"
    return None


@dataclass(frozen=True)
class Text:
    """A document as words and what stands between them.

    Attributes:
        words: in lower case, but a word of irregular casing ("iPhone") as it stands.
        gaps: what stands before, between and after the words; one more than words.
        casings: what gives each word its casing.
    """

    words: tuple[str, ...]
    gaps: tuple[str, ...]
    casings: tuple[Callable[[str], str], ...]

    @classmethod
    def cut(cls, document: str) -> Text:
        """Cut a document. `cut(d).write(cut(d).words) == d` for every string."""
        matches = list(_WORD.finditer(document))
        starts = [0, *(m.end() for m in matches)]
        ends = [*(m.start() for m in matches), len(document)]
        found = [_casing(m.group()) for m in matches]
        return cls(
            words=tuple(word for word, _ in found),
            gaps=tuple(document[a:b] for a, b in zip(starts, ends, strict=True)),
            casings=tuple(casing for _, casing in found),
        )

    def write(self, words: Sequence[str]) -> str:
        """The text with these words in the places of its own."""
        parts = [self.gaps[0]]
        for word, casing, gap in zip(words, self.casings, self.gaps[1:], strict=True):
            parts += (casing(word), gap)
        return "".join(parts)

    def replaced(self, words: Sequence[str]) -> Text:
        """The same places with other words."""
        return Text(words=tuple(words), gaps=self.gaps, casings=self.casings)


def _casing(written: str) -> tuple[str, Callable[[str], str]]:
    word = written.lower()
    for casing in (str.lower, str.capitalize, str.upper):
        if casing(word) == written:
            return word, casing
    return written, str
