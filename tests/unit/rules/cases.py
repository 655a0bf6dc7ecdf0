"""Every nonlinear rule on small shapes, boxes of all kinds for it, and what must hold of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.rules.base import Interval, Lines, Nonlinear, Relaxation, gamma
from patchclamp.rules.convex import (
    ELU,
    Exp,
    Log,
    Reciprocal,
    Rsqrt,
    Softplus,
    Sqrt,
    Square,
    power,
)
from patchclamp.rules.gelu import Gelu, GeluTanh, HardSwish, Mish, SiLU
from patchclamp.rules.leaky import Abs, Clamp, HardSigmoid, LeakyReLU, PReLU
from patchclamp.rules.maximum import AmaxAxis, Maximum, MaxPool, Minimum
from patchclamp.rules.products import MatMul, Mul
from patchclamp.rules.s_shaped import Atan, Erf, Sigmoid, Softsign, Tanh
from patchclamp.rules.sine import Cos, Sin
from patchclamp.rules.softmax import Softmax

SHAPE = (5,)
KINDS = ("tiny", "usual", "wide", "positive", "negative", "point", "far", "mixed")


@dataclass(frozen=True)
class Case:
    """One rule.

    Attributes:
        domain: "real", "positive", "negative", or "not negative".
        limit: the largest |x| that it is tried with.
    """

    name: str
    rule: Nonlinear
    domain: str = "real"
    limit: float = 1e30

    def __repr__(self) -> str:
        return self.name


WEIGHT = torch.tensor([0.25, 1.5, -0.5, 0.0, 1.0])
SMOOTH = (Sigmoid, Tanh, Atan, Softsign, Erf, Gelu, GeluTanh, SiLU, Mish, HardSwish, Sin, Cos)
UNARY = [
    *(Case(kind.__name__, kind(SHAPE)) for kind in SMOOTH),
    Case("LeakyReLU", LeakyReLU(SHAPE, 0.1)),
    Case("LeakyReLU steep", LeakyReLU(SHAPE, 1.5)),
    Case("LeakyReLU falling", LeakyReLU(SHAPE, -0.5)),
    Case("PReLU", PReLU(SHAPE, WEIGHT)),
    Case("ReLU6", Clamp(SHAPE, 0.0, 6.0)),
    Case("Hardtanh", Clamp(SHAPE, -1.0, 1.0)),
    Case("Clamp below", Clamp(SHAPE, low=0.5)),
    Case("HardSigmoid", HardSigmoid(SHAPE)),
    Case("Abs", Abs(SHAPE)),
    Case("Exp", Exp(SHAPE), limit=30.0),
    Case("Softplus", Softplus(SHAPE)),
    Case("Softplus beta", Softplus(SHAPE, 3.0, 5.0)),
    Case("ELU", ELU(SHAPE)),
    Case("CELU", ELU(SHAPE, 0.5, 0.5)),
    Case("ELU low", ELU(SHAPE, 0.5)),
    Case("Square", Square(SHAPE), limit=1e10),
    Case("Cube", power(SHAPE, 3), limit=1e8),
    Case("Power 4", power(SHAPE, 4), limit=1e6),
    Case("Power 5", power(SHAPE, 5), limit=1e5),
    Case("Log", Log(SHAPE), "positive"),
    Case("Sqrt", Sqrt(SHAPE), "not negative"),
    Case("Rsqrt", Rsqrt(SHAPE), "positive", 1e20),
    Case("Reciprocal", Reciprocal(SHAPE), "positive", 1e15),
    Case("Reciprocal negative", Reciprocal(SHAPE), "negative", 1e15),
    Case("Power -2", power(SHAPE, -2), "negative", 1e8),
    Case("Power -3", power(SHAPE, -3), "negative", 1e8),
]
OTHERS = [
    Case("Mul", Mul(SHAPE), limit=1e15),
    Case("MatMul", MatMul(((2, 3, 4), (2, 4, 2))), limit=1e15),
    Case("Softmax", Softmax((2, 4))),
    Case("Softmax of 2", Softmax((2, 3), 0)),
    Case("Softmax of 9", Softmax((9, 2), -2)),
    Case("Softmax of 1", Softmax((3, 1))),
    Case("Maximum", Maximum(SHAPE)),
    Case("Minimum", Minimum(SHAPE)),
    Case("AmaxAxis", AmaxAxis((3, 4), 0)),
    Case("AmaxAxis kept", AmaxAxis((2, 3, 2), -2, keep=True)),
    Case("MaxPool 1d", MaxPool((2, 7), (3,), (2,), (1,), (1,))),
    Case("MaxPool", MaxPool((2, 5, 6), (3, 2), (2, 2), (1, 0), (1, 2), ceil=True)),
    Case("MaxPool overlapping", MaxPool((1, 4, 4), (3, 3), (1, 1), (1, 1), (1, 1))),
]
CASES = UNARY + OTHERS


def boxes_of(case: Case, kind: str, dtype: torch.dtype, num: int = 6) -> tuple[Interval, ...]:
    """Random boxes of one kind, from torch's generator: (num, *shape) for each argument."""
    return tuple(_box(case, kind, dtype, (num, *shape)) for shape in case.rule.inputs)


def _box(case: Case, kind: str, dtype: torch.dtype, size: tuple[int, ...]) -> Interval:
    scale = {
        "tiny": 1e-4,
        "usual": 1.0,
        "wide": 12.0,
        "positive": 2.0,
        "negative": 2.0,
        "point": 0.0,
        "far": 3.0,
    }
    centre = torch.randn(size, dtype=torch.float64) * 2
    if kind == "mixed":
        radius = torch.exp(torch.randn(size, dtype=torch.float64) * 3)
        centre = centre * torch.exp(torch.randn(size, dtype=torch.float64) * 2)
    else:
        radius = torch.rand(size, dtype=torch.float64) * scale[kind]
    if kind == "far":
        factor = 10.0 ** torch.randint(1, 25, size).double()
        centre, radius = centre * factor, radius * factor
    lower, upper = centre - radius, centre + radius
    if kind == "positive":
        lower, upper = lower - lower.clamp(max=0), upper - lower.clamp(max=0)
    if kind == "negative":
        lower, upper = lower - upper.clamp(min=0), upper - upper.clamp(min=0)
    return _inside(case, lower, upper, dtype)


def _inside(case: Case, lower: Tensor, upper: Tensor, dtype: torch.dtype) -> Interval:
    """Moved to where the operator is defined, and rounded to the precision in use."""
    lower, upper = lower.clamp(-case.limit, case.limit), upper.clamp(-case.limit, case.limit)
    if case.domain != "real":
        least = 0.0 if case.domain == "not negative" else 1e-2
        if least and case.limit < 1e30:
            least = max(least, 1 / case.limit)
        # the width is kept where the limit allows it
        shift = (least - lower).clamp(min=0)
        lower, upper = (lower + shift).clamp(min=least), (upper + shift).clamp(max=case.limit)
        upper = torch.maximum(lower, upper)
        if case.domain == "negative":
            lower, upper = -upper, -lower
    lower, upper = lower.to(dtype), upper.to(dtype)
    return Interval(lower, torch.maximum(lower, upper))


def sampled(box: Interval, num: int) -> Tensor:
    """(num, N, *shape) in float64: a third of all coordinates at an end of their interval."""
    lower, upper = (side.double() for side in box)
    share = torch.rand(num, *lower.shape, dtype=torch.float64)
    share = torch.where(torch.rand_like(share) < 0.3, share.round(), share)
    share[0], share[1] = 0, 1
    return (lower + share * (upper - lower)).clamp(lower, upper)


def exact(rule: Nonlinear, points: tuple[Tensor, ...]) -> Tensor:
    """The operator in float64 on samples (num, N, *shape)."""
    flat = (p.flatten(0, 1) for p in points)
    return rule.forward(*flat).unflatten(0, points[0].shape[:2])


def random_slopes(rule: Nonlinear, num: int, dtype: torch.dtype) -> Tensor:
    """For three rows; a quarter of them at 0 or 1."""
    slopes = torch.rand(rule.num_slopes, num, 3, *rule.output, dtype=dtype)
    return torch.where(torch.rand_like(slopes) < 0.25, slopes.round(), slopes)


def slack_of_checking(value: Tensor) -> Tensor:
    """What float64 can lose in a comparison: none of the rules is allowed any of its own."""
    return value.abs() * 1e-15 + 1e-300


def assert_interval_holds(rule: Nonlinear, boxes: tuple[Interval, ...], value: Tensor) -> None:
    made = rule.interval(*boxes)
    slack = slack_of_checking(value)
    assert bool((made.lower.double() <= value + slack).all())
    assert bool((made.upper.double() >= value - slack).all())


def assert_lines_hold(lines: Lines, x: Tensor, value: Tensor) -> None:
    """Line by line, without any allowance but that of float64 itself."""
    for slope, intercept, sign in (
        (lines.below_slope, lines.below, 1),
        (lines.above_slope, lines.above, -1),
    ):
        slope = slope.double()
        constant = torch.zeros_like(slope) if intercept is None else intercept.double()
        term = slope * x[:, :, None]
        gap = sign * (value[:, :, None] - term - constant)
        slack = (term.abs() + constant.abs() + value.abs()[:, :, None]) * 4e-16 + 1e-300
        assert bool((gap >= -slack).all()), float(gap.min())


def assert_rows_hold(
    relaxation: Relaxation,
    boxes: tuple[Interval, ...],
    points: tuple[Tensor, ...],
    value: Tensor,
    A: Tensor,
) -> None:
    """Rows and constant stay below A . f(x), but for what rounding may do to A's own algebra."""
    rows, constant = relaxation.backward(A)
    size = relaxation.magnitude(*boxes)
    error = gamma(relaxation.num_terms + 4, A.dtype)
    allowed = error * (A.abs().flatten(2) @ size.flatten(1)[:, :, None])[:, :, 0].double()
    total = torch.einsum("nri,sni->snr", A.double().flatten(2), value.flatten(2))
    for row, point in zip(rows, points, strict=True):
        total = total - torch.einsum("nri,sni->snr", row.double().flatten(2), point.flatten(2))
    gap = total - constant.double()
    assert bool((gap >= -allowed - 1e-300).all()), float((gap + allowed).min())


def hold_everything(
    case: Case, boxes: tuple[Interval, ...], num_samples: int, dtype: torch.dtype
) -> None:
    """Interval, lines for the default and for random slopes, and rows, on samples."""
    rule = case.rule
    points = tuple(sampled(box, num_samples) for box in boxes)
    value = exact(rule, points)
    assert_interval_holds(rule, boxes, value)
    num = boxes[0].lower.shape[0]
    A = torch.randn(num, 3, *rule.output, dtype=dtype)
    choices: list[Callable[[], Tensor | None]] = [lambda: None]
    if rule.num_slopes:
        choices.append(lambda: random_slopes(rule, num, dtype))
    for choice in choices:
        relaxation = rule.relax(boxes, choice())
        if isinstance(relaxation, Lines):
            assert_lines_hold(relaxation, points[0], value)
        assert_rows_hold(relaxation, boxes, points, value, A)
