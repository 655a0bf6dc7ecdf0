"""Audits of tests make few maps and attacks: their sections have tests of their own."""

from __future__ import annotations

import pytest

from patchclamp.audit.sections import attribution, robustness


@pytest.fixture(autouse=True)
def _small_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "_IMAGES", ("gradient",))
    monkeypatch.setattr(attribution, "_OTHERS", ("gradient",))
    monkeypatch.setattr(attribution, "_ROWS", 6)
    monkeypatch.setattr(attribution, "_PLANS", ((6, 2),))
    monkeypatch.setattr(attribution, "_planted", lambda ctx, seconds: {})
    monkeypatch.setattr(robustness, "_RADII", (0.02, 0.1))
    monkeypatch.setattr(robustness, "_MAX_ROWS", 4)
    monkeypatch.setattr(robustness, "_MIN_ROWS", 2)
    monkeypatch.setattr(robustness, "_PLANS", ((3, 10, 50),))
