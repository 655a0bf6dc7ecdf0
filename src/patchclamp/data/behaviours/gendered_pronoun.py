"""Gendered pronoun: a name is followed by the pronoun that goes with it.

    I think Emma is a very kind person, isn't -> she, not he

The corrupt prompt has a name of the other gender instead, so that the answers change
places. Which pronoun goes with a name is what most texts say, not what is so of a person.

Source: Mathwin et al. 2023, "Identifying a preliminary circuit for predicting gendered
pronouns in GPT-2 small". The templates are our own.
"""

from __future__ import annotations

from patchclamp.data.behaviours.drawing import Draw, variant_of, words
from patchclamp.data.behaviours.names import MEN, WOMEN
from patchclamp.data.behaviours.pairs import Pair, PromptSet, Split
from patchclamp.model.tokens import Tokenizer

NAME = "gendered pronoun"
VARIANTS = ("other gender",)
TEMPLATES = (
    "I think {name} is a very kind {who}, isn't",
    "The old {who} called {name} sold the car because",
    "Everyone at work says that {name} is a good {who}, doesn't that mean that",
    "As a {who}, {name} went home early because",
    "Surely {name} was the best {who} in town, wasn't",
    "My {who} {name} did not come to the party because",
    "It is clear that {name} will be a fine {who}, won't",
    "Our {who} {name} was so tired last night that",
)
ROLES = words(
    "person friend doctor neighbor singer teacher student writer driver lawyer artist cook"
)


def generate(
    num: int,
    *,
    seed: int = 0,
    split: Split | str = Split.TRAIN,
    tokenizer: Tokenizer | None = None,
    variant: str | None = None,
) -> PromptSet:
    """Pairs, both pronouns being right equally often.

    Raises: DataError for an unknown split or variant, or too few words of one token.
    """
    variant_of(NAME, variant, VARIANTS)
    draw = Draw(NAME, seed, split, tokenizer)
    men = draw.cycle(draw.words(MEN, what="names"))
    women = draw.cycle(draw.words(WOMEN, what="names"))
    roles = draw.words(ROLES, what="roles")
    templates, pronouns = draw.cycle(draw.part(TEMPLATES)), draw.cycle((" he", " she"))

    def make() -> Pair:
        template, who = next(templates), draw.rng.choice(roles)
        man, woman = (template.format(name=next(n), who=who) for n in (men, women))
        if next(pronouns) == " he":
            return Pair(man, woman, (" he",), (" she",))
        return Pair(woman, man, (" she",), (" he",))

    return PromptSet(
        name=NAME,
        description="The pronoun that goes with a first name.",
        pairs=draw.pairs(num, make),
        split=draw.split,
        source="Mathwin et al. 2023",
        num_redrawn=draw.num_redrawn,
    )
