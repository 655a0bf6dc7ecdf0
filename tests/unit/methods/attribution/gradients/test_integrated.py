"""Integrated gradients against closed forms, and its own account of its error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import InputError, OptionError, TargetError
from patchclamp.methods import scoring
from patchclamp.methods.attribution.gradients.integrated import IntegratedGradients
from patchclamp.net import Net
from tests.networks import TwoLinear, opened


class Function(nn.Module):
    """A function of the columns as a network with one output."""

    def __init__(self, of: object) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x)[:, None]  # type: ignore[operator]


def net_of(function: object, x: Tensor) -> Net:
    return patchclamp.open(Function(function).eval(), x)


def test_a_linear_network_in_closed_form() -> None:
    x = torch.randn(3, 3, dtype=torch.float64)
    module = TwoLinear().double().eval()
    net = patchclamp.open(module, x)
    base = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    found = IntegratedGradients(baseline=base).run(net, x, 1)
    weight = (module.b.weight @ module.a.weight)[1].detach()
    torch.testing.assert_close(found.values, weight * (x - base))
    assert float(found.error.max()) < 1e-12
    torch.testing.assert_close(found.baseline_scores, module(base[None]).detach()[:, 1].expand(3))
    assert found.num_gradients.tolist() == [17, 17, 17]
    assert found.passes.backwards == 51


def test_a_product_is_shared_equally() -> None:
    x = torch.tensor([[2.0, 3.0], [-1.0, 5.0]], dtype=torch.float64)
    found = IntegratedGradients().run(net_of(lambda x: x[:, 0] * x[:, 1], x), x, 0)
    torch.testing.assert_close(found.values, torch.tensor([[3.0, 3.0], [-2.5, -2.5]]).double())


@pytest.mark.parametrize("threshold", [0.3137, 0.77])
def test_a_kink_in_closed_form(threshold: float) -> None:
    weight = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    x = torch.ones(2, 3, dtype=torch.float64)
    net = net_of(lambda x: torch.relu(x @ weight - 2.5 * threshold), x)
    found = IntegratedGradients(tolerance=1e-4).run(net, x, 0)
    want = weight * (1 - threshold)  # the kink is at this share of the way
    torch.testing.assert_close(found.values, want.expand(2, 3), rtol=1e-4, atol=0)
    even = IntegratedGradients(tolerance=1e-4, start=29, max_gradients=30, strict=False)
    assert float(found.error.max()) < 1e-4 < float(even.run(net, x, 0).error.min())
    assert int(found.num_gradients.max()) < 40


def test_every_example_has_its_own_baseline_and_points() -> None:
    def bend(x: Tensor) -> Tensor:
        return torch.sin(9 * x).sum(1) + 3 * x.sum(1)

    x = torch.tensor([[0.05, 0.1], [1.5, 0.2], [-0.4, 3.0]], dtype=torch.float64)
    base = torch.tensor([[0.0, 0.0], [-1.0, 1.0], [2.0, -2.0]], dtype=torch.float64)
    net = net_of(bend, x)
    method = IntegratedGradients(baseline=base, tolerance=0.01)
    found = method.run(net, x, 0)
    want = torch.sin(9 * x) - torch.sin(9 * base) + 3 * (x - base)  # a sum over elements
    torch.testing.assert_close(found.values, want, rtol=0.05, atol=0.05)
    assert found.num_gradients[0] < found.num_gradients[2]
    for row in range(3):
        one = IntegratedGradients(baseline=base[row], tolerance=0.01).run(net, x[row : row + 1], 0)
        torch.testing.assert_close(one.values[0], found.values[row], rtol=1e-12, atol=1e-12)
        assert one.num_gradients[0] == found.num_gradients[row]


def test_differences_of_opposite_sign_do_not_count_as_none() -> None:
    x = torch.ones(1, 1, dtype=torch.float64)
    net = net_of(lambda x: (x + torch.sin(4 * torch.pi * x) / 4).sum(1), x)
    # Two panels, between which the wave is lost by cancelling: the sum is right, the parts not.
    x[:] = 0.75
    rough = IntegratedGradients(start=2, max_gradients=3, strict=False).run(net, x, 0)
    fine = IntegratedGradients(start=2, max_gradients=40).run(net, x, 0)
    assert float(rough.unresolved) >= float(rough.error)
    assert float(fine.unresolved) <= 0.05
    assert int(fine.num_gradients) > 3


def test_where_it_cannot_add_up_it_says_so_by_row() -> None:
    def jump(x: Tensor) -> Tensor:
        return x.sum(1) + 5.0 * (x[:, 0] > 0.41)

    x = torch.tensor([[0.2, 1.0], [1.0, 1.0], [0.3, 0.3]], dtype=torch.float64)
    net = net_of(jump, x)
    with pytest.raises(TargetError, match=r"1 of 3 rows within 120.*rows 1 \(0\.714\)"):
        IntegratedGradients().run(net, x, 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.module.modules())
    found = IntegratedGradients(strict=False).run(net, x, 0)
    torch.testing.assert_close(found.error, torch.tensor([0.0, 5 / 7, 0.0]).double())
    torch.testing.assert_close(found.unresolved[1], torch.tensor(5 / 7).double())
    torch.testing.assert_close(found.values, x)  # the gradient sees nothing of the jump


def test_a_score_equal_to_that_of_the_baseline_is_an_explicit_failure() -> None:
    x = torch.ones(1, 2, dtype=torch.float64)
    net = net_of(lambda x: torch.sin(torch.pi * x[:, 0]) * 3 + 0 * x[:, 1], x)
    with pytest.raises(TargetError, match="do not add up"):
        IntegratedGradients(max_gradients=20).run(net, x, 0)


def test_a_network_that_does_not_look_gives_nothing() -> None:
    x = torch.randn(2, 4)
    found = IntegratedGradients().run(net_of(lambda x: 0 * x.sum(1) + 2, x), x, 0)
    assert torch.equal(found.values, torch.zeros(2, 4))
    assert found.error.tolist() == [0.0, 0.0]


def test_at_a_hidden_site_and_at_embeddings() -> None:
    x = torch.randn(3, 3)
    module = TwoLinear().eval()
    found = IntegratedGradients(baseline=0.25).run(patchclamp.open(module, x), x, 0, at="a")
    want = module.b.weight[0] * (module.a(x) - 0.25)
    torch.testing.assert_close(found.values, want.detach())
    net, tokens = opened("tiny_lm")
    read = IntegratedGradients().run(net, tokens, 5)
    assert read.site == "embed"
    assert tuple(read.values.shape) == (*tokens.shape, read.values.shape[-1])
    assert float(read.error.max()) <= 0.05


def test_the_same_map_at_any_number_of_rows_per_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = opened("digits_cnn")
    method = IntegratedGradients(max_gradients=30, strict=False)
    many = method.run(net, x, 3)
    monkeypatch.setattr(scoring, "_MOST_ROWS", 1)
    one = method.run(net, x, 3)
    torch.testing.assert_close(one.values, many.values, rtol=1e-3, atol=1e-5)
    monkeypatch.setattr("patchclamp.methods.attribution.gradients.integrated._TOGETHER", 1)
    torch.testing.assert_close(method.run(net, x, 3).values, one.values, rtol=1e-3, atol=1e-5)


def test_bad_options_and_baselines_by_name() -> None:
    net, x = opened("digits_mlp")
    with pytest.raises(OptionError, match="tolerance"):
        IntegratedGradients(tolerance=0.0)
    with pytest.raises(OptionError, match="two ends"):
        IntegratedGradients(max_gradients=1)
    with pytest.raises(InputError, match="wrong shape"):
        IntegratedGradients(baseline=torch.zeros(2)).run(net, x, 0)
    with pytest.raises(InputError, match="equals its baseline"):
        IntegratedGradients(baseline=x).run(net, x, 0)
