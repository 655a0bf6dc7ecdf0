"""One call at least of every operator that has a rule: what is perturbed, and what is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType

import torch
from torch import Tensor

from patchclamp.engine.attention import attention_scores, attention_values

aten = torch.ops.aten


@dataclass(frozen=True)
class P:
    """A perturbed argument: its shape and what its elements lie between."""

    shape: tuple[int, ...]
    low: float = -1.0
    high: float = 1.0


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        target: what is called; args, kwargs: with `P` where something is perturbed.
        pick: which of several results is looked at.
    """

    target: object
    args: tuple[object, ...]
    kwargs: dict[str, object] = field(default_factory=dict)
    pick: int = 0

    def __repr__(self) -> str:
        # plain functions print their address, which differs between the workers of a test run
        plain = isinstance(self.target, (FunctionType, BuiltinFunctionType))
        name = self.target.__name__ if plain else self.target
        return f"{name}-{len(self.args)}-{self.pick}"


def call(target: object, *args: object, pick: int = 0, **kwargs: object) -> Call:
    return Call(target, args, kwargs, pick)


def fixed(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    )


X = P((1, 2, 4))
IMAGE = P((1, 2, 4, 4))
POSITIVE = P((1, 2, 4), 0.3, 2.0)

MOVING = [
    call(aten.view.default, X, [1, 8]),
    call(aten._unsafe_view.default, X, [1, 8]),
    call(aten.reshape.default, X, [2, 4]),
    call(aten.flatten.using_ints, X, 1),
    call(aten.unflatten.int, X, 2, [2, 2]),
    call(aten.transpose.int, X, 1, 2),
    call(aten.swapaxes.default, X, 1, 2),
    call(aten.swapdims.default, X, 1, 2),
    call(aten.permute.default, X, [2, 0, 1]),
    call(aten.t.default, P((3, 2))),
    call(aten.numpy_T.default, P((3, 2))),
    call(aten.mT.default, X),
    call(aten.mH.default, P((3, 2))),
    call(aten.adjoint.default, X),
    call(aten.movedim.int, X, 2, 0),
    call(aten.unsqueeze.default, X, 1),
    call(aten.squeeze.default, X),
    call(aten.squeeze.dim, X, 0),
    call(aten.squeeze.dims, X, [0]),
    call(aten.select.int, X, 2, -1),
    call(aten.slice.Tensor, X, 2, 1, 4, 2),
    call(aten.narrow.default, X, 2, 1, 2),
    call(aten.expand.default, X, [3, 2, 4]),
    call(aten.expand_as.default, X, fixed(3, 2, 4)),
    call(aten.view_as.default, X, fixed(8)),
    call(aten.reshape_as.default, X, fixed(8)),
    call(aten.repeat.default, X, [2, 1, 2]),
    call(aten.repeat_interleave.self_int, X, 2, 1),
    call(aten.flip.default, X, [2]),
    call(aten.roll.default, X, [1], [2]),
    call(aten.rot90.default, X, 1, [1, 2]),
    call(aten.ravel.default, X),
    call(aten.unfold.default, X, 2, 3, 1),
    call(aten.index_select.default, X, 2, torch.tensor([3, 0, 0])),
    call(aten.gather.default, X, 2, torch.tensor([[[1, 1], [0, 3]]])),
    call(aten.diagonal.default, X, 0, 1, 2),
    call(aten.tile.default, X, [2, 2]),
    call(aten.pixel_shuffle.default, P((1, 4, 2, 2)), 2),
    call(aten.pixel_unshuffle.default, IMAGE, 2),
    call(aten.channel_shuffle.default, P((1, 4, 2, 2)), 2),
    call(aten.upsample_nearest1d.vec, X, None, [2.0]),
    call(aten.upsample_nearest2d.vec, IMAGE, None, [2.0, 2.0]),
    call(aten.upsample_nearest3d.vec, P((1, 1, 2, 2, 2)), None, [2.0, 2.0, 1.0]),
    call(aten.upsample_nearest1d.default, X, [8]),
    call(aten.upsample_nearest2d.default, IMAGE, [8, 4]),
    call(aten.split.Tensor, X, 3, 2, pick=1),
    call(aten.split.sizes, X, [1, 3], 2, pick=1),
    call(aten.split_with_sizes.default, X, [1, 3], 2, pick=1),
    call(aten.chunk.default, X, 2, 2, pick=1),
    call(aten.unbind.int, X, 1, pick=1),
    call(aten.tensor_split.sections, X, 3, 2, pick=2),
    call(aten.index.Tensor, X, [None, torch.tensor([1, 0, 1])]),
    call(aten.embedding.default, P((5, 3)), torch.tensor([[0, 4, 4]])),
    call(aten.cat.default, [X, fixed(1, 2, 2), X], 2),
    call(aten.concat.default, [X, P((1, 1, 4))], 1),
    call(aten.stack.default, [X, fixed(1, 2, 4)], 1),
    call(aten.pad.default, X, [1, 2], "constant", 0.5),
    call(aten.pad.default, X, [1, 2], "reflect"),
    call(aten.constant_pad_nd.default, X, [1, 0], 2.0),
    call(aten.slice_scatter.default, X, P((1, 2, 2)), 2, 1, 3),
    call(aten.slice_scatter.default, X, fixed(1, 2, 2), 2, 1, 3),
    call(aten.slice_scatter.default, fixed(1, 2, 4), P((1, 2, 2)), 2, 1, 3),
    call(aten.select_scatter.default, X, P((1, 2)), 2, 1),
    call(aten.diagonal_scatter.default, X, P((1, 2)), 0, 1, 2),
    call(aten.copy.default, fixed(3, 2, 4), X),
    call(aten.contiguous.default, X),
    call(aten.clone.default, X),
    call(aten.alias.default, X),
    call(aten.detach.default, X),
    call(aten.detach_.default, X),
    call(aten.lift_fresh_copy.default, X),
    call(aten.type_as.default, X, fixed(1)),
    call(aten.to.device, X, torch.device("cpu"), torch.float64),
    call(aten.to.dtype, X, torch.float64),
    call(aten.to.dtype_layout, X, dtype=torch.float64),
    call(aten._to_copy.default, X, dtype=torch.float64),
    call(aten.dropout.default, X, 0.5, False),
]
"""Nothing is computed: bounds are exact."""

CONSTANT = [
    call(aten.expand_as.default, fixed(1, 2, 1), X),
    call(aten.zeros_like.default, X),
    call(aten.ones_like.default, X),
    call(aten.full_like.default, X, 2.5),
    call(aten.new_zeros.default, X, [3]),
    call(aten.new_ones.default, X, [3]),
    call(aten.new_full.default, X, [3], 1.5),
    call(aten.zero.default, X),
    call(aten.fill.Scalar, X, 3.0),
    call(aten.copy.default, X, fixed(1, 2, 1)),
]
"""Only the shape comes from what is perturbed."""

AFFINE = [
    call(aten.add.Tensor, X, P((4,))),
    call(aten.add.Tensor, X, fixed(4), alpha=2),
    call(aten.add.Tensor, fixed(2, 1), X, alpha=-3),
    call(aten.add_.Tensor, X, fixed(4)),
    call(aten.add.Scalar, X, 2.0),
    call(aten.sub.Tensor, fixed(4), X),
    call(aten.sub.Scalar, X, 1.5),
    call(aten.rsub.Scalar, X, 1.5),
    call(aten.rsub.Tensor, X, fixed(4)),
    call(aten.neg.default, X),
    call(aten.mul.Tensor, X, fixed(2, 1)),
    call(aten.mul.Scalar, X, -2.0),
    call(aten.div.Tensor, X, torch.tensor([1.0, -3.0, 7.0, 0.1])),
    call(aten.div.Scalar, X, 3.0),
    call(aten.div.Tensor_mode, X, 3.0, rounding_mode=None),
    call(aten.lerp.Scalar, X, fixed(4), 0.3),
    call(aten.tril.default, X),
    call(aten.triu.default, X, 1),
    call(aten.linear.default, X, fixed(3, 4), fixed(3)),
    call(aten.linear.default, fixed(1, 2, 4), P((3, 4)), P((3,))),
    call(aten.linear.default, X, fixed(3, 4), P((3,))),
    call(aten.matmul.default, X, fixed(4, 3)),
    call(aten.matmul.default, X, fixed(4)),
    call(aten.matmul.default, fixed(3, 2), X),
    call(aten.matmul.default, fixed(2), X),
    call(aten.matmul.default, fixed(3, 1, 4), P((4, 2))),
    call(aten.mv.default, P((2, 4)), fixed(4)),
    call(aten.mv.default, fixed(2, 4), P((4,))),
    call(aten.mm.default, P((2, 4)), fixed(4, 3)),
    call(aten.bmm.default, X, fixed(1, 4, 3)),
    call(aten.addmm.default, fixed(3), P((2, 4)), fixed(4, 3)),
    call(aten.addmm.default, P((3,)), P((2, 4)), fixed(4, 3), beta=0.5, alpha=-2),
    call(aten.baddbmm.default, fixed(1, 2, 3), X, fixed(1, 4, 3)),
    call(aten.einsum.default, "abc,dc->adb", [X, fixed(3, 4)]),
    call(aten.conv1d.default, X, fixed(3, 2, 2), fixed(3), [1], [1]),
    call(aten.conv1d.padding, X, fixed(3, 2, 2), None, [1], "same"),
    call(aten.conv2d.default, IMAGE, fixed(4, 1, 3, 3), fixed(4), [2, 1], [1, 1], [1, 1], 2),
    call(aten.conv2d.default, fixed(1, 2, 4, 4), P((3, 2, 3, 3)), P((3,)), [1, 1], [1, 0]),
    call(aten.conv2d.padding, IMAGE, fixed(3, 2, 2, 2), None, [1, 1], "same"),
    call(aten.conv3d.default, P((1, 1, 3, 2, 2)), fixed(2, 1, 2, 2, 1), fixed(2)),
    call(aten.conv_transpose1d.default, X, fixed(2, 3, 2), fixed(3), [2]),
    call(aten.conv_transpose2d.input, IMAGE, fixed(2, 3, 2, 2), fixed(3), [2, 2], [1, 0], [1, 1]),
    call(
        aten.batch_norm.default,
        IMAGE,
        fixed(2),
        fixed(2),
        fixed(2),
        fixed(2).exp(),
        False,
        0.1,
        1e-5,
        False,
    ),
    call(
        aten._native_batch_norm_legit_no_training.default,
        IMAGE,
        fixed(2),
        fixed(2),
        fixed(2),
        fixed(2).exp(),
        0.1,
        1e-5,
    ),
    call(aten.mean.dim, X, [1], True),
    call(aten.sum.dim_IntList, X, [-1]),
    call(aten.cumsum.default, X, 2),
    call(aten.avg_pool1d.default, X, [2]),
    call(aten.avg_pool2d.default, IMAGE, [2, 3], [1, 1], [1, 1], False, False),
    call(aten.avg_pool3d.default, P((1, 1, 2, 2, 2)), [2, 2, 1]),
    call(aten.adaptive_avg_pool1d.default, X, [3]),
    call(aten.adaptive_avg_pool2d.default, IMAGE, [3, 1]),
    call(aten.upsample_bilinear2d.vec, IMAGE, None, False, [2.0, 2.0]),
    call(aten.where.self, fixed(1, 2, 4) > 0, X, fixed(4)),
    call(aten.where.self, fixed(1, 2, 4) > 0, X, P((1, 2, 1))),
    call(aten.where.ScalarOther, fixed(2, 4) > 0, X, 1.0),
    call(aten.where.ScalarSelf, fixed(2, 4) > 0, 1.0, X),
    call(aten.masked_fill.Scalar, X, fixed(2, 4) > 0, -5.0),
    call(aten.masked_fill.Tensor, X, fixed(2, 4) > 0, torch.tensor(0.5)),
]
"""Exact on a box up to rounding, one rule at a time."""

WEIGHT, BIAS = fixed(4), fixed(4, seed=3)
HALF = P((1, 2, 4), -0.5, 0.5)
QUERY, KEY, VALUE = P((1, 4, 3, 2)), P((1, 2, 3, 2)), P((1, 2, 3, 2))

NONLINEAR = [
    *(
        call(target, P((1, 2, 4), -2, 2))
        for target in (
            aten.relu.default,
            aten.relu_.default,
            aten.leaky_relu_.default,
            aten.hardtanh_.default,
            aten.hardsigmoid.default,
            aten.hardswish.default,
            aten.abs.default,
            aten.silu.default,
            aten.silu_.default,
            aten.mish.default,
            aten.sigmoid.default,
            aten.tanh.default,
            aten.atan.default,
            aten.arctan.default,
            aten.erf.default,
            aten.erfc.default,
            aten.sin.default,
            aten.cos.default,
            aten.exp.default,
            aten.exp2.default,
            aten.expm1.default,
            aten.square.default,
            aten.softplus.default,
            aten.elu.default,
            aten.elu_.default,
            aten.selu.default,
            aten.log_sigmoid.default,
            aten.gelu.default,
        )
    ),
    *(
        call(target, POSITIVE)
        for target in (
            aten.log.default,
            aten.log2.default,
            aten.log10.default,
            aten.log1p.default,
            aten.sqrt.default,
            aten.rsqrt.default,
            aten.reciprocal.default,
        )
    ),
    call(aten.relu6.default, P((1, 2, 4), -1, 8)),
    call(aten.leaky_relu.default, X, 0.2),
    call(aten.prelu.default, IMAGE, torch.tensor([0.3, 1.5], dtype=torch.float64)),
    call(aten.clamp.default, X, -0.5, 0.25),
    call(aten.clamp.default, X, None, 0.25),
    call(aten.clamp.Tensor, X, fixed(4), fixed(4) + 0.5),
    call(aten.clamp_min.default, X, 0.1),
    call(aten.clamp_max.default, X, 0.1),
    call(aten.hardtanh.default, X, -0.5, 0.5),
    call(aten.threshold.default, X, 0.2, 0.2),
    call(aten.softshrink.default, X, 0.3),
    call(aten.elu.default, X, 2.0),
    call(aten.celu.default, X, 0.5),
    call(aten.softplus.default, X, 3.0, 5.0),
    call(aten.gelu.default, X, approximate="tanh"),
    call(aten.glu.default, X, 2),
    call(aten.pow.Tensor_Scalar, X, 2),
    call(aten.pow.Tensor_Scalar, X, 1),
    call(aten.pow.Tensor_Scalar, X, 3),
    call(aten.pow.Tensor_Scalar, POSITIVE, 0.5),
    call(aten.pow.Tensor_Scalar, POSITIVE, -0.5),
    call(aten.pow.Tensor_Scalar, POSITIVE, 1.5),
    call(aten.pow.Tensor_Scalar, POSITIVE, -2),
    call(aten.pow.Scalar, 3.0, X),
    call(aten.maximum.default, X, P((4,))),
    call(aten.maximum.default, X, fixed(4)),
    call(aten.max.other, X, torch.tensor(0.2)),
    call(aten.minimum.default, X, P((4,))),
    call(aten.min.other, fixed(4), X),
    call(aten.mul.Tensor, X, P((4,))),
    call(aten.div.Tensor, X, P((4,), 0.5, 2.0)),
    call(aten.div.Tensor, fixed(4), P((4,), -2.0, -0.5)),
    call(aten.addcmul.default, X, P((4,)), fixed(4), value=0.5),
    call(aten.addcmul.default, fixed(4), X, P((4,))),
    call(aten.matmul.default, X, P((1, 4, 3))),
    call(aten.linear.default, X, P((3, 4)), P((3,))),
    call(aten.einsum.default, "bqhd,bkhd->bhqk", [P((1, 2, 2, 3)), P((1, 3, 2, 3))]),
    call(aten.max_pool1d.default, X, [2], [1]),
    call(aten.max_pool2d.default, IMAGE, [2, 2], [2, 2], [1, 1]),
    call(aten.max_pool2d_with_indices.default, IMAGE, [2, 2]),
    call(aten.adaptive_max_pool2d.default, IMAGE, [1, 1]),
    call(aten.adaptive_max_pool1d.default, X, [2]),
    call(aten.max_pool3d.default, P((1, 1, 2, 2, 2)), [2, 2, 1]),
    call(aten.amax.default, X, [1, 2]),
    call(aten.amax.default, X, [-1], True),
    call(aten.amin.default, X, [2]),
    call(aten.max.dim, X, 2),
    call(aten.min.dim, X, 1, True),
    call(aten.softmax.int, X, 1),
    call(torch.softmax, X, -1),
    call(aten._softmax.default, X, -1, False),
    call(aten.log_softmax.int, X, -1),
    call(aten._log_softmax.default, X, -1, False),
    call(aten.logsumexp.default, X, [1, 2]),
    call(aten.logsumexp.default, X, [-1], True),
    call(aten.linalg_vector_norm.default, X, 2, [-1]),
    call(aten.linalg_vector_norm.default, X, 1, [-1], True),
    call(aten.linalg_vector_norm.default, X, float("inf"), [1]),
    call(aten.var.dim, X, [-1]),
    call(aten.var.correction, X, [-1], correction=0),
    call(aten.std.dim, POSITIVE, [-1], False),
    call(aten.std.correction, X, [-1], correction=1, keepdim=True),
    call(aten.layer_norm.default, X, [4], WEIGHT, BIAS, 1e-3),
    call(aten.layer_norm.default, HALF, [4], P((4,)), P((4,)), 1e-5),
    call(aten.rms_norm.default, X, [2, 4], None, 1e-3),
    call(aten.rms_norm.default, HALF, [4], WEIGHT, None),
    call(aten.group_norm.default, P((1, 4, 3)), 2, WEIGHT, BIAS, 1e-3),
    call(aten.instance_norm.default, IMAGE, None, None, None, None, True, 0.1, 1e-3, False),
    call(aten.scaled_dot_product_attention.default, P((1, 2, 3, 2)), KEY, VALUE),
    call(aten.scaled_dot_product_attention.default, P((1, 2, 3, 2)), KEY, VALUE, None, 0.0, True),
    call(aten.scaled_dot_product_attention.default, QUERY, KEY, VALUE, scale=0.3, enable_gqa=True),
    call(
        aten.scaled_dot_product_attention.default, P((1, 2, 3, 2)), KEY, VALUE, fixed(3, 3) > -0.5
    ),
    call(
        aten.scaled_dot_product_attention.default,
        fixed(1, 2, 3, 2),
        fixed(1, 2, 3, 2),
        VALUE,
        fixed(3, 3),
    ),
    call(attention_scores, QUERY, KEY, None, True, None, True),
    call(attention_scores, P((1, 2, 3, 2)), fixed(1, 2, 3, 2), fixed(3, 3), False, 0.5, False),
    call(attention_values, P((1, 4, 3, 3), 0.0, 1.0), VALUE, True),
]

SEQUENCE = P((1, 3, 2))


def _weights(gates: int, layers: int = 1, ways: int = 1, biases: bool = True) -> list[Tensor]:
    made = []
    for layer in range(layers):
        width = 2 if layer == 0 else 2 * ways
        for way in range(ways):
            made += [fixed(gates * 2, width, seed=layer + way), fixed(gates * 2, 2, seed=9)]
            made += [fixed(gates * 2, seed=5), fixed(gates * 2, seed=6)] if biases else []
    return made


RECURRENT = [
    call(
        aten.lstm.input,
        SEQUENCE,
        [torch.zeros(1, 1, 2), fixed(1, 1, 2)],
        _weights(4),
        True,
        1,
        0.0,
        False,
        False,
        True,
    ),
    call(
        aten.lstm.input,
        P((1, 2, 2)),
        [P((4, 1, 2), -0.3, 0.3), fixed(4, 1, 2)],
        _weights(4, 2, 2),
        True,
        2,
        0.0,
        False,
        True,
        True,
        pick=2,
    ),
    call(
        aten.gru.input,
        P((3, 1, 2)),
        fixed(1, 1, 2),
        _weights(3, biases=False),
        False,
        1,
        0.0,
        False,
        False,
        False,
    ),
    call(
        aten.gru.input,
        fixed(3, 1, 2),
        P((1, 1, 2)),
        _weights(3),
        True,
        1,
        0.0,
        False,
        False,
        False,
        pick=1,
    ),
    call(
        aten.rnn_tanh.input,
        SEQUENCE,
        torch.zeros(2, 1, 2),
        _weights(1, 2),
        True,
        2,
        0.0,
        False,
        False,
        True,
    ),
    call(
        aten.rnn_relu.input,
        SEQUENCE,
        torch.zeros(1, 1, 2),
        [P((2, 2)), *_weights(1)[1:]],
        True,
        1,
        0.0,
        False,
        False,
        True,
    ),
    call(aten.lstm_cell.default, P((1, 2)), [fixed(1, 2), P((1, 2))], *_weights(4), pick=1),
    call(aten.gru_cell.default, P((1, 2)), P((1, 2)), *_weights(3)),
    call(aten.rnn_tanh_cell.default, P((1, 2)), fixed(1, 2), *_weights(1)),
    call(aten.rnn_relu_cell.default, P((1, 2)), P((1, 2)), *_weights(1, biases=False)),
]

EXACT = MOVING + AFFINE
CALLS = EXACT + NONLINEAR + RECURRENT
