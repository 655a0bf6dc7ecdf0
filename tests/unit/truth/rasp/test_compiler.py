"""The compiler: small programs in full, layout, encoding, and what is refused."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch

from patchclamp.core.circuit import Edge, Node
from patchclamp.core.errors import OptionError
from patchclamp.truth.rasp import PROGRAMS, compiled, hard_variant, plant
from patchclamp.truth.rasp.compiler import Compiled, compile_program
from patchclamp.truth.rasp.edges import possible_edges, structural_edges
from patchclamp.truth.rasp.language import (
    EVERYWHERE,
    Aggregate,
    Constant,
    Expression,
    Linear,
    Map,
    Predicate,
    Prefer,
    Selector,
    Share,
    Zip,
    both,
    evaluate,
    indices,
    select,
    tokens,
    width,
)
from patchclamp.truth.rasp.programs.registry import program

IS_A = Map(tokens, lambda x: x == "a", to_number=True)
SHARE = Aggregate(EVERYWHERE, IS_A)
BEFORE = Aggregate(select(indices, Map(indices, lambda i: i - 1)), tokens)


def check(made: Compiled) -> None:
    """The network against the interpreter, on all inputs of all lengths."""
    for length in range(1, made.length + 1):
        batch = list(itertools.product(made.vocab, repeat=length))
        got = made.decode(made.module(made.encode(batch)))
        for inputs, row in zip(batch, got, strict=True):
            meant = evaluate(made.program, inputs, causal=made.causal)
            if made.classes:
                assert row == meant
            else:
                assert row == pytest.approx([float(m) for m in meant], abs=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "expression",
    [
        pytest.param(width(select(tokens, tokens, p)), id=f"width of {p}")
        for p in (Predicate.NE, Predicate.LE, Predicate.GE)
    ]
    + [
        pytest.param(width(select(tokens, Constant("b"))), id="constant query"),
        pytest.param(
            width(both(select(tokens, Constant("b")), select(indices, Constant(0)))),
            id="two constants",
        ),
        pytest.param(
            Aggregate(select(tokens, Constant("b"), prefer=Prefer.LATEST), indices),
            id="latest of a constant",
        ),
        pytest.param(
            Aggregate(select(tokens, tokens, Predicate.LT, Prefer.EARLIEST), tokens),
            id="earliest smaller",
        ),
        pytest.param(Linear(SHARE, IS_A, (Fraction(3), Fraction(-2))), id="linear"),
        pytest.param(Linear(SHARE, SHARE, (Fraction(1), Fraction(-1))), id="linear of itself"),
        pytest.param(Map(SHARE, lambda s: s * s, to_number=True), id="number of a number"),
        pytest.param(Map(SHARE, lambda s: s > 0), id="category of a number"),
        pytest.param(Map(Map(tokens, lambda _: 1, to_number=True), str), id="one number"),
        pytest.param(Aggregate(EVERYWHERE, Map(SHARE, lambda s: 1 - s, to_number=True)), id="mean"),
        pytest.param(
            Aggregate(select(tokens, Constant("z")), Map(SHARE, lambda s: s + 1, to_number=True)),
            id="mean of nothing",
        ),
        pytest.param(Zip(tokens, tokens, lambda x, y: x + y), id="with itself"),
        pytest.param(Zip(BEFORE, tokens, lambda x, y: x == y, to_number=True), id="zip to number"),
        pytest.param(Map(BEFORE, lambda x: x, default="a"), id="default"),
        pytest.param(
            Aggregate(select(Map(BEFORE, str, default="-"), tokens, prefer=Prefer.LATEST), indices),
            id="keys with a default",
        ),
        pytest.param(
            width(select(width(select(tokens, tokens)), Constant(0), Predicate.GE)),
            id="zero is a category like others",
        ),
        pytest.param(
            width(select(Aggregate(Selector(prefer=Prefer.EARLIEST), tokens), tokens)),
            id="keys from a head without a condition",
        ),
    ],
)
def test_what_is_compiled_is_what_is_meant(expression: Expression, causal: bool) -> None:
    check(compile_program(expression, vocab="ab", length=4, causal=causal))


def test_two_heads_share_a_block_where_neither_needs_the_other() -> None:
    first, second = (width(select(tokens, Constant(x))) for x in "ab")
    made = compile_program(Zip(first, second, lambda a, b: a > b), vocab="ab", length=3)
    config = made.module.config
    assert (config.num_layers, config.num_heads) == (2, 2)
    one = compile_program(first, vocab="ab", length=3).module.config
    assert (one.num_layers, one.num_heads) == (1, 1)


def test_structural_edges_of_a_histogram() -> None:
    module = compile_program(width(select(tokens, tokens)), vocab="ab", length=3).module
    head, mlp = Node("attn.0.z", 0), Node("mlp.0.out")
    assert structural_edges(module) == {
        Edge(Node("embed"), head, "q"),
        Edge(Node("embed"), head, "k"),
        Edge(Node("position"), head, "k"),
        Edge(Node("position"), head, "v"),
        Edge(head, mlp),
        Edge(Node("position"), mlp),
        Edge(mlp, Node("logits")),
    }


def test_structural_edges_are_those_that_random_weights_all_have() -> None:
    """With no zero among the weights, every edge that is possible is structural."""
    module = compiled("ends_agree").module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    assert structural_edges(module) == set(possible_edges(module))  # type: ignore[arg-type]


def test_an_unread_writer_and_an_unheard_reader_are_not_structural() -> None:
    module = compile_program(SHARE, vocab="ab", length=3).module
    full = structural_edges(module)
    with torch.no_grad():
        module.layer(0).mlp.down.weight.zero_()
    cut = structural_edges(module)
    assert Edge(Node("embed"), Node("mlp.0.out")) in full - cut
    assert not any(e.writer == Node("mlp.0.out") for e in cut)


def test_encoding_and_decoding() -> None:
    made = compile_program(BEFORE, vocab="ab", length=3)
    ids = made.encode(["aba", "bbb"])
    assert ids.tolist() == [[2, 0, 1, 0], [2, 1, 1, 1]]
    assert made.decode(made.module(ids)) == [[None, "a", "b"], [None, "b", "b"]]
    with pytest.raises(OptionError, match="no token 'z'"):
        made.encode(["az"])
    for wrong in (["abab"], ["a", "ab"], [""]):
        with pytest.raises(OptionError, match="one length"):
            made.encode(wrong)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (tokens, "computes nothing"),
        (Constant(1), "computes nothing"),
        (Zip(tokens, Constant("a"), lambda x, y: x == y), "reads a constant"),
        (Aggregate(select(Constant("a"), tokens), indices), "reads a constant"),
        (Aggregate(select(tokens, tokens), Constant("a")), "reads a constant"),
        (Share(select(tokens, tokens, prefer=Prefer.LATEST)), "one place"),
    ],
)
def test_programs_that_cannot_be_compiled_are_refused(expression: Expression, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        compile_program(expression, vocab="ab", length=3)


def test_names_that_are_not_there_say_what_is() -> None:
    with pytest.raises(OptionError, match="nearest 'induction'"):
        compiled("inductoin")
    with pytest.raises(OptionError, match="no variant 'bent'; expected one of rotated"):
        hard_variant("induction", "bent")
    with pytest.raises(OptionError, match="pairs"):
        compiled("induction", num_pairs=1)


def test_a_program_whose_output_never_changes_has_no_circuit() -> None:
    def steady() -> Expression:
        """Always the same."""
        return Map(tokens, lambda _: 0)

    add = program("ab", 3)
    try:
        add(steady)
        with pytest.raises(OptionError, match="too seldom"):
            plant(PROGRAMS["steady"])
        with pytest.raises(OptionError, match="there already"):
            add(steady)
    finally:
        del PROGRAMS["steady"]
