"""Weights of heads and of the unembedding, found through the standard names.

A head's query, key and value weights lie in the linear modules behind `attn.N.q`, `.k`
and `.v` (a third of a fused one in GPT-2); its output weights in the module behind
`attn.N.out`. All are given as (in, out) whatever the module stores, so that
`value = stream @ weight`.

The final norm is not linear. With its scale held at the run's own value it is, up to a
bias: that is what logit attribution needs (Elhage et al. 2021, Wang et al. 2022). The
form assumed (LayerNorm or RMSNorm) is checked against the module's own output.

Letters: W width of the stream, H heads, D units of a head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchclamp.core.errors import EngineError, SiteError
from patchclamp.core.sites import Tap
from patchclamp.net import Net


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """A linear map into heads: `value[h] = x @ weight[:, h] + bias[h]`.

    Shapes: weight (W, H, D); bias (H, D), zeros where the module has none.
    """

    weight: Float[Tensor, "width head unit"]
    bias: Float[Tensor, "head unit"]

    @property
    def num_heads(self) -> int:
        """Heads; fewer than query heads for keys and values of grouped-query attention."""
        return self.weight.shape[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Output:
    """What heads write: `attn_out = sum_h z[h] @ weight[h] + bias`.

    Shapes: weight (H, D, W); bias (W), zeros where the module has none.
    """

    weight: Float[Tensor, "head unit width"]
    bias: Float[Tensor, "width"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Unembedding:
    """Final norm and unembedding: `logits = (gain * centre(x) / scale(x) + shift) @ U + bias`.

    Shapes: gain, shift (W); unembed (W, V); bias (V).
    Attributes:
        centred: the norm subtracts the mean over the stream (LayerNorm) or not (RMSNorm).
        eps: of the norm.
    """

    gain: Float[Tensor, "width"]
    shift: Float[Tensor, "width"]
    unembed: Float[Tensor, "width vocabulary"]
    bias: Float[Tensor, "vocabulary"]
    centred: bool
    eps: float

    def centre(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """The part of x that the norm lets through."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, stream: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows 1"]:
        """What the norm divides this stream by."""
        return (self.centre(stream).square().mean(-1, keepdim=True) + self.eps).sqrt()

    def readout(
        self, direction: Float[Tensor, "*rows width"], scale: Float[Tensor, "*rows 1"]
    ) -> Float[Tensor, "*rows width"]:
        """The vector whose product with the stream is the logit along `direction`.

        `direction` is a column of the unembedding or a difference of two. Centring is
        symmetric, so it may be applied to the readout once and not to every writer.
        """
        return self.centre(self.gain * direction / scale)


def _linear(net: Net, tap: Tap) -> tuple[Tensor, Tensor]:
    """Weight (in, out) and bias (out) of the linear module that makes a site."""
    module = net.module.get_submodule(tap.site.module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        raise SiteError(
            f"site '{tap.label}' of {net.name} is not made by a linear module",
            got=type(module).__name__,
            expected="a module with a weight matrix",
        )
    stored = weight.detach()
    # transformers' Conv1D keeps (in, out); torch's Linear (out, in)
    matrix = stored if type(module).__name__ == "Conv1D" else stored.T
    bias = getattr(module, "bias", None)
    given = bias.detach() if isinstance(bias, Tensor) else matrix.new_zeros(matrix.shape[1])
    return matrix, given


def projection(net: Net, layer: int, slot: str) -> Projection:
    """Weights of all heads of a layer for `slot` "q", "k" or "v".

    Raises:
        SiteError: the network has no such site, or it is not made by a linear module.
    """
    tap = net.taps(f"attn.{layer}.{slot}")[0]
    weight, bias = _linear(net, tap)
    # The view was made for (batch, position, unit): two more axes in front for the bias.
    return Projection(
        weight=tap.view.read(weight[None])[0], bias=tap.view.read(bias[None, None])[0, 0]
    )


def output_projection(net: Net, layer: int) -> Output:
    """What each head of a layer writes to the stream.

    Raises:
        SiteError: the network has no such site, or it is not made by a linear module.
    """
    weight, bias = _linear(net, net.taps(f"attn.{layer}.out")[0])
    z = net.taps(f"attn.{layer}.z")[0]
    heads = int(z.shape[z.axes.index("head")])
    return Output(weight=weight.unflatten(0, (heads, -1)), bias=bias)


def unembedding(net: Net) -> Unembedding:
    """Final norm and unembedding of a pre-norm language model.

    The form of the norm is checked on the network's example inputs.

    Raises:
        SiteError: the network has no final norm or no unembedding under a standard name.
        EngineError: the final norm is neither LayerNorm nor RMSNorm.
    """
    norm_tap, logits_tap = net.taps("norm.final")[0], net.taps("logits")[0]
    weight, bias = _linear(net, logits_tap)
    norm = net.module.get_submodule(norm_tap.site.module)
    gain = getattr(norm, "weight", None)
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    shift = getattr(norm, "bias", None)
    if isinstance(gain, Tensor) and isinstance(eps, float):
        acts = net.record(net.example, [f"{norm_tap.site.module}:input", "norm.final"])
        x, y = (acts.tensor(name) for name in (f"{norm_tap.site.module}:input", "norm.final"))
        for centred in (True, False):
            made = Unembedding(
                gain=gain.detach(),
                shift=shift.detach() if isinstance(shift, Tensor) else torch.zeros_like(gain),
                unembed=weight,
                bias=bias,
                centred=centred,
                eps=eps,
            )
            again = made.gain * made.centre(x) / made.scale(x) + made.shift
            if bool(torch.allclose(again, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))):
                return made
    raise EngineError(
        f"the final norm of {net.name} is neither LayerNorm nor RMSNorm",
        got=type(norm).__name__,
        hint="logits cannot be divided among writers without its form",
    )


def layers_of(net: Net) -> range:
    """Numbers of the network's layers.

    Raises:
        SiteError: no adapter named the layers of this network.
    """
    if net.num_layers == 0:
        raise SiteError(
            f"{net.name} ({type(net.module).__name__}) has no adapter that names its layers",
            hint="head typing finds attention by structure; weights need an adapter",
        )
    return range(net.num_layers)


def key_head(net: Net, head: int, num_heads: int, num_kv: int) -> int:
    """The key head of a query head.

    Raises:
        SiteError: there is no such query head.
    """
    if not 0 <= head < num_heads:
        raise SiteError(f"{net.name} has no head {head}", expected=f"0 to {num_heads - 1}")
    return head // (num_heads // num_kv)
