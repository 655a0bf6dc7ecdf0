"""Losses against their formulas by hand, and against scale."""

from __future__ import annotations

import pytest
import torch

from patchclamp.core.errors import OptionError
from patchclamp.methods.robustness.attacks.losses import Loss, margins

Y = torch.tensor([[3.0, 1.0, 0.0, -2.0], [1.0, 4.0, 2.0, 0.0]])
OWN, AIM = torch.tensor([0, 0]), torch.tensor([2, 2])


def test_margins_by_hand() -> None:
    assert margins(Y, OWN).tolist() == [2.0, -3.0]
    assert margins(Y, OWN, AIM).tolist() == [3.0, 2.0]


def test_losses_by_hand() -> None:
    assert Loss.MARGIN.values(Y, OWN, None).tolist() == [-2.0, 3.0]
    dlr = Loss.DLR.values(Y, OWN, None)
    assert dlr.tolist() == pytest.approx([-2 / 3, 3 / 3])
    aimed = Loss.DLR.values(Y, OWN, AIM)
    assert aimed.tolist() == pytest.approx([-3 / (3 - (0 - 2) / 2), 1 / (4 - (1 + 0) / 2)])
    ce = Loss.CE.values(Y, OWN, None)
    assert ce.tolist() == pytest.approx((torch.logsumexp(Y, 1) - Y[:, 0]).tolist(), abs=1e-6)
    assert torch.allclose(Loss.CE.values(Y, OWN, AIM), Y[:, 2] - torch.logsumexp(Y, 1))


def test_dlr_does_not_see_the_scale_and_cross_entropy_saturates() -> None:
    def slope(loss: Loss, scale: float) -> torch.Tensor:
        x = Y[:1].clone().requires_grad_()
        loss.values(scale * x, OWN[:1], None).sum().backward()
        assert x.grad is not None
        return x.grad

    assert torch.allclose(slope(Loss.DLR, 1.0), slope(Loss.DLR, 1e4), atol=1e-6)
    assert float(slope(Loss.CE, 1.0).abs().max()) > 0.1
    assert float(slope(Loss.CE, 1e4).abs().max()) == 0


def test_dlr_needs_classes() -> None:
    with pytest.raises(OptionError, match="not defined for 2 classes"):
        Loss.DLR.check(2, aimed=False)
    with pytest.raises(OptionError, match="targeted DLR is not defined for 3"):
        Loss.DLR.check(3, aimed=True)
    Loss.DLR.check(4, aimed=True)
