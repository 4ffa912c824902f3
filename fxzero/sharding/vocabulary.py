"""Ranks that each have some words of a vocabulary: embedding, softmax and loss without the whole of their logits.

A rank looks up the words that it has, and zeros for others: partial sums. Of the softmax it needs two numbers a row
from the others, the greatest logit and the sum of exponentials; of the loss, nothing: the row's word is on one rank.
Source: Megatron-LM (Shoeybi et al., 2019), section 3.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxzero.graph.axis_placement import REPLICATED, partial, shard
from fxzero.sharding.dtensor_rules import by_dtensor
from fxzero.sharding.strategy import Call, Local, Message, Strategy, fits, replicated

aten = torch.ops.aten

_NONE, _SUM = 0, 2  # of losses, as `reduction` says it


def embedding(call: Call) -> Iterator[Strategy]:
    """The ways of `embedding`: by DTensor, and with some of the words on each rank."""
    yield from by_dtensor(call)
    strategy = Strategy((shard(0), REPLICATED), (partial(),), _looked_up)
    if fits(call, strategy):
        yield strategy


def _looked_up(local: Local) -> tuple[fx.Node | None, ...]:
    weight, ids = local.args[:2]
    safe, outside = _own_words(local, ids, weight.meta["val"].shape[0])
    rows = local.editor.call(aten.embedding.default, weight, safe)
    outside = local.editor.call(aten.unsqueeze.default, outside, -1)
    return (local.editor.call(aten.masked_fill.Scalar, rows, outside, 0.0),)


def embedding_backward(call: Call) -> Iterator[Strategy]:
    """The ways of `embedding_dense_backward`."""
    if call.argument("scale_grad_by_freq"):  # a rank that has some of the ids cannot count them
        yield from (strategy for strategy in by_dtensor(call) if strategy.inputs[1] == REPLICATED)
        return
    yield from by_dtensor(call)
    strategy = Strategy((REPLICATED, REPLICATED), (shard(0),), _added_to_own_words)
    if fits(call, strategy):
        yield strategy


def _added_to_own_words(local: Local) -> tuple[fx.Node | None, ...]:
    gradient, ids, num_words, padding, *_ = local.args
    rows = num_words // local.call.ranks
    ignored = None if padding < 0 else local.editor.call(aten.eq.Scalar, ids, padding)
    safe, outside = _own_words(local, ids, rows)
    if ignored is not None:
        outside = local.editor.call(aten.bitwise_or.Tensor, outside, ignored)
    outside = local.editor.call(aten.unsqueeze.default, outside, -1)
    own = local.editor.call(aten.masked_fill.Scalar, gradient, outside, 0.0)
    return (local.editor.call(aten.embedding_dense_backward.default, own, safe, rows, -1, False),)


def log_softmax(call: Call) -> Iterator[Strategy]:
    """The ways of `_log_softmax`: rows, or the dim of the softmax with two numbers a row from all ranks."""
    yield from by_dtensor(call)
    tensor, dim = call.tensors[0], call.args[1] % len(call.tensors[0].shape)
    output = call.outputs[0]
    assert output is not None
    row_bytes = output.dtype.itemsize * _rows(tensor.shape, dim)
    messages = (Message("all_reduce", row_bytes), Message("all_reduce", row_bytes))
    strategy = Strategy((shard(dim),), (shard(dim),), _log_softmax, messages, 1 / call.ranks, in_blocks=True)
    if fits(call, strategy):
        yield strategy


def _log_softmax(local: Local) -> tuple[fx.Node | None, ...]:
    editor, (logits, dim, to_float) = local.editor, local.args
    if to_float:
        logits = editor.call(aten._to_copy.default, logits, dtype=torch.float32)
    greatest = local.all_reduce(editor.call(aten.amax.default, logits, [dim], True), "max")
    shifted = editor.call(aten.sub.Tensor, logits, greatest)
    total = editor.call(aten.sum.dim_IntList, editor.call(aten.exp.default, shifted), [dim], True)
    return (editor.call(aten.sub.Tensor, shifted, editor.call(aten.log.default, local.all_reduce(total))),)


def log_softmax_backward(call: Call) -> Iterator[Strategy]:
    """The ways of `_log_softmax_backward_data`."""
    yield from by_dtensor(call)
    tensor, dim = call.tensors[0], call.args[2] % len(call.tensors[0].shape)
    messages = (Message("all_reduce", tensor.dtype.itemsize * _rows(tensor.shape, dim)),)
    both, share = (shard(dim), shard(dim)), 1 / call.ranks
    strategy = Strategy(both, (shard(dim),), _log_softmax_backward, messages, share, in_blocks=True)
    if fits(call, strategy):
        yield strategy


def _log_softmax_backward(local: Local) -> tuple[fx.Node | None, ...]:
    editor, (gradient, output, dim, dtype) = local.editor, local.args
    total = local.all_reduce(editor.call(aten.sum.dim_IntList, gradient, [dim], True))
    share = editor.call(aten.mul.Tensor, editor.call(aten.exp.default, output), total)
    found = editor.call(aten.sub.Tensor, gradient, share)
    if found.meta["val"].dtype != dtype:
        found = editor.call(aten._to_copy.default, found, dtype=dtype)
    return (found,)


def nll_loss(call: Call) -> Iterator[Strategy]:
    """The ways of `nll_loss_forward`, unweighted: rows, or words."""
    yield replicated(call)
    if call.argument("weight") is not None or len(call.tensors[0].shape) != 2:
        return
    rows, words, summed = (shard(0), shard(0)), (shard(1), REPLICATED), (partial(), REPLICATED)
    count = (Message("all_reduce", 8),)
    found = [Strategy(rows, summed, _loss_of_rows, count, share=1 / call.ranks, in_blocks=True)]
    if call.argument("reduction") == _NONE:
        found = [Strategy(rows, (shard(0), REPLICATED))]
    found.append(Strategy(words, summed, _loss_of_words, share=1 / call.ranks))
    yield from (strategy for strategy in found if fits(call, strategy))


def _loss_of_rows(local: Local) -> tuple[fx.Node | None, ...]:
    logs, target, weight, reduction, ignored = local.args
    editor = local.editor
    both = editor.call(aten.nll_loss_forward.default, logs, target, weight, _SUM, ignored)
    loss, count = editor.call(operator.getitem, both, 0), editor.call(operator.getitem, both, 1)
    count = local.all_reduce(count)
    return (loss if reduction == _SUM else editor.call(aten.div.Tensor, loss, count), count)


def _loss_of_words(local: Local) -> tuple[fx.Node | None, ...]:
    logs, target, weight, reduction, ignored = local.args
    editor = local.editor
    own = _own_targets(local, target, logs.meta["val"].shape[1], ignored)
    kind = _NONE if reduction == _NONE else _SUM
    both = editor.call(aten.nll_loss_forward.default, logs, own, weight, kind, ignored)
    loss = editor.call(operator.getitem, both, 0)
    if reduction == _NONE:
        return loss, editor.call(operator.getitem, both, 1)
    counted = editor.call(aten.ne.Scalar, target, ignored)
    count = editor.call(aten.sum.dim_IntList, counted, [0], dtype=logs.meta["val"].dtype)
    return (loss if reduction == _SUM else editor.call(aten.div.Tensor, loss, count), count)


def nll_loss_backward(call: Call) -> Iterator[Strategy]:
    """The ways of `nll_loss_backward`, unweighted: rows, or words."""
    yield replicated(call)
    if call.argument("weight") is not None or len(call.tensors[1].shape) != 2:
        return
    slope = shard(0) if call.argument("reduction") == _NONE else REPLICATED
    rows = (slope, shard(0), shard(0), REPLICATED)
    words = (REPLICATED, shard(1), REPLICATED, REPLICATED)
    for inputs, form in ((rows, None), (words, _backward_of_words)):
        strategy = Strategy(inputs, (inputs[1],), form, share=1 / call.ranks)
        if fits(call, strategy):
            yield strategy


def _backward_of_words(local: Local) -> tuple[fx.Node | None, ...]:
    gradient, logs, target, weight, reduction, ignored, count = local.args
    own = _own_targets(local, target, logs.meta["val"].shape[1], ignored)
    args: tuple[Any, ...] = (gradient, logs, own, weight, reduction, ignored, count)
    return (local.editor.call(aten.nll_loss_backward.default, *args),)


def _own_words(local: Local, ids: fx.Node, rows: int) -> tuple[fx.Node, fx.Node]:
    """(numbers of words in this rank's rows, 0 for other words; which those are)."""
    editor = local.editor
    first = editor.call(operator.mul, local.coordinate(), rows)
    shifted = editor.call(aten.sub.Tensor, ids, first)
    below = editor.call(aten.lt.Scalar, shifted, 0)
    outside = editor.call(aten.bitwise_or.Tensor, below, editor.call(aten.ge.Scalar, shifted, rows))
    return editor.call(aten.masked_fill.Scalar, shifted, outside, 0), outside


def _own_targets(local: Local, target: fx.Node, words: int, ignored: int) -> fx.Node:
    """Targets by this rank's words; those of other ranks are ignored, as those are that were before."""
    own, outside = _own_words(local, target, words)
    before = local.editor.call(aten.eq.Scalar, target, ignored)
    outside = local.editor.call(aten.bitwise_or.Tensor, outside, before)
    return local.editor.call(aten.masked_fill.Scalar, own, outside, ignored)


def _rows(shape: tuple[int, ...], dim: int) -> int:
    count = 1
    for index, size in enumerate(shape):
        count *= 1 if index == dim else size
    return count
