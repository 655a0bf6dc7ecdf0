"""Our compiled programs give what Tracr's compiled programs give.

Tracr (Lindner et al. 2023) compiles RASP into transformers in JAX. It is a reference
for these tests alone, and no dependency; tried with tracr-pypi 1.0.0, dm-haiku 0.0.17
and jax 0.10.2.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from patchclamp.truth.rasp import PROGRAMS

pytest.importorskip("tracr", reason="tracr is the reference: pip install tracr-pypi dm-haiku jax")
from tracr.compiler import compiling, lib
from tracr.rasp import rasp

pytestmark = [
    pytest.mark.slow,  # JAX compiles every program anew: 40 CPU seconds
    pytest.mark.filterwarnings("default"),  # what JAX warns about is not ours
]


def same_as_before() -> Any:
    """No library program of theirs: written with their operators."""
    before = rasp.Aggregate(
        rasp.Select(rasp.indices, rasp.indices, lambda key, query: key == query - 1), rasp.tokens
    )
    return rasp.SequenceMap(lambda x, y: x == y, rasp.tokens, before)


THEIRS: dict[str, Callable[[], Any]] = {
    "how_often": lib.make_hist,
    "reverse": lambda: lib.make_reverse(rasp.tokens),
    "share_of_a_so_far": lambda: lib.make_frac_prevs((rasp.tokens == "a").named("is_a")),
    "sort_distinct": lambda: lib.make_sort_unique(rasp.tokens, rasp.tokens),
    "sort": lambda: lib.make_sort(rasp.tokens, rasp.tokens, max_seq_len=5, min_key=1),
    "bracket_balance": lambda: lib.make_pair_balance(rasp.tokens, "(", ")"),
    "same_as_before": same_as_before,
}


@pytest.mark.parametrize("name", THEIRS)
def test_the_outputs_agree(name: str) -> None:
    program, source = PROGRAMS[name], random.Random(0)
    ours = program.compile()
    theirs = compiling.compile_rasp_to_model(
        THEIRS[name](), vocab=set(program.vocab), max_seq_len=program.length, compiler_bos="BOS"
    )
    for draw in range(8):
        length = program.length - draw // 6  # a new length is compiled anew, which takes long
        inputs = program.draw(source, program.vocab, length)
        with torch.no_grad():
            got = ours.decode(ours.module(ours.encode([inputs])))[0]
        expected = theirs.apply(["BOS", *inputs]).decoded[1:]
        if ours.classes:
            here = [i for i, value in enumerate(got) if value is not None]
            assert len(here) >= len(inputs) - 1
            assert [got[i] for i in here] == [expected[i] for i in here]
        else:
            assert got == pytest.approx([float(x) for x in expected], abs=1e-3)
