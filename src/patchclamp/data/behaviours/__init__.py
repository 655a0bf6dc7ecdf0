"""Behaviours as prompt pairs: what a circuit is found for.

`catalogue` lists them, `prompts` gives pairs of text and `token_pairs` what a network
takes. The user's own pairs are read by `pairs.read_pairs` and go the same way, through
`pairs.tokenised`. Importing this package loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from patchclamp.core.errors import DataError, nearest

if TYPE_CHECKING:
    from patchclamp.data.behaviours.pairs import PromptSet, Split, TokenPairs
    from patchclamp.model.tokens import Tokenizer

__all__ = ["INDUCTION", "Behaviour", "catalogue", "prompts", "token_pairs"]

INDUCTION = "induction"
"""The one behaviour that is made of token ids, not of text."""


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """One behaviour, as it is listed. The first of `variants` is the default."""

    name: str
    description: str
    example: str
    answer: str
    corrupt: str
    variants: tuple[str, ...]
    source: str


BEHAVIOURS: dict[str, Behaviour] = {
    entry.name: entry
    for entry in (
        Behaviour(
            name="indirect objects",
            description="Who receives, of two people named before.",
            example="When Mary and John arrived at the park, John handed a book to",
            answer="Mary, not John",
            corrupt="the giver is the other person, or a third one",
            variants=("names swapped", "third name"),
            source="Wang et al. 2022",
        ),
        Behaviour(
            name="greater than",
            description="A span of years ends later than it began.",
            example="The war lasted from the year 1732 to the year 17",
            answer="33 to 99, not 00 to 32",
            corrupt="it begins in the year 01 of the century; the answers do not change places",
            variants=("two digits", "one digit"),
            source="Hanna et al. 2023",
        ),
        Behaviour(
            name=INDUCTION,
            description="A segment of random tokens comes again and is continued.",
            example="... k f w b q z ... k f w",
            answer="b, which came after w before",
            corrupt="the earlier segment is shuffled, or another token follows in it",
            variants=("segment shuffled", "continuation replaced"),
            source="Olsson et al. 2022",
        ),
        Behaviour(
            name="colored objects",
            description="The color of one of three things.",
            example="I have a red pen, a blue cup and a green hat. My cup is",
            answer="blue, not red or green",
            corrupt="another of the three things is asked for",
            variants=("statement", "question"),
            source="Merullo et al. 2024",
        ),
        Behaviour(
            name="docstring",
            description="The next parameter of a function in its docstring.",
            example="def f(self, load, size, file): ... :param load: ... :param size: ... :param",
            answer="file, not load or size",
            corrupt="the next two parameters change places in the definition",
            variants=("next two swapped",),
            source="Heimersheim & Janiak 2023",
        ),
        Behaviour(
            name="multiple choice",
            description="The letter of the right option of four.",
            example="What color is grass? A. salt B. green C. seven D. paper Answer:",
            answer="B, not A, C or D",
            corrupt="the right option and another one change places",
            variants=("A to D", "random letters"),
            source="Lieberum et al. 2023",
        ),
        Behaviour(
            name="gendered pronoun",
            description="The pronoun that goes with a first name.",
            example="I think Emma is a very kind person, isn't",
            answer="she, not he",
            corrupt="a name of the other gender",
            variants=("other gender",),
            source="Mathwin et al. 2023",
        ),
        Behaviour(
            name="subject-verb agreement",
            description="The number of the verb after a subject and another noun.",
            example="The keys near the cabinet",
            answer="are, were or have; not is, was or has",
            corrupt="the subject has the other number",
            variants=("subject's number",),
            source="Finlayson et al. 2021; Newman et al. 2021",
        ),
    )
}


class Generate(Protocol):
    """What the module of a behaviour of text offers."""

    def __call__(
        self,
        num: int,
        *,
        seed: int = ...,
        split: Split | str = ...,
        tokenizer: Tokenizer | None = ...,
        variant: str | None = ...,
    ) -> PromptSet: ...


def catalogue() -> tuple[Behaviour, ...]:
    """The behaviours, in the order in which they are listed."""
    return tuple(BEHAVIOURS.values())


def prompts(
    name: str,
    num: int,
    *,
    seed: int = 0,
    split: Split | str = "train",
    tokenizer: Tokenizer | None = None,
    variant: str | None = None,
) -> PromptSet:
    """Pairs of a behaviour as text.

    Args:
        split: "train" or "held out", which share no template, name or noun.
        tokenizer: whose words of one token are used; without one, all words are.

    Raises: DataError for an unknown behaviour, split or variant, one that is not text,
    or a tokenizer with too few words of one token.
    """
    _known(name)
    generators = _generators()
    if name not in generators:
        raise DataError(
            f"'{name}' is made of token ids and has no text",
            hint="patchclamp.data.behaviours.token_pairs",
        )
    return generators[name](num, seed=seed, split=split, tokenizer=tokenizer, variant=variant)


def token_pairs(
    name: str,
    num: int,
    *,
    tokenizer: Tokenizer | None = None,
    vocabulary: Sequence[int] | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    split: Split | str = "train",
    variant: str | None = None,
) -> tuple[TokenPairs, ...]:
    """Pairs of a behaviour as token ids, one `TokenPairs` for each length of prompt.

    Args:
        vocabulary: for induction, ids to draw from; the tokenizer's words (or letters)
            if not given.
        vocab_size: outputs of the network, where it has fewer than the tokenizer.

    Raises: DataError as for `prompts`, or where there is no tokenizer and it is needed.
    """
    from patchclamp.data.behaviours import induction
    from patchclamp.data.behaviours.pairs import tokenised

    _known(name)
    if name == INDUCTION and vocabulary is not None:
        return (induction.generate(num, vocabulary, seed=seed, split=split, variant=variant),)
    if tokenizer is None or vocabulary is not None:
        raise DataError(
            f"'{name}' needs a tokenizer"
            if tokenizer is None
            else f"the words of '{name}' are not drawn from a vocabulary",
            hint="only 'induction' can do with a vocabulary=range(...) instead of a tokenizer",
        )
    if name == INDUCTION:
        ids = induction.vocabulary_of(tokenizer)
        ids = ids if vocab_size is None else tuple(i for i in ids if i < vocab_size)
        return (induction.generate(num, ids, seed=seed, split=split, variant=variant),)
    found = prompts(name, num, seed=seed, split=split, tokenizer=tokenizer, variant=variant)
    return tokenised(found, tokenizer, vocab_size=vocab_size)


def _known(name: str) -> None:
    if name not in BEHAVIOURS:
        raise DataError(
            f"no behaviour '{name}'",
            expected="one of " + ", ".join(f"'{n}'" for n in BEHAVIOURS),
            nearest=nearest(name, BEHAVIOURS),
        )


def _generators() -> dict[str, Generate]:
    """Imported on use, because they need torch."""
    from patchclamp.data.behaviours import (
        colored_objects,
        docstring,
        gendered_pronoun,
        greater_than,
        indirect_objects,
        multiple_choice,
        subject_verb,
    )

    modules = (
        indirect_objects,
        greater_than,
        colored_objects,
        docstring,
        multiple_choice,
        gendered_pronoun,
        subject_verb,
    )
    return {module.NAME: module.generate for module in modules}
