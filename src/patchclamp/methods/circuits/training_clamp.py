"""Holding activations and attention patterns while a network trains.

A lesion study of development: hold one part of a network at a value from the first
step on, train, and see what still forms, and when. Holding the ideal previous-token
pattern hands the network one part of an induction head for free; knocking that part
out asks whether there is another way. Singh et al. 2024 do this under the name of
artificial optogenetics.

What is held is constant for the optimiser: no gradient flows through it, so that the
weights that would have made it (and nothing else) stop learning from this place.

Two kinds of thing can be held:

- *values* of module inputs and outputs, by the edits of `patchclamp.core.edit_kinds`
  (zero, clamp, patch, ...) and by `FromBatch`, a value computed from each batch;
- *attention patterns*, which a fused attention operator never shows. For the time of
  one attention module's forward pass a `TorchFunctionMode` watches for the operator
  and computes the held heads as pattern x values instead. The values and the output
  projection of a held head stay alive and learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812  (the name that torch's own documentation uses)
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from patchclamp.core.edits import Chosen, Edit, Frame, fit
from patchclamp.core.errors import EditError, EngineError, SiteError, nearest
from patchclamp.engine.attention import repeat_heads
from patchclamp.model.inputs import Call
from patchclamp.net import Net

Pattern: TypeAlias = "Tensor | Callable[[Tensor], Tensor]"
"""(query, key), (batch, query, key) or (batch, head, query, key), or a function that makes
one of these from the network's first input tensor."""

_SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax)


@dataclass(frozen=True, kw_only=True, eq=False)
class FromBatch(Edit):
    """Hold at a value that is computed from each batch; only while training.

    Attributes:
        function: gets the network's first input tensor, returns a value that fits the
            site as for `patchclamp.edits.clamp`.
    """

    kind: ClassVar[str] = "from_batch"
    function: Callable[[Tensor], object]

    def new(self, part: Tensor, frame: Frame, chosen: Chosen) -> Tensor:
        raise EditError(
            f"the edit of '{self.site}' is computed from the batch",
            hint="use it in TrainingClamp(values=[...])",
        )


@dataclass(frozen=True, kw_only=True)
class HeldPattern:
    """An attention pattern to hold.

    Attributes:
        attention: path of the attention module (`blocks.0.attn`), or the standard name of
            its pattern (`attn.0.pattern`).
        pattern: see `Pattern`. A row of zeros makes the head write nothing there.
        heads: query heads that are held; None holds all of them.
    """

    attention: str
    pattern: Pattern
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingClamp:
    """Hold values and patterns of a live network, in training mode and in evaluation.

        with TrainingClamp(patterns=[HeldPattern(attention="blocks.0.attn", ...)]).on(net):
            for tokens in batches:
                loss(net.module(tokens), tokens).backward()
                optimiser.step()

    The clamps hold for every forward pass within the block, also those in between that only
    measure. After it, however it ends, hooks, attributes and modes are as they were; what
    the optimiser did to the weights stays.

    Shapes: patterns as in `Pattern`; values as in the edits.
    Units: those of the site; patterns are shares of attention.
    Randomness: that of the edits.
    Cost: as without clamps, plus one unfused product for each attention module with held heads.
    Raises: SiteError for an unknown site, module or head; EditError for a value that does not
        fit; EngineError for a site that is not a module's value, and for an attention module
        that calls neither `scaled_dot_product_attention` nor one softmax over (batch, head,
        query, key) itself, as `nn.MultiheadAttention` does not.
    Fails when: the network is compiled (its compiled code runs instead of the clamp), or what
        is held can be rebuilt elsewhere: a head that is not held can take over its role.
        A held pattern is held as given: masks of the attention do not act on it.
    Source: Singh et al. 2024, "What needs to go right for an induction head?".
    """

    values: Sequence[Edit] = ()
    patterns: Sequence[HeldPattern] = ()

    @contextmanager
    def on(self, net: Net) -> Iterator[nn.Module]:
        """Within, the live module runs clamped; yields it."""
        batch = _Batch()
        held = [_Held(site=e.site, where=e.where, edit=e, batch=batch) for e in self.values]
        by_module: dict[str, list[HeldPattern]] = {}
        for clamp in self.patterns:
            by_module.setdefault(_attention_path(net, clamp.attention), []).append(clamp)
        with ExitStack() as stack:
            handle = net.module.register_forward_pre_hook(
                batch.take, with_kwargs=True, prepend=True
            )
            stack.callback(handle.remove)
            if held:
                stack.enter_context(net.edited(held))
            for path, clamps in by_module.items():
                stack.enter_context(_watched(net.module.get_submodule(path), path, clamps, batch))
            yield net.module


def previous_token_pattern(tokens: Int[Tensor, "row place"]) -> Float[Tensor, "place place"]:
    """Every position attends to the one before it; the first attends to itself."""
    length = tokens.shape[1]
    pattern = torch.zeros(length, length, device=tokens.device)
    pattern[torch.arange(length), (torch.arange(length) - 1).clamp(min=0)] = 1.0
    return pattern


def induction_pattern(tokens: Int[Tensor, "row place"]) -> Float[Tensor, "row place place"]:
    """Every position attends to what followed the last earlier occurrence of its token.

    Rows of positions whose token did not occur before are zero.
    """
    length = tokens.shape[1]
    places = torch.arange(length, device=tokens.device)
    same = (tokens[:, :, None] == tokens[:, None, :]) & (places[None] < places[:, None])
    last = torch.where(same, places, -1).amax(2)
    pattern = F.one_hot((last + 1).clamp(max=length - 1), length).float()
    return pattern * (last >= 0)[..., None]


@dataclass
class _Batch:
    """The first input tensor of the network's running forward pass."""

    tensor: Tensor | None = None

    def take(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given = Call(args, tuple(kwargs.items())).tensors()
        self.tensor = given[0].detach() if given else None

    def made(self, function: Callable[[Tensor], object]) -> object:
        if self.tensor is None:
            raise EngineError("the network got no tensor from which a held value could be made")
        return function(self.tensor)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Held(Edit):
    """An edit without its gradient: what it makes is a constant for the optimiser."""

    kind: ClassVar[str] = "held"
    edit: Edit
    batch: _Batch

    def new(self, part: Tensor, frame: Frame, chosen: Chosen) -> Tensor:
        with torch.no_grad():
            if isinstance(self.edit, FromBatch):
                return fit(self.batch.made(self.edit.function), part, frame, chosen).detach()
            return self.edit.new(part.detach(), frame, chosen).detach()


def _attention_path(net: Net, name: str) -> str:
    """The module path of an attention, from the path itself or the name of its pattern."""
    paths = dict(net.module.named_modules())
    if name in paths:
        return name
    if not name.endswith(".pattern"):
        raise SiteError(
            f"no attention module '{name}' in {net.name}",
            nearest=nearest(name, paths),
            hint="give the module's path, or the name of its pattern, such as attn.0.pattern",
        )
    return net.taps(name)[0].site.module


@contextmanager
def _watched(
    module: nn.Module, path: str, clamps: Sequence[HeldPattern], batch: _Batch
) -> Iterator[None]:
    """Within, the module's forward pass runs under `_Watch`.

    The instance's `forward` is covered rather than hooked, because a mode that a hook put on
    would stay on where the forward pass raises before the hook that takes it off.
    """
    own = vars(module).get("forward")
    plain = module.forward

    def forward(*args: object, **kwargs: object) -> object:
        watch = _Watch(path, clamps, batch)
        with watch:
            output = plain(*args, **kwargs)
        if watch.seen != 1:
            raise EngineError(
                f"the pattern of '{path}' cannot be held: its forward pass runs attention "
                f"{watch.seen} times where a clamp can act",
                expected="once, by scaled_dot_product_attention or by a softmax over "
                "(batch, head, query, key)",
            )
        return output

    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@dataclass
class _Watch(TorchFunctionMode):
    """Stands in for the attention operator of one forward pass of one module."""

    path: str
    clamps: Sequence[HeldPattern]
    batch: _Batch
    seen: int = field(default=0)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: object,
        args: tuple[Tensor, ...] = (),
        kwargs: dict[str, Tensor] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.seen += 1
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            value = given["value"]
            for clamp in self.clamps:
                made = self._held(made, clamp, value)
        elif func in _SOFTMAX and made.ndim == 4:
            self.seen += 1
            for clamp in self.clamps:
                made = self._held(made, clamp, None)
        return made

    def _held(self, plain: Tensor, clamp: HeldPattern, value: Tensor | None) -> Tensor:
        """`plain` with the held heads replaced: z (given `value`), or the pattern itself."""
        num_heads = plain.shape[1]
        heads = range(num_heads) if clamp.heads is None else clamp.heads
        for head in heads:
            if not 0 <= head < num_heads:
                raise SiteError(
                    f"no head {head} in '{self.path}'", expected=f"heads 0 to {num_heads - 1}"
                )
        index = torch.tensor(list(heads), device=plain.device)
        source = plain if value is None else repeat_heads(value, plain)[:, index]
        keys = plain.shape[-1] if value is None else value.shape[-2]
        shape = (plain.shape[0], len(index), plain.shape[-2], keys)
        pattern = self._pattern(clamp, shape).to(source)
        return plain.index_copy(1, index, pattern if value is None else pattern @ source)

    def _pattern(self, clamp: HeldPattern, shape: tuple[int, ...]) -> Tensor:
        """The pattern to hold, (batch, held head, query, key), without history."""
        pattern = clamp.pattern
        with torch.no_grad():
            made = pattern if isinstance(pattern, Tensor) else self.batch.made(pattern)
        if isinstance(made, Tensor):
            made = made.detach()[:, None] if made.ndim == 3 else made.detach()
            fits = made.ndim in (2, 4) and all(
                n in (1, size) for n, size in zip(made.shape[::-1], shape[::-1], strict=False)
            )
            if fits and bool(torch.isfinite(made).all()):
                return made.expand(shape)
        raise EditError(
            f"the pattern to hold in '{self.path}' does not fit",
            got=str(tuple(made.shape)) if isinstance(made, Tensor) else type(made).__name__,
            expected=f"finite numbers, (query, key), (batch, query, key) or {shape}",
        )
