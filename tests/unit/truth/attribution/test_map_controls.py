"""Controls: what each one shows, and that the network is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import InputError, SiteError
from patchclamp.methods.attribution.gradients.plain import Gradient
from patchclamp.net import Net
from patchclamp.truth.attribution import (
    AbsoluteValue,
    AnotherImage,
    CentreBias,
    Edges,
    GivenMaps,
    RandomMap,
    RandomWeights,
    UniformMap,
    controls_of,
)
from patchclamp.truth.attribution.edges import edge_strength


@pytest.fixture
def net() -> Net:
    parts = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)]
    return patchclamp.open(nn.Sequential(*parts).eval(), torch.rand(2, 2, 6, 6))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 2, 6, 6)


def test_all_controls_run_and_leave_the_network(net: Net, images: Tensor) -> None:
    before = {k: v.clone() for k, v in net.module.state_dict().items()}
    state = torch.get_rng_state()
    made = [c.run(net, images, 1) for c in controls_of(Gradient())]
    assert len({m.method for m in made}) == len(made) == 7
    assert all(m.values.shape == images.shape for m in made)
    assert all(torch.equal(v, net.module.state_dict()[k]) for k, v in before.items())
    assert not any(m._forward_hooks for m in net.module.modules())
    assert torch.equal(state, torch.get_rng_state())
    names = {c.name for c in controls_of(Gradient(), space=False, moving=False)}
    assert names == {"random", "uniform", "absolute_value", "random_weights"}


def test_random_maps_belong_to_seed_and_example(net: Net, images: Tensor) -> None:
    whole = RandomMap(seed=1).run(net, images, 0).values
    assert torch.equal(whole[3:4], RandomMap(seed=1).run(net, images[3:4], 0).values)
    assert not torch.equal(whole, RandomMap(seed=2).run(net, images, 0).values)
    assert abs(float(whole.mean()) - 0.5) < 0.1
    assert not torch.equal(whole[0], whole[1])


def test_simple_maps(net: Net, images: Tensor) -> None:
    assert torch.equal(AbsoluteValue().run(net, images, 0).values, images.abs())
    assert bool((UniformMap().run(net, images, 0).values == 1).all())
    centre = CentreBias().run(net, images, 0).values[0, 0]
    assert centre.argmax() in (14, 15, 20, 21)  # the four in the middle, equal but for rounding
    assert torch.allclose(centre, centre.flip(0).T)
    truth = torch.rand(5, 6, 6)
    given = GivenMaps(maps=truth, label="truth").run(net, images, 0)
    assert torch.allclose(given.heat(), 2 * truth)
    with pytest.raises(InputError, match="truth maps"):
        GivenMaps(maps=truth[:, :3], label="truth").run(net, images, 0)


def test_edges_are_where_brightness_changes(net: Net) -> None:
    step = torch.zeros(1, 1, 5, 6)
    step[..., 3:] = 1.0
    found = edge_strength(step)[0, 0]
    assert found[:, [2, 3]].eq(4.0).all()
    assert found[:, [0, 1, 4, 5]].eq(0.0).all()
    assert torch.equal(edge_strength(step.transpose(2, 3))[0, 0], found.T)
    assert edge_strength(torch.full((1, 1, 4, 4), 7.0)).eq(0).all()
    signal = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    assert edge_strength(signal).flatten().tolist() == [0.0, 2.0, 2.0, 0.0]
    images = torch.randn(2, 2, 6, 6)
    assert torch.equal(Edges().run(net, images, 0).values, edge_strength(images))


def test_edges_need_space(net: Net, images: Tensor) -> None:
    with pytest.raises(SiteError, match="rows and columns"):
        Edges().run(net, images, 0, at="3")


def test_another_image_gives_every_example_a_map_of_another(net: Net, images: Tensor) -> None:
    own = Gradient().run(net, images, 0)
    other = AnotherImage(method=Gradient(), seed=4).run(net, images, 0)
    # not by equality: gradients differ in the last bits with how many rows run at a time
    away = (other.values[:, None] - own.values[None]).flatten(2).norm(dim=2)
    rows = away.argmin(1).tolist()
    assert float(away.amin(1).max()) < 1e-5
    assert sorted(rows) == [*range(5)]
    assert all(n != k for k, n in enumerate(rows))
    with pytest.raises(InputError, match="two examples"):
        AnotherImage(method=Gradient()).run(net, images[:1], 0)


def test_random_weights_change_the_map(net: Net, images: Tensor) -> None:
    own = Gradient().run(net, images, 0).values
    other = RandomWeights(method=Gradient()).run(net, images, 0)
    assert other.method == "gradient, random weights"
    assert float((own - other.values).norm() / own.norm()) > 0.5
    same = RandomWeights(method=UniformMap()).run(net, images, 0)
    assert bool((same.values == 1).all())
