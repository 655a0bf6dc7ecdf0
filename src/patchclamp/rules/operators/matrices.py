"""Matrix products and convolutions; which argument is perturbed decides the rule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from patchclamp.rules import products
from patchclamp.rules.conv import Conv, TransposedConv
from patchclamp.rules.layout import Reshape, joined, moved
from patchclamp.rules.linear import LeftProduct, Linear, RightProduct
from patchclamp.rules.operators.arithmetic import add
from patchclamp.rules.operators.builder import Builder, Operand, expanded, scaled, shape_of
from patchclamp.rules.value import Value


def matmul(b: Builder, x: Operand, y: Operand) -> Value:
    """By a constant, exact; of two values, planes for every product."""
    if isinstance(x, Value) and isinstance(y, Tensor):
        y = b.constant(y)
        if y.ndim == 1:
            product = b.add(Linear(y[None], None, x.shape[:-1]), x)
            return b.add(Reshape(product.shape, product.shape[:-1]), product)
        if y.ndim == 2:
            return b.add(Linear(y.T.contiguous(), None, x.shape[:-1]), x)
        lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        return b.add(
            RightProduct(y, (*lead, *x.shape[-2:])), expanded(b, x, (*lead, *x.shape[-2:]))
        )
    if isinstance(x, Tensor) and isinstance(y, Value) and x.ndim >= 2 and len(y.shape) >= 2:
        x = b.constant(x)
        lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        return b.add(LeftProduct(x, (*lead, *y.shape[-2:])), expanded(b, y, (*lead, *y.shape[-2:])))
    if isinstance(x, Value) and isinstance(y, Value) and min(len(x.shape), len(y.shape)) >= 2:
        lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        x = expanded(b, x, (*lead, *x.shape[-2:]))
        y = expanded(b, y, (*lead, *y.shape[-2:]))
        return b.add(products.MatMul((x.shape, y.shape)), x, y)
    return _with_vector(b, x, y)


def _with_vector(b: Builder, x: Operand, y: Operand) -> Value:
    """Where one argument has a single axis: as a matrix of one row or one column."""
    if min(len(shape_of(x)), len(shape_of(y))) != 1:
        raise b.refuse(f"a product of shapes {shape_of(x)} and {shape_of(y)}")
    row, column = len(shape_of(x)) == 1, len(shape_of(y)) == 1
    product = matmul(b, _unsqueezed(b, x, 0) if row else x, _unsqueezed(b, y, 1) if column else y)
    shape = list(product.shape)
    if column:
        del shape[-1]
    if row:
        del shape[-1 if column else -2]
    return b.add(Reshape(product.shape, tuple(shape)), product)


def _unsqueezed(b: Builder, x: Operand, axis: int) -> Operand:
    if isinstance(x, Value):
        return b.add(moved(x.shape, lambda t: t.unsqueeze(axis)), x)
    return b.constant(x).unsqueeze(axis)


def linear(b: Builder, x: Operand, weight: Operand, bias: Operand | None = None) -> Value:
    """Exact where the weight is constant; else as a product of matrices."""
    if isinstance(x, Value) and isinstance(weight, Tensor) and not isinstance(bias, Value):
        offset = None if bias is None else b.constant(bias)
        return b.add(Linear(b.constant(weight), offset, x.shape[:-1]), x)
    if not isinstance(x, Value) and not isinstance(weight, Value):  # the bias alone
        fixed = torch.nn.functional.linear(b.constant(x), b.constant(weight))
        return add(b, fixed, 0.0 if bias is None else bias)
    turned = transposed(b, weight) if isinstance(weight, Value) else torch.as_tensor(weight).mT
    product = matmul(b, x, turned)
    return product if bias is None else add(b, product, bias)


def transposed(b: Builder, x: Value) -> Value:
    """With the last two axes swapped."""
    return b.add(moved(x.shape, lambda t: t.mT), x)


def addmm(
    b: Builder, bias: Operand, x: Operand, y: Operand, *, beta: float = 1, alpha: float = 1
) -> Value:
    """A product of matrices and a sum."""
    if not isinstance(x, Value) and not isinstance(y, Value):  # the sum alone
        return add(b, b.constant(x) @ b.constant(y) * alpha, bias, alpha=beta)
    product = matmul(b, x, y)
    if beta != 1:
        bias = scaled(b, bias, beta, None) if isinstance(bias, Value) else b.constant(bias) * beta
    return add(b, product if alpha == 1 else scaled(b, product, alpha, None), bias)


def einsum(b: Builder, equation: str, operands: Sequence[Operand], **kwargs: object) -> Value:
    """Of two arguments: a product of matrices between moves of axes."""
    left, _, right = equation.replace(" ", "").partition("->")
    letters = left.split(",")
    plain = "->" in equation and "." not in equation and len(letters) == len(operands) == 2
    if not plain or any(len(set(part)) < len(part) for part in (*letters, right)):
        raise b.refuse(f"the einsum '{equation}'")
    x, y = letters
    both = [c for c in x if c in y]
    alone = [c for c in x + y if c not in both and c not in right]
    if alone:
        raise b.refuse(f"the einsum '{equation}', which sums one argument over '{alone[0]}'")
    batch, inner = [c for c in both if c in right], [c for c in both if c not in right]
    rows, columns = [c for c in x if c not in both], [c for c in y if c not in both]
    sizes = {**dict(zip(y, shape_of(operands[1]), strict=True))}
    sizes.update(zip(x, shape_of(operands[0]), strict=True))
    product = matmul(
        b,
        _grouped(b, operands[0], x, (batch, rows, inner), sizes),
        _grouped(b, operands[1], y, (batch, inner, columns), sizes),
    )
    made = [*batch, *rows, *columns]
    order = [made.index(c) for c in right]
    return b.add(
        moved(
            product.shape, lambda t: t.reshape([sizes[c] for c in made]).permute(order).contiguous()
        ),
        product,
    )


def _grouped(
    b: Builder, x: Operand, letters: str, groups: Sequence[list[str]], sizes: dict[str, int]
) -> Operand:
    """With each group of axes as one."""
    order = [letters.index(c) for group in groups for c in group]
    shape = [math.prod(sizes[c] for c in group) for group in groups]

    def move(t: Tensor) -> Tensor:
        return t.permute(order).reshape(shape)

    return b.add(moved(x.shape, move), x) if isinstance(x, Value) else move(b.constant(x))


def conv(
    b: Builder,
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Value:
    """Exact where the kernel is constant, or (2-D, one group) where the input is."""
    if not isinstance(x, Value) or isinstance(weight, Value) or isinstance(bias, Value):
        return _perturbed_kernel(b, x, weight, bias, stride, padding, dilation, groups)
    kernel = b.constant(weight)
    num = kernel.ndim - 2
    spread = per_axis(dilation, num)
    if isinstance(padding, str):
        sides = _named_padding(padding, kernel, spread)
        x = padded(b, x, sides)
        padding = (0,) * num
    if len(x.shape) == num + 1:  # without a batch axis
        x = b.add(Reshape(x.shape, (1, *x.shape)), x)
    offset = None if bias is None else b.constant(bias)
    rule = Conv(
        kernel, offset, x.shape, per_axis(stride, num), per_axis(padding, num), spread, groups
    )
    return b.add(rule, x)


def per_axis(x: Sequence[int] | int, num: int) -> tuple[int, ...]:
    given = (x,) if isinstance(x, int) else tuple(x)
    return given * num if len(given) == 1 else given


def _named_padding(name: str, kernel: Tensor, dilation: Sequence[int]) -> list[int]:
    sides: list[int] = []
    for k, d in zip(reversed(kernel.shape[2:]), reversed(list(dilation)), strict=True):
        total = d * (k - 1) if name == "same" else 0
        sides += [total // 2, total - total // 2]
    return sides


def padded(b: Builder, x: Value, sides: Sequence[int], fill: float = 0.0) -> Value:
    """With a constant around it; sides as in torch's pad."""
    rule = joined(
        [x.shape],
        lambda parts: torch.nn.functional.pad(
            parts[0], list(sides), value=fill if parts[0].is_floating_point() else -1
        ),
        b.dtype,
    )
    return b.add(rule, x)


def padded_by(
    b: Builder, x: Value, sides: Sequence[int], mode: str = "constant", value: float | None = None
) -> Value:
    """Constant padding, or elements again (reflect, replicate, circular)."""
    if mode == "constant":
        return padded(b, x, sides, value or 0.0)
    return b.add(
        moved(x.shape, lambda t: torch.nn.functional.pad(t.double(), list(sides), mode).long()), x
    )


def constant_pad(b: Builder, x: Value, sides: Sequence[int], value: float = 0) -> Value:
    """A constant around a value."""
    return padded(b, x, sides, value)


def _perturbed_kernel(
    b: Builder,
    x: Operand,
    weight: Operand,
    bias: Operand | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> Value:
    """A convolution as a product of the kernel with the patches that it meets."""
    if not isinstance(weight, Value) and isinstance(x, Value):  # the bias and the input
        made: Operand = conv(b, x, weight, None, stride, padding, dilation, groups)
    elif not isinstance(weight, Value) and not isinstance(x, Value):  # the bias alone
        run = (torch.conv1d, torch.conv2d, torch.conv3d)[len(shape_of(weight)) - 3]
        made = run(b.constant(x), b.constant(weight), None, stride, padding, dilation, groups)
    elif isinstance(x, Value) or not isinstance(weight, Value) or groups != 1:
        raise b.refuse("a convolution with this choice of perturbed arguments")
    elif not isinstance(x, Tensor) or x.ndim != 4 or isinstance(padding, str):
        raise b.refuse("a convolution with a perturbed kernel of this form")
    else:
        patches = torch.nn.functional.unfold(
            b.constant(x),
            weight.shape[2:],
            dilation=per_axis(dilation, 2),
            padding=per_axis(padding, 2),
            stride=per_axis(stride, 2),
        )
        space = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                x.shape[2:],
                per_axis(padding, 2),
                per_axis(dilation, 2),
                weight.shape[2:],
                per_axis(stride, 2),
                strict=True,
            )
        ]
        flat = b.add(
            Reshape(weight.shape, (1, weight.shape[0], math.prod(weight.shape[1:]))), weight
        )
        product = matmul(b, flat, patches)
        made = b.add(Reshape(product.shape, (patches.shape[0], weight.shape[0], *space)), product)
    if bias is None and isinstance(made, Value):
        return made
    ones = (1,) * (len(shape_of(made)) - 2)
    if isinstance(bias, Value):
        offset: Operand = b.add(Reshape(bias.shape, (1, bias.shape[0], *ones)), bias)
    else:
        offset = b.constant(0.0 if bias is None else bias).reshape(1, -1, *ones)
    return add(b, made, offset)


def conv_transpose(
    b: Builder,
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    dilation: Sequence[int] = (1,),
) -> Value:
    """Exact; with a constant kernel."""
    if isinstance(weight, Value) or isinstance(bias, Value) or not isinstance(x, Value):
        raise b.refuse("a transposed convolution with a perturbed kernel")
    kernel = b.constant(weight)
    num = kernel.ndim - 2
    rule = TransposedConv(
        kernel,
        None if bias is None else b.constant(bias),
        x.shape,
        per_axis(stride, num),
        per_axis(padding, num),
        per_axis(output_padding, num),
        per_axis(dilation, num),
        groups,
    )
    return b.add(rule, x)
