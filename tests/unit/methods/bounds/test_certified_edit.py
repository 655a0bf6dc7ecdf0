"""Certified edits: closed forms, edits that do nothing, and edits that change the class."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchclamp
from patchclamp.core.edit_kinds import Mean, Zero
from patchclamp.core.errors import EditError, InputError, SiteError
from patchclamp.core.findings import Verdict
from patchclamp.methods.bounds.certified_edit import CertifiedEdit
from patchclamp.net import Net

RADIUS = 0.05


def network(*, deep: bool = False) -> tuple[Net, nn.Sequential, Tensor]:
    """Unit 0 is on everywhere near the data, unit 3 is read by nothing."""
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)]
    module = nn.Sequential(*layers, nn.ReLU(), nn.Linear(4, 3)) if deep else nn.Sequential(*layers)
    with torch.no_grad():
        layers[0].bias[0] = 3.0  # type: ignore[index, operator]  # a parameter
        layers[2].weight[:, 3] = 0.0  # type: ignore[index, operator]  # a parameter
    x = torch.rand(4, 3)
    return patchclamp.open(module.eval(), x), module, x


def held(unit: int, value: float) -> Mean:
    return Mean(site="1", values=torch.full((1, 1), value), where={"unit": [unit]})


def test_the_shift_of_a_unit_that_is_on_is_the_closed_form() -> None:
    """relu(w . x + b) is w . x + b in the box: the margin moves by (v - w . x - b)(u_c - u_j)."""
    net, module, x = network()
    found = CertifiedEdit().run(net, x, RADIUS, [held(0, 2.5)])
    w, b = module[0].weight[0].detach().double(), module[0].bias[0].detach().double()
    u = module[2].weight[:, 0].detach().double()
    for i, box in found.boxes.items():
        middle, reach = float(w @ x[i].double() + b), RADIUS * float(w.abs().sum())
        ends = [2.5 - middle - reach, 2.5 - middle + reach]
        factors = [float(u[box.label] - u[j]) for j in range(4) if j != box.label]
        exact = [e * f for e in ends for f in factors]
        assert box.shift.low == pytest.approx(min(exact), abs=1e-7)
        assert box.shift.high == pytest.approx(max(exact), abs=1e-7)
        assert box.shift.low <= min(exact) + 1e-15
        assert box.shift.high >= max(exact) - 1e-15
    assert len(found.boxes) == 4


def test_an_edit_of_a_unit_that_nothing_reads_is_proved_to_do_nothing() -> None:
    net, _, x = network()
    found = CertifiedEdit().run(net, x, 1e-3, [held(3, 50.0)])
    assert found.largest_shift < 1e-12
    for box in found.boxes.values():
        assert box.verdict is Verdict.HOLDS
        assert box.edited == pytest.approx(box.plain, abs=1e-12)


def test_an_edit_that_changes_the_class_is_shown_with_an_input() -> None:
    net, module, x = network()
    label = int(net.run(x[:1]).output.argmax(1))
    most = int(module[2].weight[:, 0].argmax())
    edit = held(0, 1e3 if most != label else -1e3)
    found = CertifiedEdit().run(net, x[:1], RADIUS, [edit])
    assert found.boxes[0].verdict is Verdict.DOES_NOT_HOLD
    point = found.points[0][None]
    assert float((point - x[:1]).abs().max()) <= RADIUS * 1.0001
    assert int(net.run(point).output.argmax(1)) == label
    assert int(net.run(point, edits=[edit]).output.argmax(1)) != label


@pytest.mark.parametrize("deep", [False, True])
def test_what_is_proved_holds_on_samples(*, deep: bool) -> None:
    net, _, x = network(deep=deep)
    edits = [held(0, 2.9), Zero(site="1", where={"unit": [5]})]
    found = CertifiedEdit().run(net, x, RADIUS, edits)
    generator = torch.Generator().manual_seed(0)
    for i, box in found.boxes.items():
        moves = torch.rand(1000, 3, generator=generator) * 2 - 1
        moves[:500] = moves[:500].sign()
        near = x[i : i + 1] + 0.9999 * RADIUS * moves
        plain = net.run(near).output.double()
        edited = net.run(near, edits=edits).output.double()
        others = [j for j in range(plain.shape[1]) if j != box.label]
        margins = [(y[:, [box.label]] - y)[:, others] for y in (plain, edited)]
        assert box.plain <= float(margins[0].min()) + 1e-5
        assert box.edited <= float(margins[1].min()) + 1e-5
        shift = margins[1] - margins[0]
        assert box.shift.low - 1e-5 <= float(shift.min())
        assert float(shift.max()) <= box.shift.high + 1e-5


def test_too_large_a_box_is_unknown() -> None:
    """The plain class changes in it, and the edit does not: nothing can be said either way."""
    net, _, x = network()
    found = CertifiedEdit().run(net, x, 100.0, [held(3, 50.0)])
    assert {b.verdict for b in found.boxes.values()} == {Verdict.UNKNOWN}


def test_no_time_leaves_rows_out() -> None:
    net, _, x = network()
    found = CertifiedEdit().run(net, x, RADIUS, [held(0, 1.0)], seconds=0.0)
    assert found.boxes == {}
    assert found.left_out == (0, 1, 2, 3)
    assert found.largest_shift == 0.0


def test_what_cannot_be_certified_is_refused() -> None:
    net, _, x = network()
    method = CertifiedEdit()
    with pytest.raises(EditError, match="no edits"):
        method.run(net, x, RADIUS, [])
    with pytest.raises(EditError, match="cannot be bounded"):
        method.run(net, x, RADIUS, [Mean(site="1", where={"unit": [0]})])
    with pytest.raises(SiteError):
        method.run(net, x, RADIUS, [Zero(site="nowhere")])
    with pytest.raises(InputError, match="radii"):
        method.run(net, x, -1.0, [held(0, 1.0)])
