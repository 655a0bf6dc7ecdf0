"""Kinds of attention head, where a head of each kind looks, and the tokens to see it on.

Sources: Olsson et al. 2022 (previous-token and induction heads, repeated random tokens);
Wang et al. 2022 (duplicate-token heads, copy score); Elhage et al. 2021 (copying).
"""

from __future__ import annotations

from enum import StrEnum

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from patchclamp.core.errors import InputError
from patchclamp.net import Net

FIRST_QUERY = 2
"""Before it the previous token is the first token, and the kinds cannot be told apart."""


class HeadKind(StrEnum):
    """What a head can be found to do; `heads` says what each means."""

    PREVIOUS = "previous"
    CURRENT = "current"
    FIRST = "first"
    DUPLICATE = "duplicate"
    INDUCTION = "induction"
    COPY = "copy"


POSITIONAL = (HeadKind.PREVIOUS, HeadKind.CURRENT, HeadKind.FIRST)
"""Kinds whose target does not depend on the tokens."""


def targets_of(
    tokens: Int[Tensor, "row position"],
) -> dict[HeadKind, Bool[Tensor, "row query key"]]:
    """Where a head of each kind looks, for every query from the third token on."""
    num, length = tokens.shape
    query = torch.arange(length)[:, None]
    key = torch.arange(length)[None]
    same = tokens[:, :, None] == tokens[:, None, :]
    after = torch.zeros_like(same)
    after[:, :, 1:] = same[:, :, :-1]
    made = {
        HeadKind.PREVIOUS: (key == query - 1).expand(num, -1, -1),
        HeadKind.CURRENT: (key == query).expand(num, -1, -1),
        HeadKind.FIRST: ((key == 0) & (query >= 0)).expand(num, -1, -1),
        HeadKind.DUPLICATE: same & (key < query),
        HeadKind.INDUCTION: after & (key <= query),
    }
    return {kind: target & (query >= FIRST_QUERY) for kind, target in made.items()}


def as_inputs(net: Net, tokens: Int[Tensor, "row position"]) -> object:
    """The tokens in the form of the network's example call.

    Raises:
        InputError: the network does not take token ids.
    """
    tensors = net.example.tensors()
    if len(tensors) == 0 or tensors[0].is_floating_point() or tensors[0].ndim != 2:
        raise InputError(
            f"heads are typed on random tokens, and {net.name} does not take token ids",
            expected="inputs (row, position) of whole numbers",
        )
    named = [k for k, x in net.example.keywords.items() if isinstance(x, Tensor)]
    return {named[0]: tokens} if named else tokens


def vocabulary_of(net: Net) -> int:
    if net.tokenizer is not None:
        return net.tokenizer.vocab_size
    table = net.quick_sites()
    if "logits" in table:
        size = table["logits"].shape[-1]
        if isinstance(size, int):
            return size
    raise InputError(
        f"the vocabulary of {net.name} is unknown: it has no tokenizer and no logits",
        hint="HeadTyping(vocabulary=...)",
    )


def first_seen(
    tokens: Int[Tensor, "row position"], num: int, generator: torch.Generator
) -> Int[Tensor, "row source"]:
    """Positions of `num` different tokens of each row, drawn at random, at their first place."""
    length = tokens.shape[1]
    earlier = (tokens[:, :, None] == tokens[:, None, :]).tril(-1).any(2)
    score = torch.rand(tokens.shape, generator=generator) - 2.0 * earlier
    score[:, 0] = -3.0  # what lies at the first position often serves as a sink
    fresh = int((~earlier).sum(1).min()) - 1
    return score.topk(min(num, max(1, fresh), length), dim=1).indices
