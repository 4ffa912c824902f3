"""Losses that compare two tensors element by element: each rank compares a part, and sums or means are added up."""

from __future__ import annotations

from collections.abc import Iterator

from fxzero.graph.axis_placement import REPLICATED, partial, shard
from fxzero.sharding.reductions import share_of_mean
from fxzero.sharding.strategy import Call, Strategy, fits

_NONE, _MEAN = 0, 1  # as `reduction` says it


def loss(call: Call) -> Iterator[Strategy]:
    """The ways of a loss of two tensors of one shape."""
    reduction = call.argument("reduction", _MEAN)
    if len({tensor.shape for tensor in call.tensors}) != 1:
        return
    for dim in range(len(call.tensors[0].shape)):
        lies = shard(dim)
        form = share_of_mean if reduction == _MEAN else None
        output = lies if reduction == _NONE else partial()
        strategy = Strategy((lies,) * len(call.tensors), (output,), form, share=1 / call.ranks, in_blocks=True)
        if fits(call, strategy):
            yield strategy


def loss_backward(call: Call) -> Iterator[Strategy]:
    """The ways of its gradient: (that of the loss, both tensors) -> that of the first."""
    reduction = call.argument("reduction", _MEAN)
    slope, *compared = call.tensors
    if len({tensor.shape for tensor in compared}) != 1:
        return
    for dim in range(len(compared[0].shape)):
        lies = shard(dim)
        form = share_of_mean if reduction == _MEAN else None
        first = lies if slope.shape == compared[0].shape else REPLICATED
        strategy = Strategy((first, *(lies for _ in compared)), (lies,), form, share=1 / call.ranks, in_blocks=True)
        if fits(call, strategy):
            yield strategy
