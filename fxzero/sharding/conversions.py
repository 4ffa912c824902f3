"""From one placement of a value to another: the collective that does it, and what it costs.

[Note: conversions]
    R -> S(d)       each rank keeps its part                    S(d) -> R       all-gather
    R -> P(sum)     rank 0 keeps it, others have zeros          P(sum) -> R     all-reduce
    R -> P(max)     as it is                                    P(max) -> R     all-reduce of the greatest
    S(d) -> P(sum)  zeros but for the own part                  P(sum) -> S(d)  reduce-scatter
    S(d) -> S(e)    all-to-all                                  P(norm2) -> R   squares are added up
Rows of experts, E(d, m of n), are taken from R and put into P(sum); from others and to others it goes through these.
S(d, k), parts of k blocks, is made of the same placements and becomes those, other than S(d) and P.
Collectives work along dim 0 of contiguous tensors, so parts along another dim are brought to the front by a copy,
unless the dims before it have one element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from fxzero.graph import collectives as c10d
from fxzero.graph import ops, routing_ops
from fxzero.graph.axis_placement import REPLICATED, Placement, local_shape, partial
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
    "gather_take": "all_gather",
    "reduce_take": "all_reduce",
    "lay": None,
    "lay_reduce": "all_reduce",
    "lay_scatter": "reduce_scatter",
}
# kinds of two placements -> what is done, of rows of experts
OF_ROWS = {"RE": "take", "SE": "gather_take", "PE": "reduce_take"}
OF_ROWS |= {"EP": "lay", "ER": "lay_reduce", "ES": "lay_scatter"}


def conversion(before: Placement, after: Placement) -> str | None:
    """What makes a value lie in another way; None where nothing does."""
    kinds = before.kind + after.kind
    if "E" in kinds:
        sums = {lies.reduction for lies in (before, after) if lies.is_partial} <= {"sum"}
        return OF_ROWS.get(kinds) if sums else None
    if before.blocks * after.blocks != 1 and (kinds == "SP" or (kinds == "SS" and before.dim == after.dim)):
        return None
    if kinds == "PR":
        return {"sum": "reduce", "max": "greatest", "norm2": "norm"}[before.reduction]
    if kinds == "RP":
        return {"sum": "own", "max": "as_is"}.get(after.reduction)
    if kinds in ("PS", "SP"):
        sums = (before if before.is_partial else after).reduction == "sum"
        return ("scatter" if kinds == "PS" else "put") if sums else None
    return {"RS": "keep", "SR": "gather", "SS": "exchange"}.get(kinds)


def copied_bytes(shape: tuple[int, ...], itemsize: int, before: Placement, after: Placement, ranks: int) -> float:
    """Bytes that a rank writes to bring parts to the front and back, beside what a collective does.

    Args:
        shape: of the whole.
        itemsize: bytes of an element.
        before, after: the placements.
        ranks: of the axis.
    """
    done, whole = conversion(before, after), itemsize * math.prod(shape)
    if before.is_routed:
        return whole + (copied_bytes(shape, itemsize, partial(), after, ranks) if after.kind != "P" else 0.0)
    if after.is_routed:
        own = whole * after.share(ranks)
        return own + (copied_bytes(shape, itemsize, before, REPLICATED, ranks) if before.kind != "R" else 0.0)
    if done in ("keep", "own", "put"):
        return whole / ranks if done == "keep" else whole
    if done == "exchange":
        return 2 * whole / ranks
    if done == "gather":
        return whole if math.prod(shape[: before.dim]) > 1 or before.blocks > 1 else 0.0
    is_moved = math.prod(shape[: after.dim]) > 1 or after.blocks > 1
    return whole if done == "scatter" and is_moved else 0.0


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
    """Insert what makes this rank's part of a value lie in another way.

    Args:
        editor: where to.
        value: what this rank holds.
        shape: of the whole value.
        before, after: how it lies, and how it shall.
        axis: over which.
        of_rows: of rows of experts, whose they are.
    """
    if before.is_routed:
        assert of_rows is not None
        dtype = value.meta["val"].dtype
        summand = _laid(editor, _sendable(editor, value), before, axis, of_rows)
        return _of_dtype(editor, convert(editor, summand, shape, partial(), after, axis), dtype)
    if after.is_routed:
        assert of_rows is not None
        return _taken(editor, convert(editor, value, shape, before, REPLICATED, axis), after, axis, of_rows)
    if before == after:
        return value
    done = conversion(before, after)
    stem = f"{value.name}_{axis.name}"
    if done == "as_is":
        return value
    if done == "keep":
        return _kept(editor, value, after, axis, f"{stem}_part")
    if done == "own":
        return editor.call(ops.on_rank, value, 0, axis.coordinate, name=f"{stem}_own")
    if done == "put":
        return editor.call(ops.put_part, value, before.dim, axis.ranks, axis.coordinate, name=f"{stem}_put")
    if done == "gather":
        return _gathered(editor, value, shape, before, axis, stem)
    if done == "reduce":
        return editor.all_reduce(value, axis.name, op="sum", stem=stem)
    if done == "greatest":
        return editor.all_reduce(value, axis.name, op="max", stem=stem)
    if done == "norm":
        squared = editor.call(aten.pow.Tensor_Scalar, value, 2)
        return editor.call(aten.sqrt.default, editor.all_reduce(squared, axis.name, op="sum", stem=stem))
    if done == "scatter":
        return _scattered(editor, value, local_shape(shape, after, axis.ranks), after, axis, stem)
    assert done == "exchange", (before, after)
    return _exchanged(editor, value, shape, before, after, axis, stem)


def _taken(editor: Editor, whole: fx.Node, lies: Placement, axis: Axis, of_rows: OfRows) -> fx.Node:
    ends, place, stem = of_rows.ends, (axis.ranks, axis.coordinate), f"{whole.name}_{axis.name}"
    if whole is ends:
        return editor.call(routing_ops.own_ends, ends, *place, of_rows.room, name=f"{stem}_own")
    return editor.call(routing_ops.take_rows, whole, ends, lies.dim, *place, lies.room, name=f"{stem}_taken")


def _laid(editor: Editor, value: fx.Node, lies: Placement, axis: Axis, of_rows: OfRows) -> fx.Node:
    place = (lies.dim, axis.ranks, axis.coordinate, lies.rows)
    return editor.call(routing_ops.put_rows, value, of_rows.ends, *place, name=f"{value.name}_{axis.name}_put")


def _kept(editor: Editor, value: fx.Node, lies: Placement, axis: Axis, name: str) -> fx.Node:
    if lies.blocks == 1:
        return editor.call(ops.local_part, value, lies.dim, axis.ranks, axis.coordinate, name=name)
    sizes, dim = list(value.meta["val"].shape), lies.dim
    blocks = _viewed(editor, value, [*sizes[:dim], lies.blocks, sizes[dim] // lies.blocks, *sizes[dim + 1 :]])
    part = editor.call(ops.local_part, blocks, dim + 1, axis.ranks, axis.coordinate, name=name)
    return _viewed(editor, part, [*sizes[:dim], sizes[dim] // axis.ranks, *sizes[dim + 1 :]])


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
    sent = _to_front(editor, value, lies, axis.ranks)
    launch = editor.call(c10d.reduce_scatter, sent, "sum", axis.ranks, axis.name, name=f"{stem}_scatter")
    return _viewed(editor, editor.call(c10d.wait, launch, name=f"{stem}_part"), list(part))


def _exchanged(
    editor: Editor, value: fx.Node, shape: tuple[int, ...], lies: Placement, to: Placement, axis: Axis, stem: str
) -> fx.Node:
    value, dtype = _sendable(editor, value), value.meta["val"].dtype
    part = list(value.meta["val"].shape)
    part[to.dim] //= axis.ranks
    sent = _to_front(editor, value, to, axis.ranks)
    rows = sent.meta["val"].shape[0] // axis.ranks
    splits = [rows] * axis.ranks
    launch = editor.call(c10d.all_to_all, sent, splits, splits, axis.name, name=f"{stem}_exchange")
    received = editor.call(c10d.wait, launch, name=f"{stem}_received")
    after = list(shape)
    after[to.dim] //= axis.ranks
    return _of_dtype(editor, _from_front(editor, received, part, after, lies, axis.ranks), dtype)


def _sendable(editor: Editor, value: fx.Node) -> fx.Node:
    """Truth values as bytes: not every backend sends them."""
    is_bool = value.meta["val"].dtype is torch.bool
    return editor.call(aten._to_copy.default, value, dtype=torch.uint8) if is_bool else value


def _of_dtype(editor: Editor, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    same = value.meta["val"].dtype is dtype
    return value if same else editor.call(aten._to_copy.default, value, dtype=dtype)


def _to_front(editor: Editor, value: fx.Node, lies: Placement, ranks: int) -> fx.Node:
    """The parts along a dim one after the other, each contiguous: dim 0 counts them times the rows of each."""
    sizes, dim = list(value.meta["val"].shape), lies.dim
    part = [*sizes[:dim], sizes[dim] // ranks, *sizes[dim + 1 :]]
    if math.prod(sizes[:dim]) * lies.blocks > 1:
        blocks = [] if lies.blocks == 1 else [lies.blocks]
        each = sizes[dim] // (lies.blocks * ranks)
        split = _viewed(editor, value, [*sizes[:dim], *blocks, ranks, each, *sizes[dim + 1 :]])
        at = dim + len(blocks)
        order = [at, *(other for other in range(split.meta["val"].dim()) if other != at)]
        value = editor.call(aten.permute.default, split, order)
    return _viewed(editor, value, [ranks * part[0], *part[1:]] if dim or len(part) else part)


def _from_front(
    editor: Editor, value: fx.Node, part: list[int], shape: list[int], lies: Placement, ranks: int
) -> fx.Node:
    """The opposite: parts that lie one after the other, joined along a dim."""
    dim = lies.dim
    if math.prod(part[:dim]) * lies.blocks > 1:
        blocks = [] if lies.blocks == 1 else [lies.blocks]
        split = _viewed(editor, value, [ranks, *part[:dim], *blocks, part[dim] // lies.blocks, *part[dim + 1 :]])
        at = dim + len(blocks)
        value = editor.call(
            aten.permute.default, split, [*range(1, at + 1), 0, *range(at + 1, len(part) + 1 + len(blocks))]
        )
    return _viewed(editor, value, shape)


def _viewed(editor: Editor, value: fx.Node, shape: list[int]) -> fx.Node:
    """A contiguous tensor of this shape with these elements, copied where there is no other way."""
    value = editor.contiguous(value)
    return value if list(value.meta["val"].shape) == shape else editor.call(aten.view.default, value, shape)
