"""Greater than: a span of years ends later than it began.

    The war lasted from the year 1732 to the year 17 -> 33 ... 99, not 00 ... 32

The corrupt prompt begins in the year 01 of the same century, so that hardly any year is
too early any more. The right answers stay right: the answers do not change places here,
the difference between them shrinks. A network that always names late years has the same
difference on both prompts, which is why the corrupt one is measured too.

- "two digits", for tokenizers to which two digits are one token (GPT-2): the answer is
  the year within the century;
- "one digit", for tokenizers that split numbers into digits (Llama and its kin): the
  answer is the decade, and the decade of the first year itself is neither right nor
  wrong.

Without a variant the first of them that the tokenizer can read is taken.

Source: Hanna et al. 2023, "How does GPT-2 compute greater-than?". The templates are our
own.
"""

from __future__ import annotations

from patchclamp.core.errors import DataError
from patchclamp.data.behaviours.drawing import Draw, variant_of, words
from patchclamp.data.behaviours.pairs import MetricKind, Pair, PromptSet, Split
from patchclamp.model.tokens import Tokenizer

NAME = "greater than"
VARIANTS = ("two digits", "one digit")
TEMPLATES = (
    "The {event} lasted from the year {start} to the year {century}",
    "The {event} began in the year {start} and ended in the year {century}",
    "The {event} went on from the year {start} until the year {century}",
    "The {event} started in the year {start} and was over by the year {century}",
)
EVENTS = words(
    "war trial reform siege voyage drought journey peace strike project empire tour "
    "revolt treaty plague study"
)
CENTURIES = (11, 12, 13, 14, 15, 16, 17, 18)


def generate(
    num: int,
    *,
    seed: int = 0,
    split: Split | str = Split.TRAIN,
    tokenizer: Tokenizer | None = None,
    variant: str | None = None,
) -> PromptSet:
    """Pairs, each first year (or decade) equally often.

    Raises: DataError for an unknown split or variant, or a tokenizer that can read
    neither two digits nor one as one token.
    """
    draw = Draw(NAME, seed, split, tokenizer)
    variant = _readable(draw) if variant is None else variant_of(NAME, variant, VARIANTS)
    two = variant == "two digits"
    events = draw.words(EVENTS, what="events")
    centuries, templates = draw.cycle(draw.part(CENTURIES)), draw.cycle(draw.part(TEMPLATES))
    years = draw.cycle(range(2, 99)) if two else draw.cycle(range(1, 9))

    def make() -> Pair:
        year, century, template = next(years), next(centuries), next(templates)
        event = draw.rng.choice(events)
        if two:
            start, early, late = f"{year:02d}", _two(0, year + 1), _two(year + 1, 100)
        else:
            start = f"{year}{draw.rng.randrange(10)}"
            early, late = _one(0, year), _one(year + 1, 10)

        def told(first: str) -> str:
            return template.format(event=event, start=f"{century}{first}", century=century)

        return Pair(told(start), told("01"), late, early)

    return PromptSet(
        name=NAME,
        description=f"The year in which something ends; answers of {variant}.",
        pairs=draw.pairs(num, make),
        metric=MetricKind.PROBABILITY_DIFFERENCE,
        split=draw.split,
        source="Hanna et al. 2023",
        num_redrawn=draw.num_redrawn,
    )


def _two(first: int, stop: int) -> tuple[str, ...]:
    return tuple(f"{n:02d}" for n in range(first, stop))


def _one(first: int, stop: int) -> tuple[str, ...]:
    return tuple(str(n) for n in range(first, stop))


def _readable(draw: Draw) -> str:
    before = "The war lasted to the year 17"
    for variant, number in zip(VARIANTS, ("45", "4"), strict=True):
        if draw.adds_one(before, number):
            return variant
    raise DataError(
        f"the tokenizer reads numbers in a way that '{NAME}' cannot be asked in",
        got="neither two digits nor one digit after '17' are one token",
    )
