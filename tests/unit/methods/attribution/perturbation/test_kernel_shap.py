"""KernelSHAP on games whose Shapley values are known, exact and sampled."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import OptionError
from patchclamp.methods import scoring
from patchclamp.methods.attribution.perturbation.kernel_shap import KernelShap
from patchclamp.net import Net
from tests.networks import TwoLinear, opened


class Products(nn.Module):
    """A sum of products of columns: on ones against zeros, each factor gets an equal share."""

    def __init__(self, num: int, terms: dict[tuple[int, ...], float]) -> None:
        super().__init__()
        self.num, self.terms = num, terms

    def forward(self, x: Tensor) -> Tensor:
        made = [c * x[:, list(term)].prod(1) for term, c in self.terms.items()]
        return torch.stack(made).sum(0)[:, None]

    def shapley(self) -> Tensor:
        values = torch.zeros(self.num, dtype=torch.float64)
        for term, c in self.terms.items():
            values[list(term)] += c / len(term)
        return values

    def net(self) -> tuple[Net, Tensor]:
        x = torch.ones(1, self.num, dtype=torch.float64)
        return patchclamp.open(self.eval(), x.repeat(2, 1)), x


class Gloves(nn.Module):
    """One left glove (column 0) and two right ones: a pair is worth 1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(x[:, :1], x[:, 1:].amax(1, keepdim=True))


def mixed(num: int) -> Products:
    """Products of one to three of these columns; the last column is in none."""
    source = torch.Generator().manual_seed(5)
    weights = iter(torch.randn(1000, generator=source).tolist())
    terms = [t for k in (1, 2, 3) for t in itertools.combinations(range(num - 1), k)]
    return Products(num, {t: next(weights) for t in terms[:: max(1, len(terms) // 20)]})


def test_the_glove_game() -> None:
    x = torch.ones(1, 3, dtype=torch.float64)
    net = patchclamp.open(Gloves().eval(), x.repeat(2, 1))
    found = KernelShap().run(net, x, 0)
    torch.testing.assert_close(found.values[0], torch.tensor([4.0, 1.0, 1.0]).double() / 6)
    assert found.standard_errors[0].tolist() == [0.0] * 3
    assert found.passes.forwards == 8


def test_small_games_are_exact() -> None:
    game = mixed(6)
    net, x = game.net()
    found = KernelShap(num_samples=64).run(net, x, 0)
    torch.testing.assert_close(found.values[0], game.shapley())
    assert abs(float(found.values[0, -1])) < 1e-12  # the column that nothing uses


@pytest.mark.parametrize("samples", [8, 500])
def test_a_linear_network_is_exact_sampled_or_not(samples: int) -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    module = TwoLinear().double().eval()
    net = patchclamp.open(module, x)
    found = KernelShap(num_samples=samples, baseline=-1.0).run(net, x, 0)
    weight = (module.b.weight @ module.a.weight)[0].detach()
    torch.testing.assert_close(found.values, weight * (x + 1))
    wide = Products(14, {(i,): float(i) for i in range(13)})
    net, x = wide.net()
    found = KernelShap(num_samples=500).run(net, x, 0)
    torch.testing.assert_close(found.values[0], wide.shapley())
    assert float(found.standard_errors[0].max()) < 1e-12


def test_sampled_values_add_up_and_their_errors_are_right() -> None:
    game = mixed(12)
    net, x = game.net()
    runs = [KernelShap(num_samples=400, seed=seed).run(net, x, 0) for seed in range(40)]
    assert max(float(run.error) for run in runs) < 1e-12
    assert all(run.passes.forwards <= 402 for run in runs)
    effects = torch.stack([run.effects[0] for run in runs])
    errors = torch.stack([run.standard_errors[0] for run in runs])
    z = (effects - game.shapley()) / errors
    assert 0.85 < float(z.square().mean().sqrt()) < 1.15
    assert abs(float(z.mean())) < 0.15
    # A quarter of the samples makes twice the error, as reported.
    few = KernelShap(num_samples=100).run(net, x, 0).standard_errors[0]
    assert 1.5 < float(few.mean() / errors.mean()) < 2.7


def test_coalitions_with_their_complements_settle_products_of_two() -> None:
    terms = {pair: 1.0 + pair[0] for pair in itertools.combinations(range(12), 2)}
    game = Products(12, terms)
    net, x = game.net()
    found = KernelShap(num_samples=200).run(net, x, 0)
    torch.testing.assert_close(found.values[0], game.shapley())
    assert float(found.standard_errors[0].max()) < 1e-9  # and it is known that they do


def test_tiles_and_given_segments() -> None:
    net, x = opened("digits_cnn")
    quarters = (torch.arange(8) // 4)[:, None] * 2 + torch.arange(8) // 4
    by_map = KernelShap(segments=quarters).run(net, x, 3)
    by_tile = KernelShap(patch=4).run(net, x, 3)
    torch.testing.assert_close(by_map.values, by_tile.values)
    assert by_map.passes.forwards == 3 * 16
    assert float(by_map.error.max()) < 1e-4


def test_tokens_of_a_language_model() -> None:
    net, tokens = opened("tiny_lm")
    found = KernelShap(num_samples=128).run(net, tokens, 2)
    assert [len(e) for e in found.effects] == [7, 7, 7]
    assert float(found.error.max()) < 1e-3


def test_the_same_map_in_any_batch_order_and_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = opened("digits_mlp")
    method = KernelShap(num_samples=80, seed=2)
    found = method.run(net, x, 1).values
    monkeypatch.setattr(scoring, "_MOST_ROWS", 1)
    again = method.run(net, x[[2, 1]], 1).values
    torch.testing.assert_close(again, found[[2, 1]], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(KernelShap(num_samples=80, seed=3).run(net, x, 1).values, found)


def test_too_few_samples_by_name() -> None:
    net, x = opened("digits_mlp")
    with pytest.raises(OptionError, match=r"16 segments are too many.*num_samples of 64"):
        KernelShap(num_samples=50).run(net, x, 0)
