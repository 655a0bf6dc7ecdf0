"""Which captured operator has which rule: the one table, read by the lowering and by the docs.

An entry takes the operator's arguments, in which perturbed ones are `Value`s, and gives the
value that stands for the result. Operators that only move elements need no code of their own.
"""

from __future__ import annotations

import torch

from patchclamp.rules.operators.arithmetic import (
    add,
    chosen,
    div,
    dropout,
    masked_fill,
    mul,
    neg,
    power,
    rsub,
    sub,
)
from patchclamp.rules.operators.attention import attention, softmax
from patchclamp.rules.operators.builder import Build
from patchclamp.rules.operators.matrices import (
    addmm,
    constant_pad,
    conv,
    conv_transpose,
    linear,
    matmul,
    padded_by,
)
from patchclamp.rules.operators.moving import (
    cast,
    concatenated,
    indexed,
    moving,
    same,
    splitting,
    stacked,
)
from patchclamp.rules.operators.nonlinear import ELEMENTWISE
from patchclamp.rules.operators.norms import batch_norm, layer_norm, rms_norm
from patchclamp.rules.operators.pooling import (
    average_pooled,
    averaging,
    everything,
    largest,
    largest_with_index,
    max_pooled,
    share,
)

aten = torch.ops.aten


_MOVING = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.movedim.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.select.int,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.flip.default,
    aten.roll.default,
    aten.index_select.default,
    aten.gather.default,
    aten.diagonal.default,
    aten.tile.default,
)

_SPLITTING = (
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.tensor_split.sections,
)

_SAME = (
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.to.device,
)

TABLE: dict[object, Build] = {
    **{target: moving(target) for target in _MOVING},
    **{target: splitting(target) for target in _SPLITTING},
    **dict.fromkeys(_SAME, same),
    aten.to.dtype: cast,
    aten.to.dtype_layout: cast,
    aten._to_copy.default: cast,
    aten.dropout.default: dropout,
    aten.add.Tensor: add,
    aten.add_.Tensor: add,
    aten.add.Scalar: add,
    aten.sub.Tensor: sub,
    aten.sub.Scalar: sub,
    aten.rsub.Scalar: rsub,
    aten.rsub.Tensor: rsub,
    aten.neg.default: neg,
    aten.mul.Tensor: mul,
    aten.mul.Scalar: mul,
    aten.div.Tensor: div,
    aten.div.Scalar: div,
    aten.div.Tensor_mode: div,
    aten.pow.Tensor_Scalar: power,
    aten.linear.default: linear,
    aten.matmul.default: matmul,
    aten.mm.default: matmul,
    aten.bmm.default: matmul,
    aten.addmm.default: addmm,
    aten.conv1d.default: conv,
    aten.conv2d.default: conv,
    aten.conv2d.padding: conv,
    aten.conv1d.padding: conv,
    aten.conv3d.default: conv,
    aten.conv_transpose1d.default: conv_transpose,
    aten.conv_transpose2d.input: conv_transpose,
    aten.batch_norm.default: batch_norm,
    aten._native_batch_norm_legit_no_training.default: batch_norm,
    aten.layer_norm.default: layer_norm,
    aten.rms_norm.default: rms_norm,
    aten.cat.default: concatenated,
    aten.concat.default: concatenated,
    aten.stack.default: stacked,
    aten.pad.default: padded_by,
    aten.constant_pad_nd.default: constant_pad,
    aten.mean.dim: averaging(aten.mean.dim, share),
    aten.mean.default: averaging(aten.mean.default, everything),
    aten.sum.dim_IntList: averaging(aten.sum.dim_IntList, share),
    aten.sum.default: averaging(aten.sum.default, everything),
    aten.cumsum.default: averaging(aten.cumsum.default, everything),
    aten.avg_pool2d.default: average_pooled,
    aten.adaptive_avg_pool2d.default: averaging(aten.adaptive_avg_pool2d.default, everything),
    aten.adaptive_avg_pool1d.default: averaging(aten.adaptive_avg_pool1d.default, everything),
    aten.index.Tensor: indexed,
    aten.where.self: chosen,
    aten.where.ScalarOther: chosen,
    aten.where.ScalarSelf: chosen,
    aten.masked_fill.Scalar: masked_fill,
    aten.masked_fill.Tensor: masked_fill,
    aten.max_pool1d.default: max_pooled(1),
    aten.max_pool2d.default: max_pooled(2),
    aten.max_pool3d.default: max_pooled(3),
    aten.amax.default: largest,
    aten.max.dim: largest_with_index,
    aten.softmax.int: softmax,
    aten._softmax.default: softmax,
    aten.scaled_dot_product_attention.default: attention,
    **ELEMENTWISE,
}
