"""Calls that the models of `tests/hf` do not make, or not with these arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxzero import compat
from tests.sharding.recorded_calls import RecordedCall

aten = torch.ops.aten


def made(op: Any, *args: Any, **kwargs: Any) -> RecordedCall:
    """The call of an op with these values."""
    graph, mode = fx.Graph(), compat.new_fake_mode()
    values: dict[fx.Node, Any] = {}

    def given(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [given(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder(f"x{len(values)}")
        values[node] = value
        with mode:
            node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        return node

    args, kwargs = tuple(map(given, args)), {name: given(value) for name, value in kwargs.items()}
    node = graph.call_function(op, args, kwargs)
    with mode:
        node.meta["val"] = op(*fx.map_arg(args, lambda n: n.meta["val"]), **fx.map_arg(kwargs, lambda n: n.meta["val"]))
    return RecordedCall(node, values)


def further_calls() -> Iterator[RecordedCall]:
    """All of them; sizes are multiples of 4 where a dim may be split."""
    torch.manual_seed(3)
    for calls in (_along_a_dim, _by_index, _joined_and_cut, _reductions, _pointwise, _of_images, _products, _losses):
        yield from calls()


def _along_a_dim() -> Iterator[RecordedCall]:
    x = torch.randn(4, 8, 12)
    for dim in (0, 1, -1):
        for op in (aten.cumsum, aten.cumprod, aten.logcumsumexp, aten.cummax, aten.cummin):
            yield made(op.default, x, dim)
        for op in (aten.sort.default, aten.argsort.default, aten.flip.default, aten.unbind.int):
            yield made(op, x, [dim] if op is aten.flip.default else dim)
        yield made(aten.topk.default, x, 4, dim)
        yield made(aten.roll.default, x, [3], [dim])
        yield made(aten._softmax.default, x, dim, False)
        yield made(aten._log_softmax.default, x, dim, False)
        yield made(aten.sort.stable, x, stable=True, dim=dim)
        yield made(aten.squeeze.dim, x, dim)
        yield made(aten.select.int, x, dim, 1)
        yield made(aten.diagonal.default, torch.randn(4, 4, 8), 0, 0, 1)
    yield made(aten.tril.default, x, 1)
    yield made(aten.triu.default, x)
    yield made(aten.repeat.default, x, [2, 1, 2])
    yield made(aten.repeat.default, x, [2, 1, 1, 2])
    yield made(aten.expand.default, torch.randn(4, 1, 8), [3, 4, 8, 8])
    yield made(aten.permute.default, x, [2, 0, 1])
    yield made(aten.transpose.int, x, 0, -1)
    yield made(aten.constant_pad_nd.default, x, [4, 0, 0, 4], 1.0)
    yield made(aten.constant_pad_nd.default, x, [0, 4], 0.0)
    yield made(aten.unfold.default, x, 2, 4, 4)


def _by_index() -> Iterator[RecordedCall]:
    x, wide = torch.randn(8, 4, 12), torch.randn(8, 4, 4)
    at = torch.randint(0, 4, (8, 4, 4))
    for dim in (0, 1, 2):
        yield made(aten.gather.default, x, dim, at)
        yield made(aten.scatter.src, x, dim, at.argsort(dim) % 4, wide)
        yield made(aten.scatter.value, x, dim, at, 2.0)
        yield made(aten.scatter_add.default, x, dim, at, wide)
        yield made(aten.scatter_reduce.two, x, dim, at, wide, "amax")
        yield made(aten.index_select.default, x, dim, torch.tensor([3, 0, 1, 1]))
        yield made(aten.index_fill.int_Scalar, x, dim, torch.tensor([3, 0]), 1.5)
    yield made(aten.index_add.default, x, 0, torch.tensor([3, 0, 1, 1]), torch.randn(4, 4, 12))
    rows, columns = torch.tensor([1, 3, 0, 2]), torch.tensor([0, 1, 2, 3])
    yield made(aten.index.Tensor, x, [rows])
    yield made(aten.index.Tensor, x, [None, rows])
    yield made(aten.index.Tensor, x, [rows, None, columns])
    yield made(aten.index.Tensor, x, [rows, columns])
    yield made(aten.index.Tensor, x, [rows.view(4, 1), columns.view(1, 4)])
    for accumulate in (False, True):
        yield made(aten.index_put.default, x, [rows], torch.randn(4, 4, 12), accumulate)
        yield made(aten.index_put.default, x, [rows], torch.tensor(2.0), accumulate)
        yield made(aten.index_put.default, x, [rows, columns], torch.randn(4, 12), accumulate)
        yield made(aten.index_put.default, x, [None, rows], torch.randn(8, 4, 12), accumulate)
        yield made(aten.index_put.default, x, [rows], torch.randn(12), accumulate)
    words, rows = torch.randn(16, 8), torch.randint(0, 16, (4, 4))
    yield made(aten.embedding.default, words, rows, 3)
    for padding in (-1, 3):
        yield made(aten.embedding_dense_backward.default, torch.randn(4, 4, 8), rows, 16, padding, False)
    yield made(aten.embedding_dense_backward.default, torch.randn(4, 4, 8), rows, 16, -1, True)
    yield made(aten.histc.default, torch.rand(16), 8, 0, 1)
    yield made(aten.histc.default, torch.rand(16), 8, 0, 0)
    yield made(aten.bucketize.Tensor, x, torch.linspace(-2, 2, 8))
    yield made(aten.searchsorted.Tensor, torch.linspace(-2, 2, 32).view(8, 4), x[:, 0])
    yield made(aten.masked_fill.Scalar, x, x > 0, 0.5)
    yield made(aten.masked_fill.Tensor, x, x[:, :, :1] > 0, torch.tensor(0.5))
    yield made(aten.slice_backward.default, x, [8, 8, 12], 1, 2, 6, 1)
    yield made(aten.select_backward.default, x, [8, 4, 4, 12], 1, 2)
    yield made(aten.slice_scatter.default, x, torch.randn(8, 4, 4), 2, 4, 8)
    yield made(aten.select_scatter.default, x, torch.randn(8, 12), 1, 2)


def _joined_and_cut() -> Iterator[RecordedCall]:
    x, y = torch.randn(4, 8, 12), torch.randn(4, 8, 4)
    yield made(aten.cat.default, [x, y], 2)
    wide = torch.randn(8, 48)
    yield made(aten.cat.default, [wide, wide + 1, wide + 2], 1)
    yield made(aten.cat.default, [wide, wide[:, :24]], -1)
    yield made(aten.cat.default, [torch.empty(0), wide, torch.empty(0), wide + 1], 1)
    yield made(aten.cat.default, [torch.empty(0), wide])
    for at, sizes in ((1, [16, 16, 16]), (1, [32, 16]), (-1, [24, 24]), (0, [4, 4])):
        yield made(aten.split_with_sizes.default, wide, sizes, at)
    for size in (16, 24, 32):
        yield made(aten.split.Tensor, wide, size, 1)
    for first, last in ((0, 24), (24, 2**62), (-16, 48), (16, 32), (8, 32)):
        yield made(aten.slice.Tensor, wide, 1, first, last)
        yield made(aten.slice_backward.default, wide[:, first:last].clone(), [8, 48], 1, first, last, 1)
    yield made(aten.slice.Tensor, wide, 1, 0, 48, 2)
    yield made(aten.view.default, torch.randn(2, 8, 12), [16, 12])
    yield made(aten.view.default, torch.randn(16, 12), [2, 8, 12])
    yield made(aten.view.default, wide, [8, 3, 16])
    rows, ends = torch.randn(16, 32).bfloat16(), torch.tensor([5, 16], dtype=torch.int32)
    yield made(aten._grouped_mm.default, rows, torch.randn(2, 32, 64).bfloat16(), ends)
    yield made(aten._grouped_mm.default, rows.t().contiguous(), torch.randn(16, 64).bfloat16(), ends)
    yield made(aten.stack.default, [x, x + 1], 1)
    yield made(aten.stack.default, [torch.tensor(0.5), torch.tensor(2.0)])
    for dim in (0, 1, 2):
        yield made(aten.split.Tensor, x, 4, dim)
        yield made(aten.split_with_sizes.default, x, [x.shape[dim] - 2, 2], dim)
        yield made(aten.slice.Tensor, x, dim, 0, x.shape[dim] // 2)
        yield made(aten.slice.Tensor, x, dim, 0, x.shape[dim])
    yield made(aten.view.default, x, [4, 2, 4, 12])
    yield made(aten.view.default, x, [32, 12])
    yield made(aten.view.default, x, [8, 4, 12])
    yield made(aten.view.default, x, [4, 96])
    yield made(aten.view.default, x, [384])
    yield made(aten.view.default, x, [1, 4, 8, 1, 12])
    yield made(aten.view.default, torch.randn(4, 1, 8), [1, 32])
    yield made(aten.unsqueeze.default, x, -1)
    yield made(aten.view.dtype, x, torch.int32)
    yield made(aten.view.dtype, x, torch.bfloat16)
    yield made(aten.linalg__powsum.default, x, 2.0)
    yield made(aten._to_copy.default, x, dtype=torch.bfloat16)
    yield made(aten._to_copy.default, 3 * x, dtype=torch.int64)
    yield made(aten._to_copy.default, torch.randint(0, 3, (4, 8)), dtype=torch.bool)
    yield made(aten._to_copy.default, torch.randint(0, 3, (4, 8)), dtype=torch.float32)
    yield made(aten._to_copy.default, torch.randint(0, 2, (4, 8)).bool(), dtype=torch.float32)


def _reductions() -> Iterator[RecordedCall]:
    x = torch.randn(4, 8, 12)
    counted = torch.randint(0, 3, (4, 8))
    for dims in ([0], [1, 2], [-1], [0, 1, 2]):
        for keep in (False, True):
            for op in (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default):
                yield made(op, x, dims, keep)
            yield made(aten.var.correction, x, dims, correction=1, keepdim=keep)
            yield made(aten.var_mean.correction, x, dims, correction=0, keepdim=keep)
            for order in (2.0, 1.0, torch.inf, 3.0):
                yield made(aten.linalg_vector_norm.default, x, order, dims, keep)
    yield made(aten.sum.dim_IntList, counted, [1])
    yield made(aten.sum.default, counted > 0)
    yield made(aten.mean.dim, x, None)
    yield made(aten.mean.dim, x.bfloat16(), [0], dtype=torch.float32)
    for op in (aten.sum, aten.mean, aten.max, aten.min, aten.prod, aten.any, aten.all, aten.argmax, aten.argmin):
        yield made(op.default, x > 1 if op in (aten.any, aten.all) else x)
    for dim in (0, 1, 2):
        for op in (aten.max.dim, aten.min.dim, aten.any.dim, aten.all.dim, aten.argmax.default, aten.logsumexp.default):
            yield made(op, x > 1 if op in (aten.any.dim, aten.all.dim) else x, [dim] if "logsum" in str(op) else dim)
        yield made(aten.prod.dim_int, x, dim)
    for order in (2.0, 1.0, torch.inf, 0.5):
        yield made(aten.linalg_vector_norm.default, x, order)
    yield made(aten.linalg_vector_norm.default, x)
    yield made(aten.linalg_vector_norm.default, torch.rand(6), torch.inf)
    yield made(torch.ops.fxzero.nonfinite.default, torch.tensor([[1.0, torch.inf], [2.0, 3.0]]))


def _pointwise() -> Iterator[RecordedCall]:
    x, y, row, number = torch.randn(4, 8, 12), torch.randn(8, 12), torch.randn(12), torch.tensor(0.7)
    for op in (aten.add, aten.sub, aten.mul, aten.div):
        for other in (y, row, number, torch.randn(4, 1, 12)):
            yield made(op.Tensor, x, other)
        yield made(op.Tensor, number, x)
        yield made(op.Tensor, x, 2.0)
        yield made(op.Tensor, row, number)
    yield made(aten.add.Tensor, x, x, alpha=3)
    yield made(aten.rsub.Scalar, x, 1.0)
    yield made(aten.div.Tensor_mode, x, y, rounding_mode="floor")
    yield made(aten.floor_divide.default, x, torch.tensor(0.3))
    yield made(aten.floor_divide.default, torch.arange(48).view(4, 12), 5)
    yield made(aten.remainder.Tensor, x, y.abs() + 0.1)
    yield made(aten.remainder.Scalar, x, 0.5)
    yield made(aten.copy.default, x, y)
    yield made(aten.copy.default, x, number)
    yield made(aten.fill.Tensor, x, number)
    yield made(aten.fill.Scalar, x, 2.0)
    yield made(aten.where.self, x > 0, x, number)
    yield made(aten.where.self, x > 0, number, torch.tensor(-1.0))
    yield made(aten.where.self, y[0] > 0, x, y)
    for op in (
        aten.exp,
        aten.neg,
        aten.abs,
        aten.floor,
        aten.round,
        aten.sign,
        aten.relu,
        aten.sigmoid,
        aten.isnan,
        aten.erf,
    ):
        yield made(op.default, x)
    yield made(aten.clamp.default, x, -0.5, 0.5)
    yield made(aten.clamp.Tensor, x, y - 1, y + 1)
    yield made(aten.maximum.default, x, y)
    yield made(aten.pow.Tensor_Scalar, x, 3)
    yield made(aten.pow.Scalar, 2.0, x)
    yield made(aten.pow.Tensor_Tensor, x.abs(), y)
    yield made(aten.addcmul.default, x, y, row, value=0.5)
    yield made(aten.addcdiv.default, x, y, row.abs() + 0.1, value=0.5)
    yield made(aten.lerp.Scalar, x, y.expand(4, 8, 12).contiguous(), 0.3)
    yield made(aten.lerp.Tensor, x, x + 1, number)
    for op in (aten.silu_backward, aten.gelu_backward, aten.tanh_backward, aten.sigmoid_backward):
        yield made(op.default, x, x + 0.5)
    for op in (aten.hardsigmoid_backward, aten.hardswish_backward, aten.mish_backward):
        yield made(op.default, x, x + 0.5)
    yield made(aten.hardswish.default, x)
    yield made(aten.elu_backward.default, x, 1.0, 1.0, 1.0, False, x + 0.5)
    yield made(aten.hardtanh_backward.default, x, x + 0.5, -1.0, 1.0)
    yield made(aten.leaky_relu_backward.default, x, x + 0.5, 0.1, False)
    yield made(aten.log_sigmoid_backward.default, x, x + 0.5, x.abs())
    yield made(aten.softplus_backward.default, x, x + 0.5, 1.0, 20.0)
    yield made(aten.softshrink_backward.default, x, x + 0.5, 0.5)
    for op in (aten.gt, aten.eq, aten.ne):
        yield made(op.Tensor, x, y)
        yield made(op.Scalar, x, 0.5)
    yield made(aten.logical_and.default, x > 0, y > 0)
    yield made(aten.bitwise_and.Tensor, x > 0, y > 0)
    yield made(aten.nan_to_num.default, x)
    for op in (aten.zeros_like, aten.ones_like, aten.rand_like, aten.randn_like):
        yield made(op.default, x)
    yield made(aten.full_like.default, x, 3.0)
    yield made(aten.native_dropout.default, x, 0.4, True)
    yield made(aten.bernoulli.p, x, 0.4)
    yield made(aten.bernoulli.default, x.sigmoid())
    yield made(aten.new_zeros.default, x, [4, 8])
    yield made(aten.new_full.default, x, [4, 8, 12], 1.0)
    yield made(aten.detach.default, x)
    yield made(aten.alias.default, x)
    yield made(aten.clone.default, x.transpose(0, 1), memory_format=torch.contiguous_format)


def _of_images() -> Iterator[RecordedCall]:
    x, scale = torch.randn(4, 8, 6, 6), torch.rand(8)
    for transposed, groups, bias in (
        (False, 1, True),
        (True, 1, True),
        (False, 4, True),
        (True, 4, False),
        (False, 1, False),
    ):
        weight = torch.randn(8, 12 // groups, 3, 3) if transposed else torch.randn(12, 8 // groups, 3, 3)
        shift = torch.randn(12) if bias else None
        how = ([2, 2], [1, 1], [1, 1], transposed, [1, 1] if transposed else [0, 0], groups)
        call = made(aten.convolution.default, x, weight, shift, *how)
        yield call
        gradient = torch.randn(call.node.meta["val"].shape)
        for mask in ([True, True, bias], [False, True, bias], [True, False, False]):
            yield made(aten.convolution_backward.default, gradient, x, weight, [12] if bias else None, *how, mask)
    means, factors = torch.randn(4, 4), torch.rand(4, 4)
    for weight, shift in ((scale, torch.randn(8)), (None, None)):
        yield made(aten.native_group_norm.default, x, weight, shift, 4, 8, 36, 4, 1e-5)
        mask = [True, weight is not None, weight is not None]
        yield made(aten.native_group_norm_backward.default, x + 1, x, means, factors, weight, 4, 8, 36, 4, mask)
    for train in (True, False):
        yield made(aten._native_batch_norm_legit_functional.default, x, scale, scale, scale, scale, train, 0.1, 1e-5)
        yield made(aten.native_batch_norm.default, x, scale, scale, scale.clone(), scale.clone(), train, 0.1, 1e-5)
        both = (x + 1, x, scale, scale, scale, scale, scale, train, 1e-5, [True, True, True])
        yield made(aten.native_batch_norm_backward.default, *both)
    yield made(aten._native_batch_norm_legit.no_stats, x, scale, scale, True, 0.1, 1e-5)
    yield made(aten.max_pool2d_with_indices.default, x, [2, 2])
    pooled = x.reshape(4, 8, 3, 2, 3, 2).amax((3, 5))
    indices = torch.nn.functional.max_pool2d(x, 2, return_indices=True)[1]
    yield made(aten.max_pool2d_with_indices_backward.default, pooled, x, [2, 2], [], [0, 0], [1, 1], False, indices)
    yield made(aten.avg_pool2d.default, x, [2, 2])
    yield made(aten.avg_pool2d_backward.default, pooled, x, [2, 2], [], [0, 0], False, True, None)
    yield made(aten._adaptive_avg_pool2d.default, x, [2, 2])
    yield made(aten.upsample_nearest2d.vec, x, None, [2.0, 2.0])
    yield made(aten.native_layer_norm.default, x, [6, 6], torch.randn(6, 6), None, 1e-5)
    yield made(aten._fused_rms_norm.default, x, [6], torch.randn(6), 1e-5)


def _products() -> Iterator[RecordedCall]:
    a, b, c = torch.randn(8, 12), torch.randn(12, 4), torch.randn(8, 4)
    yield made(aten.mm.default, a, b)
    yield made(aten.addmm.default, c, a, b, beta=0.5, alpha=2.0)
    yield made(aten.addmm.default, c[:, :1].clone(), a, b)
    yield made(aten.bmm.default, torch.randn(4, 8, 12), torch.randn(4, 12, 8))
    yield made(
        aten.baddbmm.default, torch.randn(4, 1, 8), torch.randn(4, 8, 12), torch.randn(4, 12, 8), beta=0.5, alpha=2.0
    )
    yield made(aten.dot.default, a[0], a[1])
    yield made(aten.mv.default, a, b[:, 0].clone())
    yield made(aten.linalg_cross.default, torch.randn(4, 3), torch.randn(4, 3))
    q, k = torch.randn(4, 8, 8, 4), torch.randn(4, 8, 8, 4)
    yield made(aten._scaled_dot_product_flash_attention_for_cpu.default, q, k, k + 1, 0.0, True)


def _losses() -> Iterator[RecordedCall]:
    x, y = torch.randn(8, 4), torch.rand(8, 4)
    for reduction in (0, 1, 2):
        yield made(aten.mse_loss.default, x, y, reduction)
        yield made(aten.smooth_l1_loss.default, x, y, reduction)
        yield made(aten.binary_cross_entropy_with_logits.default, x, y, None, None, reduction)
        grad = torch.randn(8, 4) if reduction == 0 else torch.tensor(0.7)
        yield made(aten.mse_loss_backward.default, grad, x, y, reduction)
        logs, words = x.log_softmax(1), torch.tensor([0, 3, 2, 1, -100, 2, 2, 0])
        yield made(aten.nll_loss_forward.default, logs, words, None, reduction, -100)
        weight = torch.tensor(7.0)
        slope = torch.randn(8) if reduction == 0 else torch.tensor(0.7)
        yield made(aten.nll_loss_backward.default, slope, logs, words, None, reduction, -100, weight)
        yield made(aten.nll_loss_forward.default, logs, words, torch.rand(4), reduction, -100)
