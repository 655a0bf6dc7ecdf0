"""Indirect objects: two people are named, one of them gives, the other receives.

    When Mary and John arrived at the park, John handed a book to -> Mary, not John

Half of the prompts name the one who receives first (ABBA), half second (BABA). The
corrupt prompt differs in one token, the second naming of the one who gives:

- "names swapped": it is the other person, so that the answers change places;
- "third name": it is a third person, so that no name occurs twice and both answers
  are equally good.

Source: Wang et al. 2022, "Interpretability in the wild: a circuit for indirect object
identification in GPT-2 small". The templates are our own.
"""

from __future__ import annotations

from patchclamp.data.behaviours.drawing import Draw, variant_of, words
from patchclamp.data.behaviours.names import MEN, WOMEN
from patchclamp.data.behaviours.pairs import Pair, PromptSet, Split
from patchclamp.model.tokens import Tokenizer

NAME = "indirect objects"
VARIANTS = ("names swapped", "third name")
TEMPLATES = (
    "When {a} and {b} arrived at the {place}, {s} handed a {thing} to",
    "After {a} and {b} left the {place}, {s} decided to give a {thing} to",
    "Last week {a} and {b} met at the {place}, and {s} sold a {thing} to",
    "While {a} and {b} were waiting at the {place}, {s} passed a {thing} to",
    "Then {a} and {b} had a long talk at the {place}. In the end {s} offered a {thing} to",
    "Because {a} and {b} were both at the {place}, {s} brought a {thing} to",
    "At the {place} {a} and {b} sat down together, and {s} gave a {thing} to",
    "Yesterday {a} and {b} cleaned the {place}. Afterwards {s} showed a {thing} to",
)
PLACES = words("park school store office station beach hotel market museum church")
THINGS = words("book drink ring flower ball key gift letter map basket")


def generate(
    num: int,
    *,
    seed: int = 0,
    split: Split | str = Split.TRAIN,
    tokenizer: Tokenizer | None = None,
    variant: str | None = None,
) -> PromptSet:
    """Pairs, each name receiving equally often.

    Raises: DataError for an unknown split or variant, or too few names of one token.
    """
    variant = variant_of(NAME, variant, VARIANTS)
    draw = Draw(NAME, seed, split, tokenizer)
    names = draw.words(MEN, what="names") + draw.words(WOMEN, what="names")
    receivers, orders = draw.cycle(names), draw.cycle(("ABBA", "BABA"))
    templates = draw.cycle(draw.part(TEMPLATES))
    places, things = draw.words(PLACES, what="places"), draw.words(THINGS, what="things")

    def make() -> Pair:
        receiver = next(receivers)
        giver, third = draw.rng.sample([name for name in names if name != receiver], 2)
        first, second = (receiver, giver) if next(orders) == "ABBA" else (giver, receiver)
        template = next(templates)
        place, thing = draw.rng.choice(places), draw.rng.choice(things)

        def told(subject: str) -> str:
            return template.format(a=first, b=second, s=subject, place=place, thing=thing)

        other = receiver if variant == "names swapped" else third
        return Pair(told(giver), told(other), (" " + receiver,), (" " + giver,))

    return PromptSet(
        name=NAME,
        description=f"Who receives, of two people named before; corrupt: {variant}.",
        pairs=draw.pairs(num, make),
        split=draw.split,
        source="Wang et al. 2022",
        num_redrawn=draw.num_redrawn,
    )
