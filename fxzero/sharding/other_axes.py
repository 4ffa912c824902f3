"""What stands in a step that another axis has split already: its collectives, and ops that take or put parts.

[Note: one axis after another]
A step is split over sp, then over tp. What sp put in is then there as any other call: over tp it has ways, too. A
collective over sp joins, for each rank of tp, what that rank and its peers of sp hold. So it lets a value lie over tp
as it did, along every dim but the one that it works on; that one is a block for each rank of sp, of which a rank of tp
may have parts. Sums are linear, so summands over tp may be added up over sp first.
sp comes first, so that tp splits the tokens of a part further, and gathers them within it (Megatron's sequence
parallelism). Heads are the other way round: a rank of tp has the columns of its heads, and ranks of sp share these. So
where attention is split by heads over sp, they are a block for each rank of tp (`head_blocks`).
A wait is the value that it waits for: nothing can stand between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fxzero.graph import collectives as c10d
from fxzero.graph import ops
from fxzero.graph.axis_placement import partial, shard
from fxzero.sharding.strategy import Call, Strategy, fits, replicated

_LINEAR = ("sum", "avg")


def rules() -> dict[str, Callable[[Call], Iterator[Strategy]]]:
    """Name of an op -> the ways of its calls over another axis than its own."""
    return {
        c10d.all_gather.name(): _gather,
        c10d.reduce_scatter.name(): _scatter,
        c10d.all_reduce.name(): _reduce,
        c10d.all_to_all.name(): _exchange,
        ops.local_part.name(): _part,
        ops.put_part.name(): _put,
        ops.on_rank.name(): _on_rank,
    }


def _gather(call: Call) -> Iterator[Strategy]:
    yield from _through(call, reductions=("sum", "max", "norm2"), but=0)
    yield from _fitting(call, Strategy((shard(0),), (shard(0, call.args[1]),), share=1 / call.ranks))


def _scatter(call: Call) -> Iterator[Strategy]:
    yield from _through(call, reductions=_same(call), but=0)
    yield from _fitting(call, Strategy((shard(0, call.args[2]),), (shard(0),), share=1 / call.ranks))


def _reduce(call: Call) -> Iterator[Strategy]:
    yield from _through(call, reductions=_same(call))


def _exchange(call: Call) -> Iterator[Strategy]:
    yield from _through(call, reductions=("sum", "max", "norm2"), but=0)
    lies = shard(0, len(call.args[1]))
    yield from _fitting(call, Strategy((lies,), (lies,), share=1 / call.ranks))


def _part(call: Call) -> Iterator[Strategy]:
    dim, parts, blocks = call.args[1], call.args[2], call.argument("blocks", 1)
    yield from _through(call, reductions=("sum", "max", "norm2"), but=dim)
    yield from _fitting(call, Strategy((shard(dim, blocks * parts),), (shard(dim, blocks),), share=1 / call.ranks))


def _put(call: Call) -> Iterator[Strategy]:
    dim, parts, blocks = call.args[1], call.args[2], call.argument("blocks", 1)
    yield from _through(call, reductions=("sum",), but=dim)
    yield from _fitting(call, Strategy((shard(dim, blocks),), (shard(dim, blocks * parts),), share=1 / call.ranks))


def _on_rank(call: Call) -> Iterator[Strategy]:
    yield from _through(call, reductions=("sum",))


def _same(call: Call) -> tuple[str, ...]:
    """What may still be to be reduced over another axis, where a collective reduces: the same."""
    op = call.args[1]
    return ("sum",) if op in _LINEAR else ("max",) if op == "max" else ()


def _through(call: Call, *, reductions: tuple[str, ...], but: int = -1) -> Iterator[Strategy]:
    """The value lies afterwards as before, along each dim but one."""
    yield replicated(call)
    yield from (Strategy((partial(each),), (partial(each),)) for each in reductions)
    for dim in range(len(call.tensors[0].shape)):
        if dim != but:
            yield from _fitting(call, Strategy((shard(dim),), (shard(dim),), share=1 / call.ranks))


def _fitting(call: Call, strategy: Strategy) -> Iterator[Strategy]:
    if fits(call, strategy):
        yield strategy
