"""Views that split and join dims: where the parts of a split dim are then.

[Note: dims that are split and joined]
A view keeps the order of elements. So its input's dims and its output's fall into groups with equal numbers of
elements, and within a group a shard is told by the number of its blocks: S(d, k) splits each of (sizes before d in the
group) * k runs of elements. An output dim is split in the same way where the sizes before it in its group divide that
number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from fxzero import compat
from fxzero.graph.axis_placement import REPLICATED, Placement, divides, partial, shard
from fxzero.sharding.strategy import Call, Strategy, Tensor

VIEWS = ("aten::view", "aten::_unsafe_view", "aten::reshape")


def views(call: Call) -> Iterator[Strategy]:
    """The ways of `view`, `_unsafe_view` and `reshape`."""
    (tensor,), (output,) = call.tensors, call.outputs
    assert output is not None
    yield Strategy((REPLICATED,), (REPLICATED,))
    yield Strategy((partial(),), (partial(),))
    for before in _shards(tensor, call):
        after = seen_through(tensor.shape, output.shape, before, call.ranks)
        if after is not None:
            yield Strategy((before,), (after,), share=1 / call.ranks)
    for after in _shards(output, call) if max(call.blocks) > 1 else ():
        seen = seen_through(output.shape, tensor.shape, after, call.ranks)
        if seen is not None:
            yield Strategy((seen,), (after,), share=1 / call.ranks)


def joined_rows(call: Call) -> Iterator[tuple[int, Placement]]:
    """How the rows of a view lie that joins the first two dims, or parts them, where the second of these is split.

    Args:
        call: any.

    Yields:
        (0 for what it takes, ~0 for what it yields: the one whose rows are joined; a shard of several blocks).
    """
    if not compat.is_op(call.target) or call.target.name() not in VIEWS:
        return
    (tensor,), (output,) = call.tensors, call.outputs
    assert output is not None
    for slot, apart, joined in ((~0, tensor.shape, output.shape), (0, output.shape, tensor.shape)):
        if len(apart) < 2 or not divides(apart, shard(1), call.ranks):
            continue
        lies = seen_through(apart, joined, shard(1), call.ranks)
        if lies == shard(0, apart[0]) and apart[0] > 1:
            yield slot, lies


def _shards(tensor: Tensor, call: Call) -> Iterator[Placement]:
    lies = (shard(dim, blocks) for blocks in call.blocks for dim in range(len(tensor.shape)))
    return (placement for placement in lies if divides(tensor.shape, placement, call.ranks))


def seen_through(before: Sequence[int], after: Sequence[int], placement: Placement, ranks: int) -> Placement | None:
    """How a tensor lies that is seen in another shape; None where ranks hold no parts of any dim of it.

    Args:
        before, after: the shapes.
        placement: a shard of the first.
        ranks: of the axis.
    """
    for ins, outs in _groups(before, after):
        if placement.dim not in ins:
            continue
        blocks = math.prod(before[dim] for dim in ins if dim < placement.dim) * placement.blocks
        for index, dim in enumerate(outs):
            leading = math.prod(after[other] for other in outs[:index])
            if blocks % leading == 0 and after[dim] % (blocks // leading * ranks) == 0:
                return shard(dim, blocks // leading)
    return None


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Dims of both shapes, from the left, in the smallest groups of equally many elements."""
    left, right = 0, 0
    while left < len(before) or right < len(after):
        ins: list[int] = []
        outs: list[int] = []
        here, there = 1, 1
        while True:
            if here == there and ins and outs and here > 1:
                break
            if here <= there and left < len(before):
                ins.append(left)
                here *= before[left]
                left += 1
            elif right < len(after):
                outs.append(right)
                there *= after[right]
                right += 1
            elif left < len(before):
                ins.append(left)
                here *= before[left]
                left += 1
            else:
                break
        yield ins, outs
