"""From one placement of a value to another: the collective that does it, and what it costs.

[Note: conversions]
    R -> S(d)       each rank keeps its part                    S(d) -> R       all-gather
    R -> P(sum)     rank 0 keeps it, others have zeros          P(sum) -> R     all-reduce
    R -> P(max)     as it is                                    P(max) -> R     all-reduce of the greatest
    S(d) -> P(sum)  zeros but for the own part                  P(sum) -> S(d)  reduce-scatter
    S(d) -> S(e)    all-to-all                                  P(norm2) -> R   squares are added up
Each of these holds for shards of several blocks. Between S(d) and S(d, k) there is none: which ranks send to which
depends on the rank, and a graph is the same on all. So these go by way of a shard of another dim, two all-to-alls that
move 2 / n of the value over n ranks; where there is no such dim, or two ranks only, by way of the whole.
Rows of experts, E(d, m of n), are taken from R and put into P(sum); from others and to others it goes by way of these.
Collectives work along dim 0 of contiguous tensors, so parts along another dim are brought to the front by a copy,
unless they are of one block and the dims before it have one element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero.graph import collectives as c10d
from fxzero.graph import ops, routing_ops
from fxzero.graph.axis_placement import REPLICATED, Placement, divides, local_shape, partial, shard
from fxzero.graph.edit import Editor

aten = torch.ops.aten

# what is done -> the collective in it, as `cost.communication` names it; None: nothing travels
ALGORITHMS = {
    "keep": None,
    "as_is": None,
    "own": None,
    "put": None,
    "gather": "all_gather",
    "reduce": "all_reduce",
    "greatest": "all_reduce",
    "norm": "all_reduce",
    "scatter": "reduce_scatter",
    "exchange": "all_to_all",
    "take": None,
    "lay": None,
}


def conversion(before: Placement, after: Placement) -> str | None:
    """What makes a value lie in another way; None where nothing does at once (see `route`)."""
    kinds = before.kind + after.kind
    if kinds == "PR":
        return {"sum": "reduce", "max": "greatest", "norm2": "norm"}[before.reduction]
    if kinds == "RP":
        return {"sum": "own", "max": "as_is"}.get(after.reduction)
    if kinds in ("PS", "SP"):
        sums = (before if before.is_partial else after).reduction == "sum"
        return ("scatter" if kinds == "PS" else "put") if sums else None
    if kinds == "SS" and before.dim == after.dim:
        return None
    if kinds == "EP":
        return "lay" if after.reduction == "sum" else None
    return {"RS": "keep", "SR": "gather", "SS": "exchange", "RE": "take"}.get(kinds)


def route(shape: tuple[int, ...], before: Placement, after: Placement, ranks: int) -> tuple[Placement, ...]:
    """How a value lies after each conversion on its way from one placement to another; () where there is no way.

    Args:
        shape: of the whole.
        before, after: two placements.
        ranks: of the axis.
    """
    if not divides(shape, after, ranks):
        return ()
    if conversion(before, after) is not None:
        return (after,)
    if before.is_routed != after.is_routed and not (before.is_routed and after.is_partial):
        return (partial() if before.is_routed else REPLICATED, after)
    if not (before.is_shard and after.is_shard) or before == after:
        return ()
    others = (shard(dim) for dim in range(len(shape)) if dim != before.dim)
    found = [other for other in others if divides(shape, other, ranks)]
    return (found[0] if found and ranks > 2 else REPLICATED, after)


def copied_bytes(shape: tuple[int, ...], itemsize: int, before: Placement, after: Placement, ranks: int) -> float:
    """Bytes that a rank writes to bring parts to the front and back, beside what a collective does.

    Args:
        shape: of the whole.
        itemsize: bytes of an element.
        before, after: the placements.
        ranks: of the axis.
    """
    done, whole = conversion(before, after), itemsize * math.prod(shape)
    if done in ("keep", "own", "put", "take", "lay"):
        return whole * after.share(ranks)
    if done == "exchange":
        return 2 * whole / ranks
    if done == "gather":
        return whole if math.prod(shape[: before.dim]) * before.blocks > 1 else 0.0
    return whole if done == "scatter" and math.prod(shape[: after.dim]) * after.blocks > 1 else 0.0


@dataclass(frozen=True)
class Axis:
    """The mesh axis that values are converted over.

    Args:
        name: of the axis.
        ranks: on it.
        coordinate: the input that holds this rank's index.
    """

    name: str
    ranks: int
    coordinate: fx.Node


@dataclass(frozen=True)
class OfRows:
    """Whose rows of experts they are that are converted.

    Args:
        ends: yields where each expert's rows end, whole.
        room: for how many rows a rank has room.
    """

    ends: fx.Node
    room: int


def convert(
    editor: Editor,
    value: fx.Node,
    shape: tuple[int, ...],
    before: Placement,
    after: Placement,
    axis: Axis,
    *,
    of_rows: OfRows | None = None,
) -> fx.Node:
    """Insert the one conversion that makes this rank's part of a value lie in another way.

    Args:
        editor: where to.
        value: what this rank holds.
        shape: of the whole value.
        before, after: how it lies, and how it shall.
        axis: over which.
        of_rows: of rows of experts, whose they are.
    """
    done = conversion(before, after)
    stem = f"{value.name}_{axis.name}"
    if done == "as_is":
        return value
    if done == "keep":
        return editor.call(ops.local_part, value, *_parts_of(after, axis), name=f"{stem}_part")
    if done == "own":
        return editor.call(ops.on_rank, value, 0, axis.coordinate, name=f"{stem}_own")
    if done == "put":
        return editor.call(ops.put_part, value, *_parts_of(before, axis), name=f"{stem}_put")
    if done == "gather":
        return _gathered(editor, value, shape, before, axis, stem)
    if done in ("take", "lay"):
        assert of_rows is not None
        return (_taken if done == "take" else _laid)(editor, value, before, after, axis, of_rows)
    if done == "reduce":
        summed = editor.all_reduce(_sendable(editor, value), axis.name, op="sum", stem=stem)
        return _of_dtype(editor, summed, value.meta["val"].dtype)
    if done == "greatest":
        return editor.all_reduce(value, axis.name, op="max", stem=stem)
    if done == "norm":
        squared = editor.call(aten.pow.Tensor_Scalar, value, 2)
        return editor.call(aten.sqrt.default, editor.all_reduce(squared, axis.name, op="sum", stem=stem))
    if done == "scatter":
        return _scattered(editor, value, local_shape(shape, after, axis.ranks), after, axis, stem)
    assert done == "exchange", (before, after)
    return _exchanged(editor, value, shape, before, after, axis, stem)


def _taken(editor: Editor, whole: fx.Node, before: Placement, after: Placement, axis: Axis, of_rows: OfRows) -> fx.Node:
    ends, place, stem = of_rows.ends, (axis.ranks, axis.coordinate), f"{whole.name}_{axis.name}"
    if whole is ends:
        return editor.call(routing_ops.own_ends, ends, *place, of_rows.room, name=f"{stem}_own")
    return editor.call(routing_ops.take_rows, whole, ends, after.dim, *place, after.room, name=f"{stem}_taken")


def _laid(editor: Editor, part: fx.Node, before: Placement, after: Placement, axis: Axis, of_rows: OfRows) -> fx.Node:
    place = (before.dim, axis.ranks, axis.coordinate, before.rows)
    return editor.call(routing_ops.put_rows, part, of_rows.ends, *place, name=f"{part.name}_{axis.name}_put")


def _parts_of(lies: Placement, axis: Axis) -> tuple[Any, ...]:
    """The arguments of `local_part` and `put_part` behind the tensor."""
    parts = (lies.dim, axis.ranks, axis.coordinate)
    return parts if lies.blocks == 1 else (*parts, lies.blocks)


def _gathered(
    editor: Editor, value: fx.Node, shape: tuple[int, ...], lies: Placement, axis: Axis, stem: str
) -> fx.Node:
    value, dtype = _sendable(editor, value), value.meta["val"].dtype
    part = list(value.meta["val"].shape)
    launch = editor.call(c10d.all_gather, editor.contiguous(value), axis.ranks, axis.name, name=f"{stem}_gather")
    whole = editor.call(c10d.wait, launch, name=f"{stem}_whole")
    return _of_dtype(editor, _from_front(editor, whole, part, list(shape), lies, axis.ranks), dtype)


def _scattered(
    editor: Editor, value: fx.Node, part: tuple[int, ...], lies: Placement, axis: Axis, stem: str
) -> fx.Node:
    sent, dtype = _to_front(editor, _sendable(editor, value), lies, axis.ranks), value.meta["val"].dtype
    launch = editor.call(c10d.reduce_scatter, sent, "sum", axis.ranks, axis.name, name=f"{stem}_scatter")
    return _of_dtype(editor, _viewed(editor, editor.call(c10d.wait, launch, name=f"{stem}_part"), list(part)), dtype)


def _exchanged(
    editor: Editor, value: fx.Node, shape: tuple[int, ...], before: Placement, after: Placement, axis: Axis, stem: str
) -> fx.Node:
    value, dtype = _sendable(editor, value), value.meta["val"].dtype
    part = list(local_shape(value.meta["val"].shape, after, axis.ranks))
    sent = _to_front(editor, value, after, axis.ranks)
    rows = sent.meta["val"].shape[0] // axis.ranks
    splits = [rows] * axis.ranks
    launch = editor.call(c10d.all_to_all, sent, splits, splits, axis.name, name=f"{stem}_exchange")
    received = editor.call(c10d.wait, launch, name=f"{stem}_received")
    made = list(local_shape(shape, after, axis.ranks))
    return _of_dtype(editor, _from_front(editor, received, part, made, before, axis.ranks), dtype)


def _sendable(editor: Editor, value: fx.Node) -> fx.Node:
    """Truth values as bytes: not every backend sends them."""
    is_bool = value.meta["val"].dtype is torch.bool
    return editor.call(aten._to_copy.default, value, dtype=torch.uint8) if is_bool else value


def _of_dtype(editor: Editor, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    same = value.meta["val"].dtype is dtype
    return value if same else editor.call(aten._to_copy.default, value, dtype=dtype)


def _to_front(editor: Editor, value: fx.Node, lies: Placement, ranks: int) -> fx.Node:
    """The parts of a shard one after the other, each contiguous: dim 0 counts them times the rows of each."""
    sizes = list(value.meta["val"].shape)
    dim, part = lies.dim, list(local_shape(sizes, lies, ranks))
    if math.prod(sizes[:dim]) * lies.blocks > 1:
        blocks = [lies.blocks] if lies.blocks > 1 else []
        split = _viewed(editor, value, [*sizes[:dim], *blocks, ranks, part[dim] // lies.blocks, *sizes[dim + 1 :]])
        at = dim + len(blocks)
        order = [at, *(other for other in range(len(sizes) + 1 + len(blocks)) if other != at)]
        value = editor.call(aten.permute.default, split, order)
    return _viewed(editor, value, [ranks * part[0], *part[1:]])


def _from_front(
    editor: Editor, value: fx.Node, part: list[int], shape: list[int], lies: Placement, ranks: int
) -> fx.Node:
    """The opposite: parts that lie one after the other, joined to what they are a shard's."""
    dim = lies.dim
    if math.prod(part[:dim]) * lies.blocks > 1:
        blocks = [lies.blocks] if lies.blocks > 1 else []
        split = _viewed(editor, value, [ranks, *part[:dim], *blocks, part[dim] // lies.blocks, *part[dim + 1 :]])
        at = dim + len(blocks)
        order = [*range(1, at + 1), 0, *range(at + 1, len(part) + 1 + len(blocks))]
        value = editor.call(aten.permute.default, split, order)
    return _viewed(editor, value, shape)


def _viewed(editor: Editor, value: fx.Node, shape: list[int]) -> fx.Node:
    """A contiguous tensor of this shape with these elements, copied where there is no other way."""
    return editor.viewed(editor.contiguous(value), shape)
