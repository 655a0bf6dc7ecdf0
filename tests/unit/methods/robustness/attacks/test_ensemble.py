"""The table of the ensemble: worst over attacks, row by row."""

from __future__ import annotations

import pytest
import torch

import patchclamp
from patchclamp.data import load_data
from patchclamp.methods.robustness.attacks.balls import Norm
from patchclamp.methods.robustness.attacks.classifier import Classifier
from patchclamp.methods.robustness.attacks.ensemble import CLEAN, Ensemble
from patchclamp.methods.robustness.attacks.fgsm import FGSM
from patchclamp.methods.robustness.attacks.pgd import PGD
from patchclamp.methods.robustness.nearest import NearestPoint
from tests.unit.methods.robustness.attacks.linear import difference, linear


def test_the_worst_of_each_row_and_what_broke_it() -> None:
    data = load_data("digits")
    assert data.labels is not None
    x, y = data.inputs[:40], data.labels[:40]
    net = patchclamp.open("digits-mlp")
    classifier = Classifier.open(net, x, within=(0.0, 1.0))
    weak, strong = FGSM(), PGD(num_steps=30)
    both = Ensemble(attacks=(weak, strong)).run(classifier, x, y, 0.08)
    alone = weak.run(classifier, x, y, 0.08)
    clean = classifier.answers(x, torch.arange(40)).argmax(1)
    by = [row.broken_by for row in both.table]
    assert {"fgsm ce", "pgd ce", CLEAN, None} == set(by)
    for i, row in enumerate(both.table):
        assert (row.broken_by == CLEAN) is bool(clean[i] != y[i])
        assert (row.broken_by in (CLEAN, "fgsm ce")) is bool(alone.is_broken[i])
        assert (row.margin < 0) is (row.broken_by is not None) is (row.answer != row.label)
    first, second = both.tried
    assert first.num_rows == int((clean == y).sum())
    assert second.num_rows == first.num_rows - first.num_broken
    assert both.accuracy == pytest.approx(by.count(None) / 40)
    assert both.clean_accuracy == pytest.approx(float((clean == y).double().mean()))
    with torch.no_grad():
        assert torch.equal(net.module(both.points).argmax(1) != y, both.is_broken)


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_the_standard_ensemble_runs_for_any_number_of_classes(norm: Norm, num_classes: int) -> None:
    x = torch.rand(4, 6)
    classifier, _, labels = linear(x, num_classes, within=(0.0, 1.0))
    ensemble = Ensemble.standard(norm, num_classes, num_steps=4, num_queries=10)
    made = ensemble.run(classifier, x, labels, 1.0 if norm is Norm.L0 else 0.05, norm=norm)
    assert len(made.table) == 4
    aimed = Ensemble.standard(norm, num_classes, targeted=True, num_steps=4, num_queries=10)
    targets = (labels + 1) % num_classes
    made = aimed.run(classifier, x, labels, 1.0, norm=norm, targets=targets)
    assert all(
        row.answer == t for row, t in zip(made.table, targets, strict=True) if row.margin < 0
    )


@pytest.mark.parametrize(("norm", "dual"), [(Norm.LINF, 1), (Norm.L2, 2)])
def test_nearest_points_of_a_linear_classifier(norm: Norm, dual: int) -> None:
    """The distance to a plane is the margin over the dual norm of the weights."""
    x = torch.rand(10, 6)
    classifier, layer, labels = linear(x, seed=2)
    w, b = difference(layer, labels)
    exact = (((x * w).sum(1) + b) / w.norm(dual, dim=1)).double()
    found = NearestPoint(max_radius=2.0, num_queries=4, num_steps=10).run(
        classifier, x, labels, norm=norm
    )
    assert bool((found.radius >= exact - 1e-6).all())
    assert bool((found.radius <= 1.03 * exact + 1e-4).all())
    short = NearestPoint(max_radius=0.5 * float(exact.min()), num_queries=4, num_steps=10)
    nothing = short.run(classifier, x, labels, norm=norm)
    assert bool(nothing.radius.isinf().all())
    assert torch.equal(nothing.points, x)
    assert nothing.accuracy(0.1) == 1
    wrong = short.run(classifier, x, 1 - labels, norm=norm)
    assert bool((wrong.radius == 0).all())


def test_fewest_elements_of_a_linear_classifier() -> None:
    x = torch.rand(10, 6)
    classifier, layer, labels = linear(x, seed=2, within=(0.0, 1.0))
    w, b = difference(layer, labels)
    gains = (w.abs() * torch.where(w > 0, x, 1 - x)).sort(1, descending=True).values.cumsum(1)
    margin = (x * w).sum(1) + b
    exact = (gains <= margin[:, None]).sum(1).double() + 1
    exact[exact > 6] = torch.inf
    found = NearestPoint(max_radius=6, num_queries=50).run(classifier, x, labels, norm=Norm.L0)
    assert torch.equal(found.radius, exact)
