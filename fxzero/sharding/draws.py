"""Random numbers for a part of a tensor: those that one device would draw for it.

Every rank draws for the whole tensor and keeps its part. So what is dropped is what one device drops, to the bit, and
all ranks' generators stay in step; the price is the draw of the whole, a small part of what a block computes. The call
that draws stays in the graph under its name: the order of draws is part of what a step means.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from fxzero.graph import ops
from fxzero.graph.axis_placement import shard
from fxzero.sharding.strategy import Call, Local, Strategy, fits, replicated

aten = torch.ops.aten

# they take of their first tensor its shape and dtype alone
LIKE = (
    aten.bernoulli.p,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.randint_like.default,
    aten.randint_like.low_dtype,
)


def draws_like(call: Call) -> Iterator[Strategy]:
    """The ways of an op that draws numbers like a tensor."""
    yield replicated(call)
    for dim in range(len(call.tensors[0].shape)):

        def form(local: Local, dim: int = dim) -> tuple[fx.Node | None, ...]:
            editor, (like, *others) = local.editor, local.args
            whole = editor.call(aten.new_empty.default, like, list(call.tensors[0].shape))
            with local.made_of(whole, *others, **local.kwargs) as drawn:
                return (editor.call(ops.local_part, drawn, dim, call.ranks, local.coordinate()),)

        strategy = Strategy((shard(dim),), (shard(dim),), form)
        if fits(call, strategy):
            yield strategy


def dropout(call: Call) -> Iterator[Strategy]:
    """The ways of `native_dropout`, which is a mask that is drawn and a product with it."""
    yield replicated(call)
    for dim in range(len(call.tensors[0].shape)):

        def form(local: Local, dim: int = dim) -> tuple[fx.Node | None, ...]:
            editor, (x, p, train) = local.editor, local.args
            whole = editor.call(aten.new_ones.default, x, list(call.tensors[0].shape))
            with local.made_of(whole, p, train) as drawn:
                both = [editor.call(operator.getitem, drawn, index) for index in (0, 1)]
                index = local.coordinate()
                scaled, mask = (editor.call(ops.local_part, value, dim, call.ranks, index) for value in both)
                return editor.call(aten.mul.Tensor, x, scaled), mask

        strategy = Strategy((shard(dim),), (shard(dim), shard(dim)), form)
        if fits(call, strategy):
            yield strategy
