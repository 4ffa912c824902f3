"""Products of groups of rows with a matrix each, one for each expert: split along the columns, or along what is summed.

Where ranks have experts of their own, calls are made on the rows of these: `routing.py`.
Source: Megatron-LM (Shoeybi et al., 2019), section 3, for each expert by itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxzero.graph import routing_ops, row_exchange_ops
from fxzero.graph.axis_placement import REPLICATED, partial, shard
from fxzero.sharding.strategy import Call, Strategy, fits, replicated


def grouped_mm(call: Call) -> Iterator[Strategy]:
    """The ways of `grouped_mm(rows [T, K], weights [E, K, N], ends [E]) -> [T, N]`, and of the weights' gradient.

    That is `grouped_mm([K, T], [T, N], ends [E]) -> [E, K, N]`, a sum over the rows of each group.
    """
    yield replicated(call)
    dims = [len(tensor.shape) for tensor in call.tensors]
    if dims == [2, 3, 1]:
        columns = Strategy((REPLICATED, shard(2), REPLICATED), (shard(1),), share=1 / call.ranks)
        summed = Strategy((shard(1), shard(1), REPLICATED), (partial(),), share=1 / call.ranks)
    elif dims == [2, 2, 1]:
        columns = Strategy((REPLICATED, shard(1), REPLICATED), (shard(2),), share=1 / call.ranks)
        summed = Strategy((shard(0), REPLICATED, REPLICATED), (shard(1),), share=1 / call.ranks)
    else:
        return
    yield from (strategy for strategy in (columns, summed) if fits(call, strategy))


def grouped_mm_backward(call: Call) -> Iterator[Strategy]:
    """The ways of its gradient: (rows, weights, ends, gradient [T, N]) -> those of rows and weights."""
    yield replicated(call)
    columns = Strategy((REPLICATED, shard(2), REPLICATED, shard(1)), (partial(), shard(2)), share=1 / call.ranks)
    summed = Strategy((shard(1), shard(1), REPLICATED, REPLICATED), (shard(1), shard(1)), share=1 / call.ranks)
    yield from (strategy for strategy in (columns, summed) if fits(call, strategy))


def rows_of_experts(call: Call) -> Iterator[Strategy]:
    """The ways of the ops of rows of experts, and of rows by all-to-all, over another axis than that of the experts.

    Ends and counts are whole. What rows are taken of, or put into, lies as before along each other dim; summands stay
    summands.
    """
    yield replicated(call)
    if call.target in (routing_ops.take_rows, routing_ops.keep_rows, routing_ops.put_rows):
        of_rows = call.args[2]
    elif call.target in (row_exchange_ops.pick_rows, row_exchange_ops.add_rows):
        of_rows = 0
    else:
        return
    yield Strategy((partial(), REPLICATED), (partial(),))
    dims = (shard(dim) for dim in range(len(call.tensors[0].shape)) if dim != of_rows)
    ways = (Strategy((lies, REPLICATED), (lies,), share=1 / call.ranks) for lies in dims)
    yield from (strategy for strategy in ways if fits(call, strategy))
