"""The benches' training: deterministic, inside its radius, and errors for what cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from patchclamp.core.errors import DataError, InputError, OptionError
from patchclamp.truth.attribution import (
    Blocks,
    BrightRegion,
    DiffRoar,
    Glyphs,
    Lesions,
    Recipe,
    Slabs,
    Variant,
    convolutional,
    perceptron,
)
from patchclamp.truth.attribution.blocks import blocks, images, null_block
from patchclamp.truth.attribution.edges import edge_strength
from patchclamp.truth.attribution.fitting import fitted, worst
from patchclamp.truth.attribution.glyphs import BOX, turns

SHORT = Recipe(epochs=1)


def _dropout(shape: tuple[int, ...], num_classes: int, /) -> nn.Module:
    return nn.Sequential(nn.Linear(shape[0], 8), nn.Dropout(0.5), nn.Linear(8, num_classes))


def test_training_is_the_callers_neither_by_mode_nor_by_chance() -> None:
    x, labels = torch.randn(60, 4), torch.arange(60) % 3
    state = torch.get_rng_state()
    first = fitted(_dropout, x, labels, 3, SHORT, seed=2)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)
    second = fitted(_dropout, x, labels, 3, SHORT, seed=2)
    other = fitted(_dropout, x, labels, 3, SHORT, seed=3)
    weights = [next(m.parameters()) for m in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    still = Recipe(epochs=1, rate=1e-9, decay=0.0)
    starts = [next(fitted(_dropout, x, labels, 3, still, seed=s).parameters()) for s in (2, 3)]
    assert float((starts[0] - starts[1]).abs().max()) > 0.01  # first weights are the seed's too
    assert not first.training
    assert not any(p.requires_grad for p in first.parameters())


def test_adversaries_stay_in_the_ball_and_raise_the_loss() -> None:
    x, labels = torch.randn(20, 1, 4, 4), torch.arange(20) % 2
    module = perceptron((1, 4, 4), 2)
    moved = worst(module, x, labels, 0.5, 5)
    far = (moved - x).flatten(1).norm(dim=1)
    assert bool((far <= 0.5 + 1e-6).all())
    assert float(far.min()) > 0.4
    with torch.no_grad():
        plain, raised = (
            nn.functional.cross_entropy(module(t), labels, reduction="none") for t in (x, moved)
        )
    assert bool((raised > plain).all())


def test_the_null_block_is_like_a_digit() -> None:
    (x, _), _ = images("digits", 8, torch.Generator().manual_seed(0))
    null = null_block(x)
    for measure in (lambda t: t, edge_strength):
        assert (
            abs(float(measure(null[None]).sum() / measure(x).flatten(1).sum(1).mean()) - 1) < 0.05
        )
    made = blocks(x[:2], null, torch.tensor([True, False]))
    assert torch.equal(made[0], torch.cat([x[0], null], 1))
    assert torch.equal(made[1], torch.cat([null, x[1]], 1))


def test_glyph_and_mirror_image_have_the_same_ink_and_edges() -> None:
    shapes = torch.cat([turns(), turns().flip(-1)])
    assert len({tuple(s.flatten().tolist()) for s in shapes}) == 8
    padded = nn.functional.pad(shapes, (2, 2, 2, 2))[:, None]
    edges = edge_strength(padded).flatten(1).sum(1)
    assert torch.allclose(edges, edges[:1].expand(8))
    assert len(set(shapes.flatten(1).sum(1).tolist())) == 1
    drawn = Glyphs(noise=0.0, size=15).draw(30, torch.Generator().manual_seed(0))
    assert not bool((drawn.signal & drawn.distractor).any())
    for layer, mask in ((drawn.glyphs, drawn.signal), (drawn.mirrored, drawn.distractor)):
        assert bool((layer[:, 0][~mask] == 0).all())
        assert bool((edge_strength(layer)[:, 0][~mask] == 0).all())  # the box holds the edges
        assert bool((mask.flatten(1).sum(1) == BOX**2).all())


def test_slabs_say_nothing_of_the_class_to_a_line() -> None:
    x, labels = Slabs().draw(20000, torch.Generator().manual_seed(0))
    simple, hard = x[:, 0], x[:, 1]
    assert bool(((simple > 0) == (labels == 1)).all())
    slab = ((hard + 1) / 0.4).floor()
    assert bool(((slab % 2 == 0) == (labels == 1)).all())
    assert abs(float(torch.corrcoef(torch.stack([hard, labels.float()]))[0, 1])) < 0.03
    assert bool((x.abs() <= 1).all())


@pytest.mark.parametrize(
    "bench",
    [
        Blocks(size=2),
        Blocks(num=0),
        Blocks(variant=Variant.ROBUST, recipe=SHORT),
        Glyphs(size=13),
        Glyphs(noise=-1.0),
        Slabs(num_slabs=4),
        Slabs(num_slabs=1),
        Slabs(num_complex=0),
        BrightRegion(region=(7, 7, 2, 2)),
        BrightRegion(region=(0, 0, 5, 5)),
        BrightRegion(gap=1.0),
        Lesions(size=17),
        Glyphs(build=lambda shape, n: convolutional(shape[:2], n)),
    ],
)
def test_options_that_cannot_be(bench: Blocks | Glyphs | Slabs | BrightRegion | Lesions) -> None:
    with pytest.raises(OptionError):
        bench.run()


def test_data_without_labelled_images() -> None:
    with pytest.raises(DataError):
        Blocks(data="prose").run()
    with pytest.raises(DataError, match="bright"):
        BrightRegion(region=(0, 0, 2, 1)).run()


def test_recipes_that_cannot_be() -> None:
    for wrong in ({"epochs": 0}, {"rate": 0.0}, {"radius": -1.0}, {"steps": 0}):
        with pytest.raises(OptionError):
            Recipe(**wrong)  # type: ignore[arg-type]  # wrong on purpose


def test_diffroar_tells_pixels_from_masks() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(num: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(num) % 2
        x = torch.randn(num, 1, 4, 4, generator=generator)
        x[:, 0, 0] += 3 * (2.0 * labels - 1)[:, None]
        return x, labels

    train, test = drawn(400), drawn(200)
    truth = torch.zeros(4, 4)
    truth[0] = 1.0
    bench = DiffRoar(rounds=1, recipe=Recipe(epochs=10))
    right = bench.run(train, test, truth.expand(400, 4, 4), truth.expand(200, 4, 4))
    assert right.top.mean > 0.95
    assert right.difference.interval.low > 0.3
    assert not right.mask_leaks
    assert right.beyond_mask.mean > 0.3
    random = [torch.rand(n, 4, 4, generator=generator) for n in (400, 200)]
    chance = bench.run(train, test, *random)
    assert abs(chance.difference.mean) < 0.1
    assert not chance.mask_leaks
    # the label is written into the map; nothing of it is in the pixels there
    leak = [torch.rand(len(y), 4, 4, generator=generator) for _, y in (train, test)]
    for maps, (_, labels) in zip(leak, (train, test), strict=True):
        maps[:, 0] = 0.0
        maps[labels == 1, 3, :2] += 1.0
        maps[labels == 0, 2, :2] += 1.0
    told = bench.run(train, test, *leak)
    assert told.mask_leaks
    assert told.mask_top.mean > 0.95
    with pytest.raises(InputError, match="do not fit"):
        bench.run(train, test, truth.expand(200, 4, 4), truth.expand(200, 4, 4))
    with pytest.raises(OptionError, match="different places"):
        DiffRoar(share=0.8).run(train, test, *random)


def test_images_of_the_users_own(tmp_path: Path) -> None:
    labels = torch.arange(60) % 2
    x = 0.1 * torch.rand(60, 3, 9, 9)
    x[labels == 1, :, :4] += 0.8
    x[labels == 0, :, 5:] += 0.8
    path = tmp_path / "images.npz"
    np.savez(path, x=x.numpy(), y=labels.numpy())
    planted = Blocks(data=path, size=6, recipe=Recipe(epochs=10, rows=16)).run()
    assert planted.inputs.shape == (12, 3, 12, 6)
    assert planted.signal.shape == (12, 12, 6)
    assert planted.gate.accuracy.value > 0.8
