"""Which sites and groups of units an audit looks at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.core.sites import SiteTable, Tap
from patchclamp.methods.neurons.ablation import Group
from patchclamp.methods.neurons.activity import SiteActivity, unit_axes
from patchclamp.net import Net

_NONLINEAR = frozenset(
    {"relu", "gelu", "silu", "tanh", "sigmoid", "hardtanh", "leaky_relu", "elu", "selu", "mish"}
)
_NONLINEAR_MODULES = frozenset(
    {
        "ReLU", "ReLU6", "GELU", "SiLU", "Tanh", "Sigmoid", "Hardtanh", "LeakyReLU", "ELU", "SELU",
        "Mish", "Hardswish", "GELUActivation", "SiLUActivation", "NewGELUActivation",
        "MemoryEfficientSwish", "Swish",
    }
)  # fmt: skip


def unit_taps(net: Net) -> list[Tap]:
    """The sites whose units an audit describes: what the nonlinearities put out.

    Named anatomy first (`mlp.N.post`), else activation modules, else activation
    operators in the graph, else convolutions and linear layers.
    """
    named = [a for a in net.quick_sites().aliases if a.startswith("mlp.") and a.endswith(".post")]
    if named:
        return net.taps(named)
    modules = dict(net.module.named_modules())
    hooked = net.quick_sites()

    def outputs(accept: Sequence[str] | frozenset[str]) -> list[Tap]:
        return [
            tap
            for site in hooked
            if site.operation == "output" and type(modules[site.module]).__name__ in accept
            for tap in [hooked[site.address]]
            if usable(tap)
        ]

    found = outputs(_NONLINEAR_MODULES)
    if not found and net.capture_error() is None:
        table = net.sites
        found = [table[s.address] for s in table if s.operation in _NONLINEAR]
        found = [tap for tap in found if usable(tap)]
    layers = ("Conv1d", "Conv2d", "Linear", "LSTM", "GRU", "RNN")
    return found or outputs(layers) or _any_layer(hooked)


def _any_layer(table: SiteTable) -> list[Tap]:
    taps = [table[s.address] for s in table if s.operation == "output" and s.module]
    return [tap for tap in taps if usable(tap)][:8]


def usable(tap: Tap) -> bool:
    """Whether a site has rows, countable units and real numbers."""
    axes = unit_axes(tap)
    return (
        "batch" in tap.axes
        and bool(axes)
        and tap.site.dtype.startswith("float")
        and all(isinstance(tap.shape[tap.axes.index(a)], int) for a in axes)
    )


def spread(taps: Sequence[Tap], num: int) -> list[Tap]:
    """`num` of them, evenly spread from first to last."""
    if num >= len(taps):
        return list(taps)
    if num <= 1:
        return [taps[len(taps) // 2]] if num == 1 else []
    return [taps[round(i * (len(taps) - 1) / (num - 1))] for i in range(num)]


def num_units(tap: Tap) -> int:
    """How many units a site has, heads times units where it has heads."""
    total = 1
    for axis in unit_axes(tap):
        total *= int(tap.shape[tap.axes.index(axis)])
    return total


def layer_groups(taps: Sequence[Tap]) -> list[Group]:
    """Every site as a whole; random groups are drawn from all of them together."""
    pool = {tap.label: tuple(range(num_units(tap))) for tap in taps}
    return [
        Group(name=label, kind="layer", members={label: units}, pool=pool)
        for label, units in pool.items()
    ]


def head_groups(taps: Sequence[Tap]) -> list[Group]:
    """Every head; random groups of as many units are drawn from all heads of the layer."""
    groups = []
    for tap in taps:
        axes = unit_axes(tap)
        heads = int(tap.shape[tap.axes.index(axes[0])])
        size = num_units(tap) // heads
        pool = {tap.label: tuple(range(num_units(tap)))}
        groups += [
            Group(
                name=f"{tap.label} head {h}",
                kind="head",
                members={tap.label: tuple(range(h * size, (h + 1) * size))},
                pool=pool,
            )
            for h in range(heads)
        ]
    return groups


def channel_groups(activities: Sequence[SiteActivity]) -> list[Group]:
    """Units of a site that go together, about eight groups a site; random groups from the site."""
    groups = []
    for activity in activities:
        label = activity.tap.label
        num = activity.values.shape[1]
        pool = {label: tuple(range(num))}
        for units in correlated(activity.values, max(1, num // 8)):
            listed = ", ".join(map(str, units[:6])) + (", ..." if len(units) > 6 else "")
            groups.append(
                Group(
                    name=f"{label} units {listed}",
                    kind="unit group",
                    members={label: tuple(units)},
                    pool=pool,
                )
            )
    return groups


def correlated(values: Float[Tensor, "observation unit"], size: int) -> list[list[int]]:
    """Units in groups of `size`: the most variable that is left, with those most like it."""
    centred = values - values.mean(0)
    norm = centred.norm(dim=0)
    scaled = centred / norm.clamp(min=1e-12)
    alike = (scaled.T @ scaled).abs()
    left = torch.ones(values.shape[1], dtype=torch.bool)
    groups = []
    for seed in norm.argsort(descending=True).tolist():
        if not left[seed]:
            continue
        score = alike[seed].masked_fill(~left, -1.0)
        score[seed] = 2.0
        picked = score.topk(min(size, int(left.sum()))).indices
        left[picked] = False
        groups.append(sorted(picked.tolist()))
    return groups
