"""Sets: what their hulls hold and what linear functions take at least, by brute force."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from patchclamp.bounding.sets import (
    Around,
    Ball,
    Box,
    HalfSpaces,
    Patches,
    PerturbedSet,
    Shaped,
    Substitutions,
)
from patchclamp.core.errors import BoundError

N, R = 3, 5


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def points_in(ball: Ball, num: int) -> Tensor:
    """(num, N, *shape), the surface of the ball included."""
    step = drawn(num, *ball.centre.shape)
    length = torch.linalg.vector_norm(step.flatten(2), ball.norm, dim=2)
    share = torch.rand(num, N, dtype=torch.float64)
    share[: num // 2] = 1
    radius = torch.as_tensor(ball.radius, dtype=torch.float64).expand(N)
    scale = (radius * share / length).reshape(num, N, *(1,) * (ball.centre.ndim - 1))
    x = ball.centre + step * scale
    if ball.lower is None or ball.upper is None:
        return x
    return torch.minimum(torch.maximum(x, ball.lower), ball.upper)  # nearer to the centre


def values(A: Tensor, x: Tensor) -> Tensor:
    """A (N, R, *shape) on points (num, N, *shape): (num, N, R)."""
    return torch.einsum("nri,sni->snr", A.flatten(2), x.flatten(2))


def assert_sound(given: PerturbedSet, x: Tensor, A: Tensor) -> None:
    low, high = given.hull()
    assert bool(((x >= low - 1e-12) & (x <= high + 1e-12)).all())
    assert bool((values(A, x) >= given.minimum(A) - 1e-12).all())


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("limited", [False, True])
def test_ball(norm: int, limited: bool) -> None:
    """Sound on samples; and reached, by the dual norm or by a long projected descent."""
    centre, radius = drawn(N, 2, 3), torch.tensor([0.0, 0.7, 2.0], dtype=torch.float64)
    sides = (
        (centre - torch.rand(N, 2, 3), centre + torch.rand(N, 2, 3)) if limited else (None, None)
    )
    ball = Ball(centre, radius, norm, *sides)
    A = drawn(N, R, 2, 3)
    A[0, 0], A[1, 1] = 0, 0
    assert_sound(ball, points_in(ball, 2000), A)
    if limited:
        wanted = limited_minimum(ball, A)
    else:
        dual = torch.linalg.vector_norm(A.flatten(2), 2 if norm == 2 else float("inf"), dim=2)
        wanted = values(A, centre[None])[0] - radius[:, None] * dual
    torch.testing.assert_close(ball.minimum(A), wanted, rtol=1e-9, atol=1e-9)


def limited_minimum(ball: Ball, A: Tensor) -> Tensor:
    """By another way than the set's: L1 as a linear program, L2 by a fine walk along its path."""
    assert ball.lower is not None
    assert ball.upper is not None
    made = torch.zeros(N, R, dtype=torch.float64)
    radius = torch.as_tensor(ball.radius)
    for n, r in product(range(N), range(R)):
        a, c = A[n, r].flatten().numpy(), ball.centre[n].flatten().numpy()
        down, up = ball.lower[n].flatten().numpy() - c, ball.upper[n].flatten().numpy() - c
        if ball.norm == 1:  # d = p - q with both at least 0
            found = linprog(
                np.r_[a, -a],
                A_ub=np.ones((1, 2 * len(a))),
                b_ub=[float(radius[n])],
                bounds=[*((0, u) for u in up), *((0, -d) for d in down)],
            )
            made[n, r] = found.fun + a @ c
            continue
        low, high = 0.0, 1e9  # d(t) = clip(-t a) is as long as the radius
        for _ in range(200):
            t = (low + high) / 2
            inside = np.linalg.norm(np.clip(-t * a, down, up)) <= float(radius[n])
            low, high = (t, high) if inside else (low, t)
        made[n, r] = a @ (c + np.clip(-low * a, down, up))
    return made


def test_ball_of_every_size_is_within_its_box() -> None:
    """A large ball within limits is the box; L1 lies in L2 lies in the box."""
    centre, A = drawn(N, 4), drawn(N, R, 4)
    sides = centre - 0.3, centre + 0.5
    box = Box(*sides).minimum(A)
    for norm in (1, 2):
        torch.testing.assert_close(Ball(centre, 100.0, norm, *sides).minimum(A), box)
    one, two = (Ball(centre, 0.4, norm).minimum(A) for norm in (1, 2))
    square = Box(centre - 0.4, centre + 0.4).minimum(A)
    assert bool(((one > two) & (two > square)).all())


@pytest.mark.parametrize(
    ("size", "num", "stride"), [((1, 1), 2, 1), ((2, 2), 1, 1), ((2, 2), 2, 2)]
)
def test_patches_against_every_choice(size: tuple[int, int], num: int, stride: int) -> None:
    """Single pixels, one patch, and patches of a grid: exact."""
    centre = torch.rand(N, 2, 4, 4, dtype=torch.float64)
    given = Patches(centre, torch.zeros_like(centre), torch.ones_like(centre), size, num, stride)
    A = drawn(N, R, 2, 4, 4)
    wanted = patched_minimum(given, A)
    torch.testing.assert_close(given.minimum(A), wanted, rtol=1e-9, atol=1e-9)


def patched_minimum(given: Patches, A: Tensor) -> Tensor:
    free = torch.minimum(A * given.lower[:, None], A * given.upper[:, None])
    own = A * given.centre[:, None]
    best = own.flatten(2).sum(2)
    height, width = given.size
    corners = list(
        product(
            range(0, 4 - height + 1, given.stride),
            range(0, 4 - width + 1, given.stride),
        )
    )
    for chosen in combinations(corners, given.num):
        mask = torch.zeros(4, 4, dtype=torch.bool)
        for row, column in chosen:
            mask[row : row + height, column : column + width] = True
        best = torch.minimum(best, torch.where(mask, free, own).flatten(2).sum(2))
    return best


def test_overlapping_patches_are_sound() -> None:
    """Two patches anywhere: never above the best choice, and no worse than the box."""
    centre = torch.rand(N, 1, 4, 4, dtype=torch.float64)
    given = Patches(centre, torch.zeros_like(centre), torch.ones_like(centre), (2, 2), 2)
    A = drawn(N, R, 1, 4, 4)
    made = given.minimum(A)
    assert bool((made <= patched_minimum(given, A) + 1e-12).all())
    assert bool((made >= Box(given.lower, given.upper).minimum(A) - 1e-9).all())


@pytest.mark.parametrize("num", [0, 1, 2, 3])
def test_substitutions_against_every_text(num: int) -> None:
    base, candidates = drawn(N, 3, 2), drawn(N, 3, 2, 2)
    allowed = torch.rand(N, 3, 2) < 0.7
    given = Substitutions(base, candidates, allowed, num)
    A = drawn(N, R, 3, 2)
    best = torch.full((N, R), float("inf"), dtype=torch.float64)
    low, high = torch.full_like(base, float("inf")), torch.full_like(base, -float("inf"))
    for words in product(range(-1, 2), repeat=3):
        if sum(w >= 0 for w in words) > num:
            continue
        text = base.clone()
        for position, w in enumerate(words):
            if w >= 0:
                other = allowed[:, position, w, None]
                text[:, position] = torch.where(
                    other, candidates[:, position, w], text[:, position]
                )
        best = torch.minimum(best, values(A, text[None])[0])
        low, high = torch.minimum(low, text), torch.maximum(high, text)
    torch.testing.assert_close(given.minimum(A), best, rtol=1e-9, atol=1e-9)
    for made, wanted in zip(given.hull(), (low, high), strict=True):
        torch.testing.assert_close(made, wanted)


@pytest.mark.parametrize("num", [1, 2, 4])
def test_half_spaces_against_linear_programs(num: int) -> None:
    """Never above the exact minimum; exact for one constraint, and near it for several."""
    n = 5
    lower, upper = -torch.rand(N, n, dtype=torch.float64), torch.rand(N, n, dtype=torch.float64)
    matrix = drawn(N, num, n)
    limits = torch.einsum("nmi,ni->nm", matrix, (lower + upper) / 2) + 0.1
    given = HalfSpaces(lower, upper, matrix, limits)
    A = drawn(N, R, n)
    wanted = torch.zeros(N, R, dtype=torch.float64)
    for i, r in product(range(N), range(R)):
        sides = list(zip(lower[i].tolist(), upper[i].tolist(), strict=True))
        found = linprog(A[i, r].numpy(), matrix[i].numpy(), limits[i].numpy(), bounds=sides)
        wanted[i, r] = found.fun
    made, plain = given.minimum(A), Box(lower, upper).minimum(A)
    assert bool((made <= wanted + 1e-9).all())
    closed = (made - plain).sum() / (wanted - plain).sum()
    assert float(closed) > (1 - 1e-6 if num == 1 else 0.9), closed
    low, high = given.hull()
    assert bool(((low >= lower) & (high <= upper)).all())
    assert bool((low > lower + 1e-6).any() or (high < upper - 1e-6).any())


def test_hulls_are_rounded_outwards() -> None:
    """Numbers that no sum hits exactly: the hull holds centre and radius all the same."""
    from fractions import Fraction

    centre = torch.tensor([[0.1, 1e16, -0.3]], dtype=torch.float64)
    for given in (Around(0.3).at(centre), Ball(centre, 0.3, 2), Ball(centre, 0.3, 1)):
        low, high = given.hull()
        for c, a, b in zip(centre[0].tolist(), low[0].tolist(), high[0].tolist(), strict=True):
            assert Fraction(a) <= Fraction(c) - Fraction(0.3)
            assert Fraction(b) >= Fraction(c) + Fraction(0.3)
    still = Around(0.0).at(centre)
    assert torch.equal(still.hull().lower, centre)


def test_one_example_and_another_precision() -> None:
    given = Ball(drawn(N, 4), torch.tensor([0.1, 0.2, 0.3]), 2)
    A = drawn(N, R, 4)
    for i in range(N):
        torch.testing.assert_close(given.example(i).minimum(A[i : i + 1])[0], given.minimum(A)[i])
    assert given.to(torch.float32).centre.dtype is torch.float32
    seen = Shaped(given, (1, 2, 2))
    torch.testing.assert_close(seen.minimum(A.reshape(N, R, 1, 2, 2)), given.minimum(A))
    assert seen.hull().lower.shape == (N, 1, 2, 2)


ZERO, ONE = torch.zeros(1, 4), torch.ones(1, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(ONE, ZERO), "a box is empty; got lower 1.0 above upper 0.0 at \\[0, 0\\]"),
        (lambda: Box(ZERO, ONE * float("inf")), "a box must be finite"),
        (lambda: Box(ZERO * float("nan"), ONE), "a box must be finite"),
        (lambda: Box(ZERO, torch.ones(1, 3)), "differ in shape"),
        (lambda: Ball(ZERO, -1.0), "negative radius is empty"),
        (lambda: Ball(ZERO, float("inf")), "must be finite"),
        (lambda: Ball(ZERO, 1.0, 3), "norm 1 or 2"),
        (lambda: Ball(ZERO, 1.0, 2, ONE, ONE * 2), "centre of a ball must lie within"),
        (lambda: Around(float("nan")), "a radius is finite"),
        (lambda: Around(0.1, norm=3), "a norm is 1, 2 or inf"),
        (lambda: Around(0.1, within=(1, 2)).at(ZERO), "outside the limits"),
        (lambda: Patches(ZERO, ZERO, ONE, (5,)), "patches that do not fit"),
        (lambda: Patches(ZERO, ONE, ONE * 2), "centre of patches must lie"),
        (
            lambda: HalfSpaces(ZERO, ONE, ONE[:, None], torch.tensor([[-1.0]])),
            "cuts everything off",
        ),
        (lambda: HalfSpaces(ZERO, ONE, ONE[:, None], torch.ones(1, 2)), "do not fit their box"),
        (lambda: Substitutions(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)), "different shapes"),
    ],
)
def test_refused(make: object, message: str) -> None:
    with pytest.raises(BoundError, match=message):
        make()  # type: ignore[operator]  # a function without arguments
