"""Colored objects: three things with their colors, and one of them is asked for.

    I have a red pen, a blue cup and a green hat. My cup is -> blue, not red or green

The corrupt prompt asks for another of the three things, so that its color is right.
Colors are the answers and the same in both splits; things and templates are not.

Source: Ippolito & Callison-Burch 2023 (the task, of BIG-bench); Merullo et al. 2024,
"Circuit component reuse across tasks in transformer language models". The templates are
our own.
"""

from __future__ import annotations

from patchclamp.data.behaviours.drawing import Draw, variant_of, words
from patchclamp.data.behaviours.pairs import Pair, PromptSet, Split
from patchclamp.model.tokens import Tokenizer

NAME = "colored objects"
VARIANTS = ("statement", "question")
TEMPLATES = {
    "statement": (
        "I have a {c[0]} {t[0]}, a {c[1]} {t[1]} and a {c[2]} {t[2]}. My {asked} is",
        "She bought a {c[0]} {t[0]}, a {c[1]} {t[1]} and a {c[2]} {t[2]}. Her {asked} is",
        "He took a {c[0]} {t[0]}, a {c[1]} {t[1]} and a {c[2]} {t[2]}. His {asked} is",
        "We found a {c[0]} {t[0]}, a {c[1]} {t[1]} and a {c[2]} {t[2]}. Our {asked} is",
    ),
    "question": (
        "Q: In the drawer there is a {c[0]} {t[0]}, a {c[1]} {t[1]} and a {c[2]} {t[2]}. "
        "What color is the {asked}?\nA: The color is",
        "Q: On the shelf I see a {c[0]} {t[0]}, a {c[1]} {t[1]} and a {c[2]} {t[2]}. "
        "What is the color of the {asked}?\nA: The color is",
    ),
}
COLORS = words("red blue green yellow purple brown black white pink gray")
THINGS = words(
    "book pen cup ball hat box key bag phone lamp chair plate shirt coat bowl bottle knife car "
    "clock mirror"
)


def generate(
    num: int,
    *,
    seed: int = 0,
    split: Split | str = Split.TRAIN,
    tokenizer: Tokenizer | None = None,
    variant: str | None = None,
) -> PromptSet:
    """Pairs, each color and each place in the list being right equally often.

    Raises: DataError for an unknown split or variant, or too few words of one token.
    """
    variant = variant_of(NAME, variant, VARIANTS)
    draw = Draw(NAME, seed, split, tokenizer)
    colors = draw.words(COLORS, what="colors", least=3, shared=True)
    things = draw.words(THINGS, what="things", least=3)
    answers, templates = draw.cycle(colors), draw.cycle(draw.part(TEMPLATES[variant]))
    places = draw.cycle([(i, j) for i in range(3) for j in range(3) if i != j])

    def make() -> Pair:
        answer, template, (asked, instead) = next(answers), next(templates), next(places)
        shown = draw.rng.sample([color for color in colors if color != answer], 2)
        wrong = tuple(" " + color for color in shown)
        shown.insert(asked, answer)
        listed = draw.rng.sample(things, 3)

        def told(place: int) -> str:
            return template.format(c=shown, t=listed, asked=listed[place])

        return Pair(told(asked), told(instead), (" " + answer,), wrong)

    return PromptSet(
        name=NAME,
        description=f"The color of one of three things, as a {variant}.",
        pairs=draw.pairs(num, make),
        split=draw.split,
        source="Merullo et al. 2024",
        num_redrawn=draw.num_redrawn,
    )
