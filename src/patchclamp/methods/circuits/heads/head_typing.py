"""What each attention head does, on random tokens that repeat.

Six kinds are scored. Five by where a head looks:

    previous    the token before the query
    current     the query's own token
    first       the first token, where attention goes that has nothing to do (a sink)
    duplicate   earlier occurrences of the query's token
    induction   tokens that follow an earlier occurrence of the query's token

and one by what it writes:

    copy        whether what a head writes when it looks at a token raises that token

Nothing in the text can be known by heart, so only the mechanism can give a high score.
Sources: Olsson et al. 2022 (previous-token and induction heads, repeated random tokens);
Wang et al. 2022 (duplicate-token heads, copy score); Elhage et al. 2021 (copying).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.core.errors import OptionError
from patchclamp.data.induction import FIRST_BYTE, LAST_BYTE, repeats
from patchclamp.methods.circuits.heads.attention_patterns import is_causal, patterns
from patchclamp.methods.circuits.heads.head_kinds import (
    FIRST_QUERY,
    POSITIONAL,
    HeadKind,
    as_inputs,
    first_seen,
    targets_of,
    vocabulary_of,
)
from patchclamp.methods.circuits.heads.weights import output_projection, unembedding
from patchclamp.methods.statistics import bootstrap_mean
from patchclamp.model.tokens import ByteTokenizer
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scores:
    """One kind in one layer: a score for each row and head, and null draws of the mean."""

    rows: Float[Tensor, "row head"]
    null: Float[Tensor, "head draw"]


@dataclass(frozen=True, kw_only=True)
class HeadTyping:
    """Scores every head for every kind, against heads that look (or write) at random.

    A score is the share of a head's attention that goes to the kind's targets, averaged
    over the queries that have one. The copy score takes a head's output weights on the
    values that the network itself computed at sample tokens, reads them through the final
    norm's gain and the unembedding, and asks where the token's own logit ranks among those
    of all sample tokens: 1 is first, 0 the middle, -1 last.

    Nulls: for positional kinds, targets drawn at random among the tokens that a query may
    see; for duplicate and induction, the targets of another row; for copy, a random
    relabelling of the sample tokens. `p` holds for all heads together: it compares a
    head's excess over its null with the largest excess of any head in each draw. A head is
    `found` if p <= level, the interval lies above its null's 97.5% point, and the score
    exceeds the null's mean by `minimum` (`minimum_copy` for copy).

    Options: `vocabulary` is needed only for a network without tokenizer and logits.
    Shapes: a row of the table for each (layer, head, kind).
    Units: attention, a share of 1; copy, a rank between -1 and 1.
    Randomness: tokens, null draws and the bootstrap, by `seed`.
    Cost: one forward pass over `num_rows` x `length` tokens with fused attention written out.
    Raises: InputError if the network takes no tokens; OptionError for impossible options.
    Fails when: a head does its work only on natural text; when the best-looking pattern
        is not used downstream (patterns are observed, not intervened). Copy is left out
        where no adapter names values, outputs and unembedding.
    Source: see the module docstring; the maximum over heads, Westfall & Young 1993.
    """

    num_rows: int = 32
    length: int = 64
    num_sources: int = 8
    minimum: float = 0.1
    minimum_copy: float = 0.2
    vocabulary: int | None = None
    level: float = 0.05
    num_nulls: int = 999
    batch_size: int = 16
    seed: int = 0

    def run(self, net: Net) -> pl.DataFrame:
        """Columns: layer, head, kind, score, low, high, null_mean, null_high, p, found."""
        tokens = self.tokens(net)
        inputs = as_inputs(net, tokens)
        found = patterns(net, inputs, batch_size=self.batch_size)
        causal = is_causal(found)
        targets = targets_of(tokens)
        generator = torch.Generator().manual_seed(self.seed)
        keys = _random_keys(self.num_nulls, tokens.shape[1], causal, generator)
        other_rows = _other_rows(self.num_nulls, self.num_rows, generator)
        table: dict[HeadKind, dict[int, _Scores]] = {kind: {} for kind in HeadKind}
        for layer, pattern in found.items():
            for kind, target in targets.items():
                drawn = keys if kind in POSITIONAL else other_rows
                table[kind][layer] = _attention(pattern, target, drawn, kind in POSITIONAL)
        table[HeadKind.COPY] = self._copy(net, tokens, sorted(found), generator)
        parts = [self._judged(kind, by_layer) for kind, by_layer in table.items() if by_layer]
        return pl.concat(parts).sort("layer", "head", maintain_order=True)

    def tokens(self, net: Net) -> Int[Tensor, "row position"]:
        """Random tokens that repeat: bytes as they are, else random ids for each row's bytes."""
        context = net.loaded.context
        length = self.length if context is None else min(self.length, context)
        if self.num_rows < 2 or length < 16 or self.num_nulls < 1 / self.level - 1:
            raise OptionError(
                "too little to type heads with",
                got=f"num_rows={self.num_rows}, length={length}, num_nulls={self.num_nulls}",
                expected=f"2 rows of 16 tokens, {1 / self.level - 1:.0f} null draws",
            )
        drawn = repeats(
            self.num_rows,
            length=length,
            periods=range(length // 5, length // 3),
            prefixes=range(length // 8),
            seed=self.seed,
        )
        if isinstance(net.tokenizer, ByteTokenizer):
            return drawn.input_ids
        generator = torch.Generator().manual_seed(self.seed)
        vocabulary = self.vocabulary or vocabulary_of(net)
        kinds = min(vocabulary, LAST_BYTE + 1 - FIRST_BYTE)
        ids = torch.stack(
            [torch.randperm(vocabulary, generator=generator)[:kinds] for _ in range(self.num_rows)]
        )
        return ids.gather(1, (drawn.input_ids - FIRST_BYTE) % kinds)

    def _copy(
        self,
        net: Net,
        tokens: Int[Tensor, "row position"],
        layers: list[int],
        generator: torch.Generator,
    ) -> dict[int, _Scores]:
        table = net.sites
        wanted = ["norm.final", "logits"]
        wanted += [f"attn.{n}.{part}" for n in layers for part in ("v", "z", "out")]
        if any(name not in table.aliases for name in wanted):
            return {}
        out = unembedding(net)
        sources = first_seen(tokens, self.num_sources, generator)
        sample, own = tokens.gather(1, sources).unique(return_inverse=True)
        readout = out.centre((out.gain[:, None] * out.unembed[:, sample]).T).T
        relabel = torch.stack(
            [torch.randperm(sample.numel(), generator=generator) for _ in range(self.num_nulls)]
        )[:, own.flatten()]
        names = [f"attn.{n}.v" for n in layers]
        acts = net.record(as_inputs(net, tokens), names, batch_size=self.batch_size)
        made = {}
        for layer in layers:
            v = acts.tensor(f"attn.{layer}.v")
            at = sources[:, :, None, None].expand(-1, -1, *v.shape[2:])
            weight = output_projection(net, layer).weight
            values = v.gather(1, at).flatten(0, 1).movedim(1, 0)
            values = values.repeat_interleave(weight.shape[0] // values.shape[0], 0)
            logits = values @ weight @ readout
            ranks = 2 * logits.argsort(-1).argsort(-1).double() / max(1, sample.numel() - 1) - 1
            scores = ranks.gather(2, own.flatten()[None, :, None].expand(len(ranks), -1, 1))[..., 0]
            made[layer] = _Scores(
                rows=scores.unflatten(1, (self.num_rows, -1)).mean(-1).T,
                null=torch.stack([_drawn_mean(r, relabel) for r in ranks]),
            )
        return made

    def _judged(self, kind: HeadKind, by_layer: Mapping[int, _Scores]) -> pl.DataFrame:
        """One kind's rows of the table; p values over all its heads."""
        null = torch.cat([s.null for s in by_layer.values()]).double()
        rows = torch.cat([s.rows.T for s in by_layer.values()]).double()
        centre = null.mean(1)
        largest = (null - centre[:, None]).amax(0)
        high = torch.quantile(null, 0.975, dim=1)
        excess = rows.mean(1) - centre
        p = (1 + (largest[None] >= excess[:, None]).sum(1).double()) / (1 + self.num_nulls)
        minimum = self.minimum_copy if kind is HeadKind.COPY else self.minimum
        names = [(n, h) for n, s in by_layer.items() for h in range(s.rows.shape[1])]
        listed = []
        for i, (layer, head) in enumerate(names):
            interval = bootstrap_mean(rows[i], seed=self.seed)
            above = interval.low > float(high[i]) and float(excess[i]) >= minimum
            listed.append(
                {
                    "layer": layer,
                    "head": head,
                    "kind": str(kind),
                    "score": float(rows[i].mean()),
                    "low": interval.low,
                    "high": interval.high,
                    "null_mean": float(centre[i]),
                    "null_high": float(high[i]),
                    "p": float(p[i]),
                    "found": above and float(p[i]) <= self.level,
                }
            )
        return pl.DataFrame(listed)


def kinds_of(table: pl.DataFrame) -> dict[tuple[int, int], tuple[HeadKind, ...]]:
    """(layer, head) -> the kinds found, strongest excess over the null first."""
    made: dict[tuple[int, int], tuple[HeadKind, ...]] = {}
    ordered = table.sort(pl.col("score") - pl.col("null_mean"), descending=True)
    for layer, head, kind, found in ordered.select("layer", "head", "kind", "found").iter_rows():
        before = made.get((layer, head), ())
        made[layer, head] = (*before, HeadKind(kind)) if found else before
    return dict(sorted(made.items()))


def _attention(
    pattern: Float[Tensor, "row head query key"],
    target: Bool[Tensor, "row query key"],
    drawn: Int[Tensor, "draw source"],
    positional: bool,
) -> _Scores:
    """Share of attention on targets. `drawn` holds keys by query, or other rows by row."""
    counted = target.any(2).sum(1).clamp(min=1)
    share = target.to(pattern) / counted[:, None, None]
    rows = torch.einsum("rhqk,rqk->rh", pattern, share)
    if positional:
        queries = torch.arange(FIRST_QUERY, pattern.shape[2])
        mean = pattern.mean(0)
        null = mean[:, queries, drawn[:, queries]].mean(-1)
    else:
        crossed = torch.einsum("rhx,sx->hrs", pattern.flatten(2), share.flatten(1))
        null = torch.stack([_drawn_mean(c, drawn) for c in crossed])
    return _Scores(rows=rows, null=null)


def _drawn_mean(
    values: Float[Tensor, "row column"], drawn: Int[Tensor, "draw row"]
) -> Float[Tensor, "draw"]:
    """Mean over rows of values[row, drawn[row]], for every draw."""
    return values[torch.arange(values.shape[0]), drawn].mean(-1)


def _random_keys(
    num: int, length: int, causal: bool, generator: torch.Generator
) -> Int[Tensor, "draw query"]:
    allowed = torch.arange(1, length + 1) if causal else torch.full((length,), length)
    return (torch.rand(num, length, generator=generator) * allowed).long()


def _other_rows(num: int, rows: int, generator: torch.Generator) -> Int[Tensor, "draw row"]:
    """Permutations of one cycle: no row keeps its own targets."""
    made = torch.empty(num, rows, dtype=torch.long)
    for draw in made:
        order = torch.randperm(rows, generator=generator)
        draw[order] = order.roll(1)
    return made
