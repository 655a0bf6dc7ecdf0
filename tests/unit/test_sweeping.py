"""Sweeps against the naive loop, their labels, their memory, and what they refuse."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import xarray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import patchclamp
from patchclamp import edits as E
from patchclamp.core.errors import (
    EngineError,
    InputError,
    OptionError,
    SiteError,
    TargetError,
)
from patchclamp.engine.cells import bytes_of
from patchclamp.net import Net
from tests import networks as N

TOLERANCE = 1e-5
CLASSES = torch.tensor([3, 9, 200])


def pair(name: str = "tiny_lm") -> tuple[Net, Tensor, Tensor]:
    """A network, clean inputs, and corrupt ones: tokens change at position 4 only."""
    net, clean = N.opened(name)
    if clean.is_floating_point():
        return net, clean, clean.flip(0) * 0.9
    corrupt = clean.clone()
    corrupt[:, 4] = (corrupt[:, 4] + 11) % 256
    return net, clean, corrupt


def score(net: Net, inputs: Tensor, edits: Sequence[E.Edit] = ()) -> Tensor:
    with torch.no_grad():
        output = net.run(inputs, edits=list(edits)).output
    last = output[:, -1] if output.ndim == 3 else output
    return last.gather(1, CLASSES[:, None] % last.shape[1])[:, 0]


def naive(
    net: Net, base: Tensor, source: Tensor, swept: xarray.DataArray, sites: Sequence[str]
) -> np.ndarray:
    """One forward pass per cell of an array (site, *axes, example)."""
    acts = net.record(source, sites)
    made = np.empty(swept.shape)
    for at in np.ndindex(*swept.shape[:-1]):
        label = sites[at[0]]
        where = dict(zip(swept.dims[1:-1], at[1:], strict=True))
        made[at] = score(net, base, [E.patch(label, acts.tensor(label), **where)]).numpy()
    return made


SWEPT = {
    "resid_pre": "resid_pre.{}",
    "resid_mid": "resid_mid.{}",
    "resid_post": "resid_post.{}",
    "attn_out": "attn.{}.out",
    "mlp_out": "mlp.{}.out",
    "heads": "attn.{}.z",
    "heads.q": "attn.{}.q",
    "heads.k": "attn.{}.k",
    "heads.v": "attn.{}.v",
    "heads.pattern": "attn.{}.pattern",
}


@pytest.mark.parametrize("over", SWEPT)
def test_every_named_sweep_equals_the_naive_loop(over: str) -> None:
    net, clean, corrupt = pair()
    sites = [SWEPT[over].format(n) for n in range(2)]
    for direction, base, source in (("denoising", corrupt, clean), ("noising", clean, corrupt)):
        for skip in (True, False):
            swept = net.sweep(
                clean, corrupt, CLASSES, over=over, direction=direction, skip=skip, per_example=True
            )
            axis = "head" if over.startswith("heads") else "position"
            assert swept.dims == ("layer", axis, "example")
            expected = naive(net, base, source, swept, sites)
            assert np.abs(swept.values - expected).max() <= TOLERANCE
            assert swept.attrs["num_cells"] == swept[..., 0].size
    assert np.ptp(swept.values, axis=1).max() > 1e-3  # it is not all the same number


def test_the_mean_is_over_examples_and_the_attributes_say_what_was_done() -> None:
    net, clean, corrupt = pair()
    each = net.sweep(clean, corrupt, CLASSES, per_example=True)
    mean = net.sweep(clean, corrupt, CLASSES)
    assert np.allclose(each.mean("example"), mean)
    assert mean.dims == ("layer", "position")
    assert list(mean.layer.values) == [0, 1]
    assert mean.attrs["clean"] == pytest.approx(float(score(net, clean).mean()), abs=1e-5)
    assert mean.attrs["corrupt"] == pytest.approx(float(score(net, corrupt).mean()), abs=1e-5)
    assert mean.attrs["direction"] == "denoising"
    assert mean.attrs["engine"] == "graph"
    assert mean.attrs["max_bytes"] > 0


def test_cells_that_change_nothing_are_skipped_and_hold_the_baseline() -> None:
    net, clean, corrupt = pair()
    swept = net.sweep(clean, corrupt, CLASSES)
    # before position 4 nothing differs; after it, nothing differs at the embedding either
    assert swept.attrs["num_skipped"] == 2 * 4 + 2
    assert np.all(swept.values[:, :4] == swept.attrs["corrupt"])
    same = net.sweep(clean, clean, CLASSES, over="heads")
    assert same.attrs["num_skipped"] == same.size
    assert np.all(same.values == same.attrs["clean"])
    assert net.sweep(clean, clean, CLASSES, skip=False).attrs["num_skipped"] == 0


def test_normalised_sweeps_run_from_corrupt_to_clean() -> None:
    net, clean, corrupt = pair()
    for direction, end in (("denoising", 1.0), ("noising", 0.0)):
        swept = net.sweep(
            clean, corrupt, CLASSES, over="resid_post", normalise=True, direction=direction
        )
        # the last position after the last layer is all that the output sees
        assert float(swept[-1, -1]) == pytest.approx(end, abs=1e-4)
        assert float(swept[0, 0]) == pytest.approx(1 - end, abs=1e-4)
    with pytest.raises(TargetError, match="cannot be normalised"):
        net.sweep(clean, clean, CLASSES, normalise=True)


def test_heads_by_position_and_whole_parts() -> None:
    net, clean, corrupt = pair()
    sites = [f"attn.{n}.z" for n in range(2)]
    both = net.sweep(
        clean, corrupt, CLASSES, over="heads", by=("head", "position"), per_example=True
    )
    assert both.dims == ("layer", "head", "position", "example")
    expected = naive(net, corrupt, clean, both, sites)
    assert np.abs(both.values - expected).max() <= TOLERANCE
    whole = net.sweep(clean, corrupt, CLASSES, over="mlp_out", by=(), per_example=True)
    assert whole.dims == ("layer", "example")
    expected = naive(net, corrupt, clean, whole, ["mlp.0.out", "mlp.1.out"])
    assert np.abs(whole.values - expected).max() <= TOLERANCE


def test_channels_and_places_of_a_convolutional_network() -> None:
    net, clean, corrupt = pair("digits_cnn")
    for site, by in (
        ("blocks.1.conv", None),
        ("blocks.2", ("row", "column")),
        ("blocks.2", ("row",)),
    ):
        swept = net.sweep(clean, corrupt, CLASSES % 10, over=site, by=by, per_example=True)
        expected = naive(net, corrupt, clean, swept, [site])
        assert np.abs(swept.values - expected).max() <= TOLERANCE
        assert swept.dims == ("site", *(by or ("channel",)), "example")


def test_sites_of_different_size_lie_along_one_axis() -> None:
    net, clean, corrupt = pair("digits_cnn")
    swept = net.sweep(clean, corrupt, CLASSES % 10, over="blocks.*.conv")
    assert swept.dims == ("cell",)
    assert list(swept.site.values[[0, 15, 16]]) == ["blocks.0.conv"] * 2 + ["blocks.1.conv"]
    alone = net.sweep(clean, corrupt, CLASSES % 10, over="blocks.1.conv")
    inside = swept.values[swept.site.values == "blocks.1.conv"]
    assert np.allclose(inside, alone.values[0], atol=TOLERANCE)


def test_groups_of_units() -> None:
    net, clean, corrupt = pair("digits_mlp")
    acts = net.record(clean, "layers.0")
    width = acts.tensor("layers.0").shape[1]
    for groups in (4, [[0, 1, 2], [5]], {"first": [0], "rest": list(range(1, width))}):
        swept = net.sweep(
            clean, corrupt, CLASSES % 10, over="layers.0", groups=groups, per_example=True
        )
        members = (
            [list(p) for p in np.array_split(np.arange(width), 4)]
            if isinstance(groups, int)
            else list(groups.values() if isinstance(groups, dict) else groups)
        )
        assert swept.dims == ("site", "group", "example")
        for n, rows in enumerate(members):
            edit = E.patch("layers.0", acts.tensor("layers.0"), unit=[int(r) for r in rows])
            expected = score(net, corrupt, [edit]).numpy()
            assert np.abs(swept.values[0, n] - expected).max() <= TOLERANCE
        if isinstance(groups, dict):
            assert list(swept.group.values) == ["first", "rest"]


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_gpt2", "tiny_llama"])
def test_real_anatomies(name: str) -> None:
    """Post-norm encoders without a causal mask, fused projections, grouped heads."""
    clean = torch.randint(3, 90, (3, 6), generator=torch.Generator().manual_seed(1))
    corrupt = clean.clone()
    corrupt[:, 3] = (corrupt[:, 3] + 5) % 90
    net = patchclamp.open(getattr(N, name)(), clean)
    for over in ("resid_pre", "heads", "heads.k"):
        swept = net.sweep(clean, corrupt, CLASSES % 30, over=over, per_example=True)
        site = "resid_pre.{}" if over == "resid_pre" else f"attn.{{}}.{over[6:] or 'z'}"
        acts = net.record(clean, [site.format(n) for n in range(2)])
        for at in np.ndindex(*swept.shape[:-1]):
            label = site.format(at[0])
            edit = E.patch(label, acts.tensor(label), **{swept.dims[1]: at[1]})
            output = net.run(corrupt, edits=edit).output.detach()
            expected = output[:, -1].gather(1, CLASSES[:, None] % 30)[:, 0].numpy()
            assert np.abs(swept.values[at] - expected).max() <= TOLERANCE
    assert "kv_head" in swept.dims or name != "tiny_llama"


def test_ablation_by_zero_mean_resample_and_an_edit() -> None:
    net, clean, _ = pair()
    reference = (clean + 5) % 256
    held = net.record(reference, ["attn.0.z", "attn.1.z"])
    made = {
        "zero": lambda site, head: E.zero(site, head=head),
        "mean": lambda site, head: E.mean(site, held.tensor(site), head=head),
        "resample": lambda site, head: E.resample(site, held.tensor(site), head=head),
    }
    for kind, edit in made.items():
        swept = net.sweep(
            clean,
            None,
            CLASSES,
            over="heads",
            ablation=kind,
            reference=None if kind == "zero" else reference,
            per_example=True,
        )
        for layer, head in np.ndindex(2, 4):
            expected = score(net, clean, [edit(f"attn.{layer}.z", head)]).numpy()
            assert np.abs(swept.values[layer, head] - expected).max() <= TOLERANCE, kind
        assert swept.attrs["ablation"] == kind
        assert "corrupt" not in swept.attrs
    scaled = net.sweep(clean, None, CLASSES, over="mlp_out", by=(), ablation=E.scale("*", 0.5))
    expected = score(net, clean, [E.scale("mlp.1.out", 0.5)]).mean()
    assert float(scaled[1]) == pytest.approx(float(expected), abs=TOLERANCE)


def test_metrics_in_every_form() -> None:
    net, clean, corrupt = pair()

    class Gap:
        name, position = "gap", -1

        def __call__(self, output: Tensor, rows: Tensor) -> Tensor:
            return output.gather(1, CLASSES[rows][:, None])[:, 0] - output[:, 0]

    def gap(logits: Tensor) -> Tensor:  # holds something for each example of the batch
        return logits[torch.arange(3), -1, CLASSES] - logits[:, -1, 0]

    one, two = (net.sweep(clean, corrupt, m, per_example=True) for m in (Gap(), gap))
    assert np.allclose(one, two, atol=TOLERANCE)
    assert one.name == "gap"
    several = net.sweep(clean, corrupt, 7)
    alone = net.sweep(clean, corrupt, lambda logits: logits[:, -1, 7])
    assert np.allclose(several, alone, atol=TOLERANCE)


def test_the_hooks_engine_gives_the_same_and_is_never_taken_silently() -> None:
    net, clean, corrupt = pair()
    graph, hooks = (
        net.sweep(clean, corrupt, CLASSES, over="attn_out", engine=e) for e in ("graph", "hooks")
    )
    assert np.allclose(graph, hooks, atol=TOLERANCE)
    assert hooks.attrs["engine"] == "hooks"
    assert hooks.attrs["num_runs"] == hooks.attrs["num_cells"] - hooks.attrs["num_skipped"]
    with pytest.raises(EngineError, match="engine='graph'"):
        net.sweep(clean, corrupt, CLASSES, over="heads.pattern", engine="hooks")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wild = patchclamp.open(N.DataDependent().eval(), torch.randn(3, 4))
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    with pytest.raises(EngineError, match="engine='hooks'"):
        wild.sweep(x, y, 1, over="lin")
    assert wild.sweep(x, y, 1, over="lin", engine="hooks").shape == (1, 3)


class Peak(TorchDispatchMode):
    """Largest number of bytes that results of operators hold at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, Tensor):
                self.hold(x.untyped_storage())
        return made

    def hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.live -= size
        self.known.discard(key)


def test_memory_bounds_what_runs_hold() -> None:
    net, clean, corrupt = pair()
    options = {"over": "resid_pre", "skip": False, "per_example": True}
    free = net.sweep(clean, corrupt, CLASSES, **options)
    each = free.attrs["max_bytes"] // 14
    tight = net.sweep(clean, corrupt, CLASSES, memory=2 * each, **options)
    assert np.allclose(free, tight, atol=TOLERANCE)
    assert tight.attrs["num_runs"] > free.attrs["num_runs"]
    assert tight.attrs["max_bytes"] <= 2 * each
    with pytest.raises(OptionError, match="one variant takes more than the memory"):
        net.sweep(clean, corrupt, CLASSES, memory=100, **options)


def test_the_bound_holds_for_measured_bytes() -> None:
    net, clean, corrupt = pair()
    options = {"over": "mlp.*.post", "groups": 64, "skip": False}
    net.sweep(clean, corrupt, CLASSES, **options)  # what is planned once is not counted
    peaks, bounds = [], []
    for memory in (250_000, 500_000, 2_000_000, 2 * 10**9):
        gc.collect()
        with Peak() as watch:
            swept = net.sweep(clean, corrupt, CLASSES, memory=memory, **options)
        peaks.append(watch.peak)
        bounds.append(swept.attrs["max_bytes"])
        assert bounds[-1] <= memory
    assert bounds == sorted(set(bounds))
    # the weights and the values of both runs come on top, the same every time
    for peak, bound in zip(peaks[1:], bounds[1:], strict=True):
        assert peak - peaks[0] <= bound - bounds[0]
    assert peaks[-1] > 2 * peaks[0]


@pytest.mark.parametrize(
    ("given", "size"),
    [(1000, 1000), ("2GB", 2 * 10**9), ("1.5 MB", 1_500_000), ("1GiB", 2**30), ("4k", 4000)],
)
def test_sizes(given: int | str, size: int) -> None:
    assert bytes_of(given) == size


def test_progress_counts_the_cells_that_run() -> None:
    net, clean, corrupt = pair()
    seen: list[object] = []

    class Watch:
        def start(self, task: str, total: int | None = None, unit: str = "items") -> None:
            seen.append(total)

        def advance(self, amount: int = 1) -> None:
            seen.append(amount)

        def finish(self) -> None:
            seen.append("end")

        def note(self, text: str) -> None:
            pass

    swept = net.sweep(clean, corrupt, CLASSES, progress=Watch())
    ran = swept.attrs["num_cells"] - swept.attrs["num_skipped"]
    assert seen[0] == ran
    assert sum(n for n in seen[1:-1] if isinstance(n, int)) == ran
    assert seen[-1] == "end"


def test_bad_inputs_say_what_is_wrong() -> None:
    net, clean, corrupt = pair()
    with pytest.raises(InputError, match="got 7 and 6 tokens"):
        net.sweep(clean, corrupt[:, :6], CLASSES)
    with pytest.raises(InputError, match="got 3 and 2"):
        net.sweep(clean, corrupt[:2], CLASSES)
    with pytest.raises(TargetError, match="one scalar per row"):
        net.sweep(clean, corrupt, lambda logits: logits.mean())
    with pytest.raises(TargetError, match="not an output"):
        net.sweep(clean, corrupt, 256)
    with pytest.raises(TargetError, match="one for each example"):
        net.sweep(clean, corrupt, CLASSES[:2])
    with pytest.raises(SiteError, match="nearest 'resid_pre'"):
        net.sweep(clean, corrupt, CLASSES, over="resid_per")
    with pytest.raises(OptionError, match="cannot be cut along 'head'"):
        net.sweep(clean, corrupt, CLASSES, over="resid_pre", by="head")
    with pytest.raises(OptionError, match="nearest 'noising'"):
        net.sweep(clean, corrupt, CLASSES, direction="nosing")
    with pytest.raises(OptionError, match="no ablation 'patch'"):
        net.sweep(clean, None, CLASSES, ablation="patch")
    with pytest.raises(OptionError, match="needs corrupt inputs"):
        net.sweep(clean, None, CLASSES)
    with pytest.raises(OptionError, match="no engine 'garph'"):
        net.sweep(clean, corrupt, CLASSES, engine="garph")
    with pytest.raises(OptionError, match='such as "2GB"'):
        net.sweep(clean, corrupt, CLASSES, memory="lots")
    cnn, images, other = pair("digits_cnn")
    with pytest.raises(SiteError, match="over='resid_pre'"):
        cnn.sweep(images, other, 1)
    with pytest.raises(OptionError, match="does not fit"):
        cnn.sweep(images, other, 1, over="blocks.0.conv", groups=[[0], [99]])
