"""Multiple choice: four options with letters, and the letter of the right one is asked for.

    What color is grass?
    A. salt
    B. green
    C. seven
    D. paper
    Answer: -> B, not A, C or D

In the corrupt prompt the right option and another one change places, so that the right
letter is another one; question and words are the same.

- "A to D": the usual letters in their order;
- "random letters": four letters drawn at random, so that the place alone does not tell
  the letter.

Source: Lieberum et al. 2023, "Does circuit analysis interpretability scale? Evidence from
multiple choice capabilities in Chinchilla". The questions are our own, and easy; small
networks still fail at naming a letter.
"""

from __future__ import annotations

from patchclamp.data.behaviours.drawing import Draw, variant_of
from patchclamp.data.behaviours.pairs import Pair, PromptSet, Split
from patchclamp.model.tokens import Tokenizer

NAME = "multiple choice"
VARIANTS = ("A to D", "random letters")
TEMPLATES = (
    "Question: {question}\n{o[0]}\n{o[1]}\n{o[2]}\n{o[3]}\nAnswer:",
    "{question} Choose one.\n{o[0]}\n{o[1]}\n{o[2]}\n{o[3]}\nThe right letter is",
    "{question}\n{o[0]}\n{o[1]}\n{o[2]}\n{o[3]}\nThe correct answer is",
    "Exam question. {question}\n{o[0]}\n{o[1]}\n{o[2]}\n{o[3]}\nCorrect:",
)
QUESTIONS = (
    ("What color is grass?", "green salt seven paper"),
    ("What do bees make?", "honey glass steel paper"),
    ("Which animal barks?", "dog fish snake bird"),
    ("Which city is the capital of France?", "Paris London Rome Madrid"),
    ("What do people drink when they are thirsty?", "water sand wood stone"),
    ("What is the opposite of hot?", "cold green loud heavy"),
    ("What shines in the sky by day?", "sun desk shoe fork"),
    ("How many legs has a dog?", "four two nine six"),
    ("What falls from clouds?", "rain bread gold wool"),
    ("What do we read?", "books stones apples chairs"),
    ("Which season is the coldest?", "winter summer spring autumn"),
    ("Which of these is a fruit?", "apple hammer shirt table"),
    ("Where do we sleep?", "bed cup road box"),
    ("Which of these is a metal?", "iron cotton butter milk"),
    ("What do we wear on our feet?", "shoes hats gloves rings"),
    ("Which animal can fly?", "bird horse cow pig"),
    ("What do we use to cut bread?", "knife pillow candle rope"),
    ("What is frozen water called?", "ice smoke sand oil"),
    ("Which day follows Monday?", "Tuesday Friday Sunday Saturday"),
    ("Who treats the sick?", "doctor farmer painter soldier"),
    ("Which of these is a color?", "blue bread house train"),
    ("What do cows give?", "milk sand paper glass"),
    ("Which planet do we live on?", "Earth Mars Venus Saturn"),
    ("What do we hear with?", "ears knees hair teeth"),
)
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
"""Without I and O, which are words."""


def generate(
    num: int,
    *,
    seed: int = 0,
    split: Split | str = Split.TRAIN,
    tokenizer: Tokenizer | None = None,
    variant: str | None = None,
) -> PromptSet:
    """Pairs, each place in the list being right equally often.

    Raises: DataError for an unknown split or variant, or too few words of one token.
    """
    variant = variant_of(NAME, variant, VARIANTS)
    draw = Draw(NAME, seed, split, tokenizer)
    letters = draw.words(LETTERS, what="letters", least=4, shared=True)
    templates = draw.cycle(draw.part(TEMPLATES))
    questions = draw.cycle(
        [(q, o.split()) for q, o in draw.part(QUESTIONS) if all(map(draw.fits, o.split()))]
    )
    places = draw.cycle([(i, j) for i in range(4) for j in range(4) if i != j])

    def make() -> Pair:
        (question, (right, *others)), template = next(questions), next(templates)
        place, instead = next(places)
        used = letters[:4] if variant == "A to D" else draw.rng.sample(letters, 4)
        clean = draw.rng.sample(others, 3)
        clean.insert(place, right)
        corrupt = list(clean)
        corrupt[place], corrupt[instead] = corrupt[instead], corrupt[place]

        def told(options: list[str]) -> str:
            lines = [f"{letter}. {o}" for letter, o in zip(used, options, strict=True)]
            return template.format(question=question, o=lines)

        wrong = tuple(f" {used[i]}" for i in range(4) if i != place)
        return Pair(told(clean), told(corrupt), (f" {used[place]}",), wrong)

    return PromptSet(
        name=NAME,
        description=f"The letter of the right option of four; letters {variant}.",
        pairs=draw.pairs(num, make),
        split=draw.split,
        source="Lieberum et al. 2023",
        num_redrawn=draw.num_redrawn,
    )
