'''Docstring: the parameters of a function are described in the order of its definition.

    def stone(self, load, size, file, name):
        """river paper

        :param load: oil
        :param size: unit
        :param                                   -> file, not load, size or name

In the corrupt prompt the answer and the parameter after it change places in the
definition; the descriptions stay. So the answer is the other one.

Source: Heimersheim & Janiak 2023, "A circuit for Python docstrings in a 4-layer
attention-only transformer". The templates are our own.
'''

from __future__ import annotations

from patchclamp.data.behaviours.drawing import Draw, variant_of, words
from patchclamp.data.behaviours.pairs import Pair, PromptSet, Split
from patchclamp.model.tokens import Tokenizer

NAME = "docstring"
VARIANTS = ("next two swapped",)
TEMPLATES = (
    'def {w[0]}(self, {p[0]}, {p[1]}, {p[2]}, {p[3]}):\n    """{w[1]} {w[2]}\n\n'
    "    :param {q[0]}: {w[3]} {w[4]}\n    :param {q[1]}: {w[5]} {w[6]}\n    :param",
    'def {w[0]}_{w[1]}(the, {p[0]}, {p[1]}, {p[2]}, {p[3]}):\n    """Make a {w[2]}.\n\n'
    "    @param {q[0]}: the {w[3]}\n    @param {q[1]}: the {w[5]}\n    @param",
    'def {w[0]}(the, {p[0]}, {p[1]}, {p[2]}, {p[3]}):\n    """The {w[1]} of a {w[2]}.\n\n'
    "    :param {q[0]}: {w[3]}\n    :param {q[1]}: {w[5]}\n    :param",
    'def {w[0]}_{w[1]}(self, {p[0]}, {p[1]}, {p[2]}, {p[3]}):\n    """Find {w[2]} and {w[3]}.\n\n'
    "    :arg {q[0]}: a {w[4]}\n    :arg {q[1]}: a {w[5]}\n    :arg",
)
PARAMETERS = words(
    "load size file name path key data port text mode line index value node time user date "
    "label shape level group state token model"
)
WORDS = words(
    "oil river piece stone crime light unit paper dark music garden winter table bridge horse "
    "cloud dinner forest island market silver summer window engine"
)


def generate(
    num: int,
    *,
    seed: int = 0,
    split: Split | str = Split.TRAIN,
    tokenizer: Tokenizer | None = None,
    variant: str | None = None,
) -> PromptSet:
    """Pairs, each parameter name being right equally often.

    Raises: DataError for an unknown split or variant, or too few words of one token.
    """
    variant_of(NAME, variant, VARIANTS)
    draw = Draw(NAME, seed, split, tokenizer)
    parameters = draw.words(PARAMETERS, what="parameter names", least=4)
    nouns = draw.words(WORDS, what="words", least=7)
    answers, templates = draw.cycle(parameters), draw.cycle(draw.part(TEMPLATES))

    def make() -> Pair:
        answer, template = next(answers), next(templates)
        first, second, last = draw.rng.sample([p for p in parameters if p != answer], 3)
        w = draw.rng.sample(nouns, 7)

        def told(*defined: str) -> str:
            return template.format(w=w, p=defined, q=(first, second))

        return Pair(
            told(first, second, answer, last),
            told(first, second, last, answer),
            (" " + answer,),
            (" " + first, " " + second, " " + last),
        )

    return PromptSet(
        name=NAME,
        description="The next parameter of a function in its docstring.",
        pairs=draw.pairs(num, make),
        split=draw.split,
        source="Heimersheim & Janiak 2023",
        num_redrawn=draw.num_redrawn,
    )
