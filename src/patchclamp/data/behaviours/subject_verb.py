"""Subject-verb agreement: the verb has the number of its subject, not of a noun between.

    The keys near the cabinet -> are, were, have; not is, was, has

The noun between has the other number in half of the prompts. The corrupt prompt has the
subject in the other number, so that the answers change places.

Sources: Finlayson et al. 2021, "Causal analysis of syntactic agreement mechanisms in
neural language models"; Newman et al. 2021, "Refining targeted syntactic evaluation of
language models" (many verbs, weighed by what the network itself expects). The templates
are our own.
"""

from __future__ import annotations

from patchclamp.data.behaviours.drawing import Draw, variant_of, words
from patchclamp.data.behaviours.pairs import Pair, PromptSet, Split
from patchclamp.model.tokens import Tokenizer

NAME = "subject-verb agreement"
VARIANTS = ("subject's number",)
TEMPLATES = (
    "The {subject} near the {noun}",
    "I know that the {subject} behind the {noun}",
    "Last year the {subject} that the {noun} wanted",
    "The {subject} beside the {noun} clearly",
    "It seems that the {subject} next to the {noun}",
    "The {subject} under the {noun} still",
    "Today the {subject} from the {noun}",
    "We heard that the {subject} that the {noun} lost",
)
SUBJECTS = words(
    "key book car dog table picture letter flower bottle game song tree child:children phone "
    "guitar report ticket photo boat lamp"
)
NOUNS = words(
    "doctor teacher student lawyer farmer king sister brother friend player driver neighbor "
    "worker woman:women man:men soldier"
)
SINGULAR, PLURAL = (" is", " was", " has"), (" are", " were", " have")


def generate(
    num: int,
    *,
    seed: int = 0,
    split: Split | str = Split.TRAIN,
    tokenizer: Tokenizer | None = None,
    variant: str | None = None,
) -> PromptSet:
    """Pairs, singular and plural subjects equally often, each with nouns of both numbers.

    Raises: DataError for an unknown split or variant, or too few nouns of one token.
    """
    variant_of(NAME, variant, VARIANTS)
    draw = Draw(NAME, seed, split, tokenizer)
    subjects, nouns = _both(draw, SUBJECTS), _both(draw, NOUNS)
    templates = draw.cycle(draw.part(TEMPLATES))
    numbers = draw.cycle([(s, n) for s in (0, 1) for n in (0, 1)])

    def make() -> Pair:
        template, (number, between) = next(templates), next(numbers)
        subject, noun = draw.rng.choice(subjects), draw.rng.choice(nouns)[between]
        clean, corrupt = (
            template.format(subject=subject[n], noun=noun) for n in (number, 1 - number)
        )
        answers = (SINGULAR, PLURAL)
        return Pair(clean, corrupt, answers[number], answers[1 - number])

    return PromptSet(
        name=NAME,
        description="The number of the verb after a subject and another noun.",
        pairs=draw.pairs(num, make),
        split=draw.split,
        source="Finlayson et al. 2021; Newman et al. 2021",
        num_redrawn=draw.num_redrawn,
    )


def _both(draw: Draw, nouns: tuple[str, ...]) -> list[tuple[str, str]]:
    """Singular and plural of the nouns of the split, both of one token."""
    plural = {}
    for noun in nouns:
        singular, _, irregular = noun.partition(":")
        plural[singular] = irregular or singular + "s"
    kept = [(s, plural[s]) for s in draw.words(list(plural), what="nouns") if draw.fits(plural[s])]
    draw.need(kept, what="nouns in both numbers", least=2)
    return kept
