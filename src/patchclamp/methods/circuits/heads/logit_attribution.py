"""Who writes the answer: each head, MLP and embedding's part in a logit difference.

The stream is a sum of what the embedding, every head and every MLP wrote to it. With the
final norm's scale held at the value it has in the run, a logit difference is linear in
the stream, so each writer has an exact part in it. The parts and a constant (biases of
attention outputs, of the norm and of the unembedding) add up to the difference.
Sources: Elhage et al. 2021; Wang et al. 2022; Lieberum et al. 2023 (at 70B parameters).
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from patchclamp.core.circuit import Node
from patchclamp.core.errors import EngineError, InputError
from patchclamp.core.findings import Interval, Null
from patchclamp.engine.activations import Activations
from patchclamp.methods.circuits.heads.weights import (
    Unembedding,
    layers_of,
    output_projection,
    unembedding,
)
from patchclamp.methods.statistics import bootstrap_mean, permutation_null
from patchclamp.net import Net

_CLOSE = 1e-3
"""Relative error of the sum of all writers beyond which the stream is not understood."""

_NUM_RANDOM = 64
"""Random pairs of tokens for the null, where all rows share one pair."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Logit attribution of every row: `parts.sum(0) + constant == difference`.

    Attributes:
        writers: in the order of the forward pass.
        parts: of each writer in the logit difference.
        constant: what no writer wrote: biases.
        difference: the network's own logit difference.
        nulls: for each writer, its mean part in other pairs of answers.
    """

    writers: tuple[Node, ...]
    parts: Float[Tensor, "writer row"]
    constant: Float[Tensor, "row"]
    difference: Float[Tensor, "row"]
    nulls: tuple[Null, ...]
    seed: int

    def interval(self, writer: int) -> Interval:
        """95% interval of a writer's mean part over rows."""
        return bootstrap_mean(self.parts[writer], seed=self.seed)

    def table(self) -> pl.DataFrame:
        """Columns: writer, effect, low, high, null_mean, null_low, null_high, p; largest first."""
        listed = []
        for i, (writer, null) in enumerate(zip(self.writers, self.nulls, strict=True)):
            interval = self.interval(i)
            listed.append(
                {
                    "writer": str(writer),
                    "effect": float(self.parts[i].mean()),
                    "low": interval.low,
                    "high": interval.high,
                    "null_mean": null.mean,
                    "null_low": null.low,
                    "null_high": null.high,
                    "p": null.p,
                }
            )
        return pl.DataFrame(listed).sort(pl.col("effect").abs(), descending=True)


@dataclass(frozen=True, kw_only=True)
class LogitAttribution:
    """Direct logit attribution: each writer's part in logit(right) - logit(wrong).

    The null asks the same writers about another row's pair of answers, or about random
    pairs of tokens where all rows share one pair.

    Shapes: inputs of R rows; right and wrong (R,); parts (writer, R).
    Units: logits. Parts and constant add up to the difference.
    Randomness: the null's permutations and the bootstrap, by `seed`.
    Cost: one forward pass; `by_source` another one with attention written out.
    Raises: SiteError without an adapter; EngineError where the writers do not add up to the
        stream; InputError for a position or token that is not there.
    Fails when: taken for the whole effect: what a writer does through later parts is not
        seen, nor how it changes the scale of the final norm.
    Source: see the module docstring.
    """

    position: int = -1
    num_nulls: int = 199
    batch_size: int = 16
    seed: int = 0

    def run(
        self,
        net: Net,
        inputs: object,
        right: Int[Tensor, "row"],
        wrong: Int[Tensor, "row"],
    ) -> Parts:
        """Parts of every writer at `position`, whatever position they read from."""
        out, stream, normed, parts, readout, names = self._parts(net, inputs, right, wrong)
        direction = _directions(out, right, wrong)
        bias = out.bias[right] - out.bias[wrong]
        effects = torch.einsum("nrw,rw->nr", parts, readout)
        writers = [i for i, name in enumerate(names) if name is not None]
        constants = [i for i, name in enumerate(names) if name is None]
        return Parts(
            writers=tuple(name for name in names if name is not None),
            parts=effects[writers],
            constant=effects[constants].sum(0) + (out.shift * direction).sum(-1) + bias,
            difference=(normed * direction).sum(-1) + bias,
            nulls=self._nulls(out, stream, parts[writers], effects[writers], right, wrong),
            seed=self.seed,
        )

    def by_source(
        self,
        net: Net,
        inputs: object,
        right: Int[Tensor, "row"],
        wrong: Int[Tensor, "row"],
    ) -> dict[int, Float[Tensor, "row head key"]]:
        """Layer -> each head's part, split by the position that it attends to.

        Summed over keys it is the head's part in `run`.
        """
        *_, readout, _ = self._parts(net, inputs, right, wrong)
        made = {}
        for n in layers_of(net):
            names = [f"attn.{n}.pattern", f"attn.{n}.v"]
            acts = net.record(inputs, names, batch_size=self.batch_size)
            weight = output_projection(net, n).weight
            v = acts.tensor(names[1])
            v = v.repeat_interleave(weight.shape[0] // v.shape[2], 2)
            pattern = acts.tensor(names[0])[:, :, self.position]
            along = torch.einsum("hdw,rw->rhd", weight, readout)
            made[n] = pattern * torch.einsum("rkhd,rhd->rhk", v, along)
        return made

    def _parts(
        self, net: Net, inputs: object, right: Tensor, wrong: Tensor
    ) -> tuple[Unembedding, Tensor, Tensor, Tensor, Tensor, list[Node | None]]:
        """Norm, stream and normed stream (row, W), parts (writer, row, W), readout (row, W),
        and names of the parts, None for biases."""
        out, layers = unembedding(net), layers_of(net)
        final = f"{net.taps('norm.final')[0].site.module}:input"
        wanted = [f"attn.{n}.z" for n in layers] + [f"mlp.{n}.out" for n in layers]
        wanted += ["embed", "resid_pre.0", final, "norm.final"]
        acts = net.record(inputs, wanted, batch_size=self.batch_size)
        stream = acts.tensor(final)
        _check(net, stream, out, self.position, right, wrong)
        stream = stream[:, self.position]
        names, parts = self._embeddings(net, inputs, acts)
        for n in layers:
            projected = output_projection(net, n)
            z = acts.tensor(f"attn.{n}.z")[:, self.position]
            written = torch.einsum("rhd,hdw->hrw", z, projected.weight)
            names += [Node(f"attn.{n}.z", h) for h in range(len(written))]
            names += [None, Node(f"mlp.{n}.out")]
            mlp = acts.tensor(f"mlp.{n}.out")[:, self.position]
            parts += [*written, projected.bias.expand_as(mlp), mlp]
        stacked = torch.stack(parts)
        error = float((stacked.sum(0) - stream).abs().max() / stream.abs().max())
        if error > _CLOSE:
            raise EngineError(
                f"what heads, MLPs and embedding of {net.name} write does not add up to its stream",
                got=f"a relative difference of {error:.1e}",
                hint="the network scales or normalises between layers; use path patching",
            )
        readout = out.readout(_directions(out, right, wrong), out.scale(stream))
        return out, stream, acts.tensor("norm.final")[:, self.position], stacked, readout, names

    def _embeddings(
        self, net: Net, inputs: object, acts: Activations
    ) -> tuple[list[Node | None], list[Tensor]]:
        """The summands of the stream before the first layer, told apart where they can be."""
        start = acts.tensor("resid_pre.0")[:, self.position]
        embed = acts.tensor("embed")[:, self.position]
        names: list[Node | None] = [Node("embed")]
        parts = [embed]
        rest = start - embed
        if not float(rest.abs().max()) > _CLOSE * float(start.abs().max()):
            return names, parts
        call = net.call(inputs)
        one = call.rows(slice(0, 1), net.call_dims(call))  # tables serve all rows alike
        for name in _other_embeddings(net):
            value = net.record(one, name).tensor(name)[..., self.position, :].reshape(-1)
            if bool(torch.allclose(value.expand_as(rest), rest, rtol=1e-3, atol=1e-5)):
                return [*names, Node(name)], [*parts, rest]
        return [*names, Node("resid_pre.0")], [*parts, rest]

    def _nulls(
        self,
        out: Unembedding,
        stream: Float[Tensor, "row width"],
        parts: Float[Tensor, "writer row width"],
        effects: Float[Tensor, "writer row"],
        right: Int[Tensor, "row"],
        wrong: Int[Tensor, "row"],
    ) -> tuple[Null, ...]:
        """The same writers read along the answers of other rows, or along random tokens."""
        generator = torch.Generator().manual_seed(self.seed)
        num = right.numel()
        shared = bool((right == right[0]).all()) and bool((wrong == wrong[0]).all())
        if shared:
            kind = "random pairs of tokens"
            asked = torch.randint(out.bias.numel(), (2, _NUM_RANDOM), generator=generator)
            drawn = torch.randint(_NUM_RANDOM, (self.num_nulls, num), generator=generator)
        else:
            kind = "the pairs of answers of other rows"
            asked = torch.stack([right, wrong])
            drawn = torch.empty(self.num_nulls, num, dtype=torch.long)
            for draw in drawn:
                order = torch.randperm(num, generator=generator)
                draw[order] = order.roll(1)  # one cycle: no row keeps its own answers
        along = out.readout(_directions(out, *asked)[None], out.scale(stream)[:, None])
        crossed = torch.einsum("nrw,rsw->nrs", parts, along)
        nulls = crossed[:, torch.arange(num), drawn].mean(-1)
        return tuple(
            permutation_null(float(e.mean()), d, kind, two_sided=True)
            for e, d in zip(effects, nulls, strict=True)
        )


def _directions(out: Unembedding, right: Tensor, wrong: Tensor) -> Float[Tensor, "row width"]:
    return (out.unembed[:, right] - out.unembed[:, wrong]).T


def _other_embeddings(net: Net) -> list[str]:
    """Sites of embedding tables beside that of the tokens."""
    own = net.taps("embed")[0].site.module
    table = net.quick_sites()
    tables = [n for n, m in net.module.named_modules() if isinstance(m, nn.Embedding) and n != own]
    return [name for name in tables if name in table]


def _check(
    net: Net, stream: Tensor, out: Unembedding, position: int, right: Tensor, wrong: Tensor
) -> None:
    num, length = stream.shape[:2]
    vocabulary = out.unembed.shape[1]
    if not -length <= position < length:
        raise InputError(
            f"the inputs of {net.name} have no position {position}", got=f"{length} positions"
        )
    for name, ids in (("right", right), ("wrong", wrong)):
        if tuple(ids.shape) != (num,) or ids.is_floating_point():
            raise InputError(
                f"'{name}' must name one token a row",
                got=f"{ids.dtype} {tuple(ids.shape)}",
                expected=f"whole numbers ({num},)",
            )
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise InputError(
                f"'{name}' holds a token outside the vocabulary of {net.name}",
                got=f"{int(ids.min())} to {int(ids.max())}",
                expected=f"0 to {vocabulary - 1}",
            )
