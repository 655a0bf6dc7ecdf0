"""Indirect objects in SmolLM2: a small faithful circuit, on other names and templates, again."""

from __future__ import annotations

import time

import pytest

import patchclamp
from patchclamp.core.circuit import Circuit
from patchclamp.methods.circuits.finding.search import CircuitSearch, again, shipped_task

pytestmark = pytest.mark.slow


def test_indirect_objects() -> None:
    net = patchclamp.open("smollm2")
    began = time.process_time()
    task = shipped_task(net, "indirect objects", num=16, num_held_out=16)
    search = CircuitSearch(fractions=(0.01, 0.02, 0.03, 0.05, 1.0), num_random=2, verify=16)
    found = search.run(net, task)
    assert time.process_time() - began < 600  # CPU: under ten minutes even on one core
    for curve in (found.train, found.held_out):
        point = curve.size_at(0.8)
        assert point is not None
        assert point.share <= 0.05
        assert point.random_high < 0.2
    assert found.circuit.num_edges <= 0.05 * found.circuit.num_possible
    assert found.parts.faithfulness > 0.8  # of the kept circuit, on held-out pairs
    repeated = again(net, Circuit.from_json(found.circuit.to_json()))
    assert repeated.same_edges == 1
    assert repeated.largest_change < 1e-4
