"""Statistics of the methods against closed forms, numpy and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import patchclamp
from patchclamp.audit.budget import Budget
from patchclamp.audit.choose import correlated
from patchclamp.audit.context import Context
from patchclamp.audit.sections.anatomy import anatomy, compute_by_module, example_rows
from patchclamp.core.document import Table
from patchclamp.core.progress import SILENT
from patchclamp.data import Dataset, Kind
from patchclamp.methods.material import Material, RowKind, next_token_loss, score_for
from patchclamp.methods.neurons.activity import Activity
from patchclamp.methods.neurons.redundancy import Redundancy
from patchclamp.methods.neurons.selectivity import (
    Selectivity,
    area_interval,
    clustered_deviation,
)
from patchclamp.methods.statistics import bootstrap_mean, permutation_null, wilson
from patchclamp.methods.trust.calibration import Calibration
from patchclamp.methods.trust.performance import accuracy
from patchclamp.model.inputs import as_call
from patchclamp.net import Net

Z95 = 1.959963984540054


def material(inputs: Tensor, kind: RowKind = RowKind.ARRAY) -> Material:
    return Material(
        call=as_call(inputs, {}),
        num=inputs.shape[0],
        kind=kind,
        labels=None,
        class_names=(),
        name="made",
        hash="",
    )


# ---- areas and intervals ------------------------------------------------------


def test_areas_equal_those_of_scikit_learn_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    num = 300
    labels = torch.randint(0, 3, (num,), generator=generator)
    columns = [
        torch.randn(num, generator=generator) + labels,
        torch.randint(0, 4, (num,), generator=generator) + 2 * (labels == 1),  # many ties
        torch.relu(torch.randn(num, generator=generator) - 1 + labels),  # ties at zero
        torch.ones(num),
    ]
    values = torch.stack([c.float() for c in columns], 1)
    groups = torch.arange(num)
    result = Selectivity(shuffles=1, seed=3).run(values, labels, groups)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(3))
    second = np.ones(num, dtype=bool)
    second[order[: num // 2].numpy()] = False
    for unit in range(4):
        member = labels.numpy() == int(result.best[unit])
        own = values[:, unit].numpy()
        expected = roc_auc_score(member[second], own[second])
        assert float(result.auroc[unit]) == pytest.approx(expected, abs=1e-12)
        first = [roc_auc_score(labels.numpy()[~second] == c, own[~second]) for c in range(3)]
        assert int(result.best[unit]) == int(np.argmax(first))


def delong(values: np.ndarray, member: np.ndarray) -> float:
    """Standard deviation of an area, by the kernel of DeLong, DeLong & Clarke-Pearson 1988."""
    inside, outside = values[member], values[~member]
    wins = (inside[:, None] > outside).astype(float) + 0.5 * (inside[:, None] == outside)
    by_inside, by_outside = wins.mean(1), wins.mean(0)
    return math.sqrt(by_inside.var(ddof=1) / len(inside) + by_outside.var(ddof=1) / len(outside))


@pytest.mark.parametrize("ties", [False, True])
def test_the_clustered_deviation_of_single_rows_is_delongs(ties: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    for num_in in (5, 30, 77):
        values = torch.randn(80, 3, generator=generator)
        if ties:
            values = values.mul(2).round()
        member = torch.arange(80) < num_in
        got = clustered_deviation(values, member, torch.arange(80))
        expected = [delong(values[:, u].numpy(), member.numpy()) for u in range(3)]
        assert got.tolist() == pytest.approx(expected, rel=1e-10)


def test_copies_of_rows_do_not_narrow_the_clustered_interval() -> None:
    """Every row five times over, in groups, is worth no more than once."""
    values = torch.randn(40, 1, generator=torch.Generator().manual_seed(2))
    member = torch.arange(40) % 2 == 0
    once = clustered_deviation(values, member, torch.arange(40))
    groups = torch.arange(40).repeat_interleave(5)
    copied = clustered_deviation(values[groups], member[groups], groups)
    assert float(copied[0]) == pytest.approx(float(once[0]), rel=1e-10)


@pytest.mark.parametrize(
    ("hits", "num", "low", "high"),
    [
        (
            0,
            10,
            0.0,
            0.2775,
        ),  # the formula by hand: z2 / (10 + z2); the rest, Newcombe 1998, table I
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_wilsons_interval_equals_published_values(
    hits: int, num: int, low: float, high: float
) -> None:
    interval = wilson(hits, num)
    assert interval.low == pytest.approx(low, abs=6e-5)
    assert interval.high == pytest.approx(high, abs=6e-5)


def test_wilsons_limits_are_where_the_score_test_turns() -> None:
    """At a limit p, |hits/num - p| is z standard errors under p; and the ends mirror."""
    for hits, num in ((3, 17), (40, 41), (360, 1000)):
        interval = wilson(hits, num)
        for p in (interval.low, interval.high):
            assert abs(hits / num - p) == pytest.approx(Z95 * math.sqrt(p * (1 - p) / num))
        mirrored = wilson(num - hits, num)
        assert mirrored.low == pytest.approx(1 - interval.high)


def test_the_bootstrap_of_a_mean_has_the_width_of_the_normal_law() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(4))
    interval = bootstrap_mean(values, seed=0)
    half = Z95 * float(values.double().std(unbiased=False)) / 20
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.06)
    assert interval.low < float(values.mean()) < interval.high
    constant = bootstrap_mean(torch.full((9,), 0.1), seed=0)
    assert constant.low == constant.high == pytest.approx(0.1)


def test_a_permutation_null_by_hand() -> None:
    drawn = torch.tensor([0.0, 1.0, 2.0, 3.0])
    null = permutation_null(2.0, drawn, "by hand")
    assert (null.mean, null.num, null.p) == (1.5, 4, 3 / 5)
    assert (null.low, null.high) == (pytest.approx(0.075), pytest.approx(2.925))
    assert permutation_null(-2.0, drawn - 3, "by hand", two_sided=True).p == 3 / 5
    assert permutation_null(-2.0, drawn - 3, "by hand").p == 4 / 5


# ---- activity and redundancy ---------------------------------------------------


class OneLayer(nn.Module):
    """Rectified linear units. Shapes: (row, 5) to (row, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.lin(x))
        return y


class OneConv(nn.Module):
    """A convolution. Shapes: (row, 2, 6, 6) to (row, 3, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


@pytest.mark.parametrize("name", ["lin", "act", "conv"])
def test_moments_equal_those_of_numpy_on_the_whole_array(name: str) -> None:
    module = (OneConv() if name == "conv" else OneLayer()).eval()
    x = torch.randn(50, 2, 6, 6) if name == "conv" else torch.randn(50, 5)
    net = patchclamp.open(module, x[:3])
    found = Activity(batch_size=7).run(net, material(x), net.taps(name))[0]
    whole = net.record(x, name).tensor(name).double().numpy()
    values = np.moveaxis(whole, 1, -1).reshape(-1, whole.shape[1])
    table = found.table
    np.testing.assert_allclose(table["mean"], values.mean(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(table["std"], values.std(0), rtol=1e-6)
    np.testing.assert_allclose(table["peak"], values.max(0), rtol=1e-7)
    np.testing.assert_allclose(table["active"], (values > 0).mean(0), rtol=1e-12)
    n = len(values)
    sparsity = (1 - np.abs(values).mean(0) ** 2 / (values**2).mean(0)) / (1 - 1 / n)
    np.testing.assert_allclose(table["sparsity"], sparsity, rtol=1e-6)
    peaks = whole.reshape(50, whole.shape[1], -1).max(-1)
    np.testing.assert_allclose(found.peak.numpy(), peaks, rtol=1e-6)
    pooled = whole.reshape(50, whole.shape[1], -1).mean(-1)
    np.testing.assert_allclose(found.values.numpy(), pooled, rtol=1e-5, atol=1e-6)


def test_sparsity_at_its_ends() -> None:
    """0 for a unit that always answers alike, 1 for a unit that answers once."""

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.act(x)
            return y

    x = torch.zeros(20, 2)
    x[:, 0], x[3, 1] = 2.0, 5.0
    net = patchclamp.open(Given().eval(), x[:3])
    table = Activity().run(net, material(x), net.taps("act"))[0].table
    assert table["sparsity"].to_list() == pytest.approx([0.0, 1.0])


def test_correlations_equal_those_of_numpy() -> None:
    values = torch.randn(80, 6, generator=torch.Generator().manual_seed(5))
    values[:, 1] = -3 * values[:, 0] + 0.5 * values[:, 1] + 100
    result = Redundancy(limit=0.1).run(values)
    expected = np.corrcoef(values.double().numpy().T)
    for a, b, c in result.pairs.iter_rows():
        assert c == pytest.approx(expected[a, b], abs=1e-4)
    upper = np.abs(np.triu(expected, 1))
    assert result.closest == pytest.approx(upper.max(), abs=1e-4)
    assert result.num_pairs == int((upper >= 0.1).sum())


@pytest.mark.parametrize(("num", "size"), [(16, 2), (17, 4), (5, 9), (1, 1), (32, 1)])
def test_correlated_groups_part_the_units(num: int, size: int) -> None:
    values = torch.randn(30, num)
    values[:, 0] = 1.0  # a dead unit belongs to a group as well
    groups = correlated(values, size)
    assert sorted(u for g in groups for u in g) == list(range(num))
    assert [len(g) for g in groups[:-1]] == [size] * (len(groups) - 1)
    assert len(groups) == -(-num // size)


def test_correlated_groups_hold_the_units_that_go_together() -> None:
    base = torch.randn(200, 4)
    values = torch.cat([base, -2 * base + 0.01 * torch.randn(200, 4)], 1)
    assert sorted(correlated(values, 2)) == [[0, 4], [1, 5], [2, 6], [3, 7]]


# ---- performance ---------------------------------------------------------------


def test_accuracy_and_confusion_by_hand() -> None:
    guess, labels = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0, 1, 2, 2, 1])
    result = accuracy(nn.functional.one_hot(guess, 4).float(), labels)
    assert result.value == pytest.approx(3 / 5)
    assert result.baseline.mean == pytest.approx(2 / 5)
    assert result.per_class == {0: (1, 1), 1: (1, 2), 2: (1, 2)}
    assert result.confusion is not None
    assert result.confusion.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_the_calibration_error_by_hand() -> None:
    confidence = torch.tensor([0.6, 0.9, 0.6, 0.9])
    right = torch.tensor([True, True, False, True])
    result = Calibration(bins=2).judge(confidence, right)
    assert result.error == pytest.approx((0.1 * 2 + 0.1 * 2) / 4)
    assert result.confidence == pytest.approx([0.6, 0.9])
    assert result.accuracy == [0.5, 1.0]
    assert result.count == [2, 2]


def test_the_token_loss_of_a_padded_row_is_that_of_the_row_alone() -> None:
    logits, tokens = torch.randn(1, 6, 9), torch.randint(0, 9, (1, 6))
    alone = next_token_loss(logits[:, :4], tokens[:, :4], None)
    by_hand = -logits[0, :3].log_softmax(-1)[torch.arange(3), tokens[0, 1:4]].mean()
    assert float(alone[0]) == pytest.approx(float(by_hand), abs=1e-6)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    assert torch.allclose(next_token_loss(logits, tokens, mask), alone)


# ---- compute --------------------------------------------------------------------


class Counted(nn.Module):
    """A convolution and a linear layer. Shapes: (row, 2, 6, 6) to (row, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(3 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.features(x).flatten(1))
        return y


def context(net: Net, rows: Material) -> Context:
    return Context(
        net=net,
        material=rows,
        score=score_for(net, rows),
        budget=Budget(60.0),
        progress=SILENT,
        seed=0,
        command="",
        model_hash="",
    )


def test_compute_equals_the_count_by_hand() -> None:
    rows = 4
    x = torch.randn(rows, 2, 6, 6)
    ctx = context(patchclamp.open(Counted().eval(), x), material(x))
    conv, head = 3 * 36 * 2 * 9, 3 * 36 * 5  # multiply-adds of one row
    found = compute_by_module(ctx)
    assert found[""] == rows * (conv + head)
    assert found["features"] == found["features.0"] == rows * conv
    assert found["head"] == rows * head
    assert example_rows(ctx) == rows
    section = anatomy(ctx)
    table = next(b for b in section.blocks if isinstance(b, Table))
    shares = {row[1]: row[6] for row in table.rows}
    assert shares["features"] == pytest.approx(conv / (conv + head))
    parameters = {row[1]: row[4] for row in table.rows}
    assert parameters["head"] == 3 * 36 * 5 + 5
    facts = dict(section.blocks[0].items)  # type: ignore[union-attr]
    assert facts["compute of one example"] == f"{2 * (conv + head) / 1e6:,.2f} MFLOP"


def test_a_dataset_keeps_what_the_statistics_rest_on() -> None:
    """The material of an audit has the labels of its rows, in whatever order they come."""
    from patchclamp.audit.intake import intake

    labels = torch.arange(60) // 20
    data = Dataset(
        name="sorted",
        inputs=torch.randn(60, 2, 6, 6) + labels[:, None, None, None],
        labels=labels,
        class_names=("a", "b", "c"),
        split="test",
        licence="none needed (generated)",
        description="",
        kind=Kind.IMAGES,
    )
    net = patchclamp.open(Counted().eval(), data.inputs[:2])
    rows = intake(net, data, length=32)
    assert rows.labels is not None
    known = {bytes(x.numpy()): int(c) for x, c in zip(data.inputs, labels, strict=True)}
    made = rows.call.tensors()[0]
    assert [known[bytes(x.numpy())] for x in made] == rows.labels.tolist()
    assert rows.labels[:20].unique().numel() == 3, "every class is among the first rows"
    assert rows.hash == data.hash


def test_complete_separation_keeps_an_interval() -> None:
    """Ten of ten right is no certainty: the limit is 0.025 to the power of a tenth."""
    member = torch.arange(40) < 10
    values = torch.stack([member.double(), -member.double()], 1) + torch.rand(40, 1) * 0.1
    area = torch.tensor([1.0, 0.0], dtype=torch.float64)
    low, high = area_interval(values, member, torch.arange(40), area)
    assert low.tolist() == pytest.approx([0.025**0.1, 0.0])
    assert high.tolist() == pytest.approx([1.0, 1 - 0.025**0.1])
    pairs = torch.arange(40) // 2  # rows that hang together in twos: five groups
    assert float(area_interval(values, member, pairs, area)[0][0]) == pytest.approx(0.025**0.2)
