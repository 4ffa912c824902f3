"""Pieces of a dim: joined, and cut. Where they are equal, a shard of each is a shard of several blocks of the whole.

A dim of the whole that is split in so many blocks is one whose pieces are split, too, if each piece begins and ends
where a block does: with their share of the blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from fxzero import compat
from fxzero.graph.axis_placement import REPLICATED, Placement, shard
from fxzero.sharding.dtensor_rules import by_dtensor
from fxzero.sharding.strategy import Call, Strategy, Tensor, called_with, fits

_EMPTY = (0,)  # the shape of what torch joins with tensors of any shape
_ALONG_A_DIM = (
    "aten::cat",
    "aten::split.Tensor",
    "aten::split_with_sizes",
    "aten::slice.Tensor",
    "aten::slice_backward",
)


def cat(call: Call) -> Iterator[Strategy]:
    """The ways of `cat`: by DTensor, of pieces that are not empty; and along its dim."""
    pieces = list(call.tensors)
    joined = dataclasses.replace(call, args=([t for t in pieces if t.shape != _EMPTY], *call.args[1:]))
    if joined.tensors:
        for strategy in by_dtensor(joined):
            yield _with_empty(pieces, strategy.inputs, strategy.outputs)
    (whole,) = call.outputs
    assert whole is not None
    for dim, lies in _shards_along(call, whole):
        shares = [share_of(lies, tensor.shape[dim], whole.shape[dim]) for tensor in joined.tensors]
        found = tuple(share for share in shares if share is not None)
        if len(found) < len(shares):
            continue
        strategy = _with_empty(pieces, found, (lies,))
        if fits(call, strategy):
            yield strategy


def _with_empty(pieces: list[Tensor], inputs: tuple[Placement, ...], outputs: tuple[Placement | None, ...]) -> Strategy:
    lies = iter(inputs)
    return Strategy(tuple(REPLICATED if piece.shape == _EMPTY else next(lies) for piece in pieces), outputs)


def split(call: Call) -> Iterator[Strategy]:
    """The ways of `split` and `split_with_sizes`: by DTensor, and along its dim."""
    yield from by_dtensor(call)
    (whole,) = call.tensors
    named = "split_sizes" if "sizes" in call.target.name() else "split_size"
    sizes = call.argument(named)
    each = [size // call.ranks for size in sizes] if isinstance(sizes, (list, tuple)) else sizes // call.ranks
    for dim, lies in _shards_along(call, whole):
        shares = tuple(share_of(lies, output.shape[dim], whole.shape[dim]) for output in call.outputs if output)
        yield from _fitting(call, (lies,), shares, {named: each})


def slice_of(call: Call) -> Iterator[Strategy]:
    """The ways of `slice`: by DTensor, and of a piece that begins and ends where blocks do."""
    yield from by_dtensor(call)
    (whole,), (piece,) = call.tensors, call.outputs
    assert piece is not None
    for dim, lies in _shards_along(call, whole):
        share = _share_of_slice(call, whole, piece, lies)
        yield from _fitting(call, (lies,), (share,), _local_bounds(call, whole, piece, dim))


def slice_backward(call: Call) -> Iterator[Strategy]:
    """The ways of `slice_backward`: by DTensor, and of a piece that begins and ends where blocks do."""
    yield from by_dtensor(call)
    (piece,), (whole,) = call.tensors, call.outputs
    assert whole is not None
    for dim, lies in _shards_along(call, whole):
        sizes = list(whole.shape)
        sizes[dim] //= call.ranks
        share = _share_of_slice(call, whole, piece, lies)
        if share is not None:
            bounds = _local_bounds(call, whole, piece, dim)
            yield from _fitting(call, (share,), (lies,), {"input_sizes": sizes, **bounds})


def share_of(lies: Placement, size: int, total: int) -> Placement | None:
    """How a piece of a dim lies where the whole dim is a shard of blocks; None where it is not of whole blocks.

    Args:
        lies: how the whole lies.
        size: of the piece.
        total: of the whole.
    """
    blocks = lies.blocks * size
    return shard(lies.dim, blocks // total) if size and blocks % total == 0 else None


def pieces_of(call: Call) -> tuple[bool, int, list[int]] | None:
    """(whether the call yields the whole, its dim, sizes of its pieces) of a call that joins or cuts; else None.

    Args:
        call: any.
    """
    name = call.target.name() if compat.is_op(call.target) else ""
    if name not in _ALONG_A_DIM or not call.tensors or call.outputs[0] is None:
        return None
    joins = name in ("aten::cat", "aten::slice_backward")
    whole = call.outputs[0] if joins else call.tensors[0]
    dim = call.argument("dim", 0) % max(1, len(whole.shape))
    if name.startswith("aten::slice"):
        first, size = _first(call, whole), (call.tensors[0] if joins else call.outputs[0]).shape[dim]
        return joins, dim, [first, size, whole.shape[dim] - first - size]
    pieces = call.tensors if joins else call.outputs
    return joins, dim, [piece.shape[dim] for piece in pieces if piece is not None and piece.shape != _EMPTY]


def _shards_along(call: Call, whole: Tensor) -> Iterator[tuple[int, Placement]]:
    """The call's dim, with each way of having blocks of it that is asked for."""
    dim = call.argument("dim", 0) % max(1, len(whole.shape))
    for blocks in call.blocks:
        if blocks > 1:
            yield dim, shard(dim, blocks)


def _first(call: Call, whole: Tensor) -> int:
    """Where a slice begins."""
    start, size = call.argument("start") or 0, whole.shape[call.argument("dim", 0)]
    return int(min(max(0, start + size if start < 0 else start), size))


def _share_of_slice(call: Call, whole: Tensor, piece: Tensor, lies: Placement) -> Placement | None:
    total = whole.shape[lies.dim]
    begins_a_block = _first(call, whole) * lies.blocks % total == 0
    return share_of(lies, piece.shape[lies.dim], total) if begins_a_block and call.argument("step", 1) == 1 else None


def _local_bounds(call: Call, whole: Tensor, piece: Tensor, dim: int) -> dict[str, Any]:
    first = _first(call, whole)
    return {"start": first // call.ranks, "end": (first + piece.shape[dim]) // call.ranks}


def _fitting(
    call: Call, inputs: tuple[Placement, ...], outputs: tuple[Placement | None, ...], changes: dict[str, Any]
) -> Iterator[Strategy]:
    if None in outputs:
        return
    strategy = Strategy(inputs, outputs, called_with(changes), share=1 / call.ranks)
    if fits(call, strategy):
        yield strategy
