"""Means and maxima along a split dim: each rank's own, which are then added up or compared."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fxzero.graph.axis_placement import REPLICATED, partial, shard
from fxzero.sharding.dtensor_rules import by_dtensor
from fxzero.sharding.strategy import Call, Local, Message, Strategy, Tensor, fits

aten = torch.ops.aten


def reduced_dims(call: Call, tensor: Tensor) -> tuple[int, ...]:
    """The dims that a reduction goes along, as its argument `dim` says it: all of them where that is None or empty."""
    num = len(tensor.shape)
    named = any(argument.name == "dim" for argument in call.target._schema.arguments)
    dims = call.argument("dim") if named else None
    if isinstance(dims, int):
        dims = [dims]
    return tuple(dim % num for dim in dims) if dims else tuple(range(num))


def mean(call: Call) -> Iterator[Strategy]:
    """The ways of `mean`: by DTensor, and along a split dim, where each rank adds its share of the mean."""
    yield from by_dtensor(call)
    (tensor,) = call.tensors
    yield Strategy((partial(),), (partial(),))
    for dim in reduced_dims(call, tensor):
        strategy = Strategy((shard(dim),), (partial(),), share_of_mean, share=1 / call.ranks, in_blocks=True)
        if fits(call, strategy):
            yield strategy


def share_of_mean(local: Local) -> tuple[fx.Node | None, ...]:
    """The form of a mean, or of its gradient: a rank's own counts one of so many."""
    own = local.editor.call(local.call.target, *local.args, **local.kwargs)
    return (local.editor.call(aten.mul.Tensor, own, 1 / local.call.ranks),)


def amax(call: Call) -> Iterator[Strategy]:
    """The ways of `amax`: by DTensor, and along a split dim, where the greatest of all ranks is found at once."""
    yield from by_dtensor(call)
    (tensor,), (output,) = call.tensors, call.outputs
    assert output is not None
    messages = (Message("all_reduce", output.num_bytes),)
    for dim in reduced_dims(call, tensor):
        strategy = Strategy((shard(dim),), (REPLICATED,), _greatest, messages, share=1 / call.ranks, in_blocks=True)
        if fits(call, strategy):
            yield strategy


def _greatest(local: Local) -> tuple[fx.Node | None, ...]:
    own = local.editor.call(local.call.target, *local.args, **local.kwargs)
    return (local.all_reduce(own, "max"),)
