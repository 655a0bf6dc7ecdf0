"""Padding, single rows and labels that do not fit: the corners of what methods work on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.errors import DataError
from patchclamp.methods.material import Material, RowKind, plain_output, score_for, scores
from patchclamp.methods.neurons.ablation import unit_means
from patchclamp.methods.neurons.activity import Activity, strongest
from patchclamp.methods.neurons.redundancy import Redundancy
from patchclamp.methods.neurons.selectivity import Selectivity
from patchclamp.methods.trust.calibration import Calibration
from patchclamp.model.inputs import as_call
from patchclamp.net import Net


class Masked(nn.Module):
    """A text classifier that looks away from padding. Shapes: (row, position) to (row, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.act = nn.ReLU()
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.act(self.embed(input_ids))
        weight = attention_mask[..., None].to(hidden)
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        logits: Tensor = self.head(pooled)
        return logits


def padded() -> tuple[Net, Material]:
    """Six texts of 2 to 7 tokens."""
    lengths = torch.tensor([2, 3, 4, 5, 6, 7])
    mask = (torch.arange(7) < lengths[:, None]).long()
    ids = torch.randint(1, 20, (6, 7)) * mask
    inputs = {"input_ids": ids, "attention_mask": mask}
    net = patchclamp.open(Masked().eval(), inputs)
    material = Material(
        call=as_call(inputs, {}),
        num=6,
        kind=RowKind.TEXT,
        labels=torch.arange(6) % 3,
        class_names=("a", "b", "c"),
        name="made",
        hash="",
    )
    return net, material


def counted(net: Net, material: Material) -> Tensor:
    """(token, unit): values at the tokens that count, one after the other."""
    assert material.mask is not None
    return net.record(material.call, "act").tensor("act")[material.mask]


def test_activity_does_not_count_padding() -> None:
    net, material = padded()
    found = Activity(batch_size=4).run(net, material, net.taps("act"))[0]
    expected = counted(net, material)
    assert torch.allclose(found.values, expected)
    assert found.group.bincount().tolist() == [2, 3, 4, 5, 6, 7]
    assert torch.allclose(torch.tensor(found.table["mean"].to_list()).float(), expected.mean(0))
    assert torch.allclose(found.peak[0], expected[:2].max(0).values)


def test_means_for_ablation_do_not_count_padding() -> None:
    net, material = padded()
    means = unit_means(net, material, ["act"], 4)["act"]
    assert torch.allclose(means, counted(net, material).mean(0), atol=1e-6)


def test_rows_of_a_material_keep_labels_and_mask_together() -> None:
    net, material = padded()
    some = material.rows(net, torch.tensor([5, 0]))
    assert some.labels is not None
    assert some.labels.tolist() == [2, 0]
    assert some.mask is not None
    assert some.mask.sum(1).tolist() == [7, 2]


def test_one_row_gives_finite_statistics() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.act(x)
            return y

    x = torch.tensor([[1.0, -1.0, 0.0]])
    net = patchclamp.open(Layer().eval(), torch.randn(2, 3))
    material = Material(
        call=as_call(x, {}),
        num=1,
        kind=RowKind.ARRAY,
        labels=None,
        class_names=(),
        name="one",
        hash="",
    )
    found = Activity().run(net, material, net.taps("act"))[0]
    assert found.table["sparsity"].is_finite().all()
    assert found.table["std"].to_list() == [0.0, 0.0, 0.0]
    assert found.table["dead"].to_list() == [False, True, True]
    result = Redundancy().run(found.values)
    assert (result.num_tested, result.closest) == (0, None)


def test_the_strongest_rows_come_strongest_first() -> None:
    net, material = padded()
    found = Activity().run(net, material, net.taps("act"))[0]
    rows = list(strongest(found, 3, 4))
    assert [v for _, v in rows] == sorted((v for _, v in rows), reverse=True)
    assert rows[0][1] == float(found.peak[:, 3].max())
    assert len(list(strongest(found, 3, 99))) == 6


def test_a_class_that_the_network_lacks_is_refused() -> None:
    net, material = padded()
    object.__setattr__(material, "labels", torch.tensor([0, 1, 2, 3, 0, 1]))
    with pytest.raises(DataError, match="lacks") as caught:
        score_for(net, material)
    assert caught.value.hint


def test_the_score_without_labels_is_how_far_the_output_moves() -> None:
    net, material = padded()
    object.__setattr__(material, "labels", None)
    score = score_for(net, material)
    assert scores(net, material, score).tolist() == [0.0] * 6
    edits = [{"kind": "zero", "site": "act"}]
    from patchclamp.core.edit_kinds import as_edits

    moved = scores(net, material, score, edits=as_edits(edits), batch_size=4)
    plain = plain_output(net, material, batch_size=6)
    bias = net.module.get_submodule("head").bias
    expected = (bias - plain).norm(dim=1) / plain.norm(dim=1)
    assert torch.allclose(moved, expected, atol=1e-5)


@pytest.mark.parametrize("labels", [torch.zeros(40), torch.arange(40), torch.full((40,), -1)])
def test_selectivity_refuses_classes_with_too_few_rows(labels: Tensor) -> None:
    with pytest.raises(DataError, match="two classes") as caught:
        Selectivity().run(torch.randn(40, 2), labels.long(), torch.arange(40))
    assert caught.value.hint


def test_selectivity_refuses_rows_of_a_single_group() -> None:
    with pytest.raises(DataError, match="two classes"):
        Selectivity().run(torch.randn(40, 2), torch.arange(40) % 2, torch.zeros(40).long())


def test_rows_of_no_class_are_never_preferred() -> None:
    labels = torch.arange(90) % 3 - 1
    values = torch.randn(90, 3) * 0.1
    values[:, 0] += (labels == -1).float() * 5
    result = Selectivity(shuffles=19).run(values, labels, torch.arange(90))
    assert set(result.best.tolist()) <= {0, 1}


def test_calibration_refuses_fewer_rows_than_bins() -> None:
    with pytest.raises(DataError, match="bin"):
        Calibration(bins=10).judge(torch.rand(9), torch.ones(9, dtype=torch.bool))
