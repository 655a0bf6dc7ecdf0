"""One example's path: what is kept, closed and computed again."""

from __future__ import annotations

import math

import torch

from patchclamp.methods.attribution.gradients.path import Path, Point


def walked(kept: int, most: int, tolerance: float = 0.01) -> tuple[Path, int, list[float]]:
    """A path along a wave that is sharp near its start; most gradients held, points asked for."""
    path = Path(0, torch.zeros(1, dtype=torch.float64), kept)
    asked = [i / 4 for i in range(5)]
    seen: list[float] = []
    held = 0
    while asked:
        for at in asked:
            slope = 1 + 0.9 * math.cos(40 * math.sqrt(at + 0.01)) * 20 / math.sqrt(at + 0.01)
            score = at + 0.9 * math.sin(40 * math.sqrt(at + 0.01))
            path.add(Point(at, score, slope), torch.tensor([slope], dtype=torch.float64))
            held = max(held, len(path._grads))
            seen.append(at)
        asked = path.refined(tolerance, most)
    return path, held, seen


CHANGE = 1 + 0.9 * (math.sin(40 * math.sqrt(1.01)) - math.sin(4))


def test_with_all_gradients_kept_none_is_computed_twice() -> None:
    path, _, seen = walked(kept=500, most=500)
    assert len(set(seen)) == len(seen) == path.num
    assert abs(float(path.total) - CHANGE) <= path.unresolved <= 0.01 * abs(CHANGE)
    assert not path._grads


def test_few_are_kept_and_the_total_is_still_that_of_its_panels() -> None:
    path, held, seen = walked(kept=8, most=500, tolerance=0.05)
    assert held <= 11  # and the ends and the middle of the panel in hand
    assert len(set(seen)) < len(seen)  # closed panels were opened again
    assert path.unresolved <= 0.05 * abs(CHANGE)
    panels = sum(p.width * (p.left.slope + p.right.slope) / 2 for p in path.closed)
    assert math.isclose(float(path.total), panels, rel_tol=1e-12)
    assert math.isclose(sum(p.width for p in path.closed), 1.0)


def test_no_more_gradients_than_allowed() -> None:
    for most in (5, 6, 17, 40):
        for kept in (3, 100):
            path, _, seen = walked(kept=kept, most=most, tolerance=1e-9)
            assert path.num == len(seen) <= most
            assert math.isclose(sum(p.width for p in path.closed), 1.0)


def test_more_gradients_leave_less_unresolved() -> None:
    rough, fine = (walked(kept=100, most=most, tolerance=1e-9)[0] for most in (30, 120))
    assert fine.unresolved < rough.unresolved / 8
