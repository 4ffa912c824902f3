"""Whether the rows of experts have had room: asked once a step, before anything is updated.

[Note: room for rows]
Which experts tokens go to is known on the device, when forward has run. Sizes are fixed before, so a rank either has
room for all rows, or may get more than it has room for. Then forward and backward go on with those for which there is
room, and the step ends with an error: no row is ever left out in silence. How many rows each rank has is known to all
ranks of the axis, since the ends of rows are whole; ranks with other batches learn it by a reduction of a few numbers,
so that all raise the same error and none waits for one that did. What is asked stands behind forward, and before every
update in each order of the program.
Where rows go by all-to-all, there is room for so many from each rank to each other; that is asked, too. A factor with
which there is room for the rows of each pair is enough for the rows of each rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero.graph import StepGraph, routing_ops, row_exchange_ops
from fxzero.graph.axis_placement import placement_of
from fxzero.graph.edit import Editor

aten = torch.ops.aten

_OTHER_BATCHES = ("dp", "dp_replicate")


@dataclass(frozen=True)
class _Room:
    """For how many rows there is room at each place of some.

    Args:
        name: of the layer.
        places: how many: the ranks, or all pairs of them.
        room: at each.
        number: how many rows there are at all places together.
    """

    name: str
    places: int
    room: int
    number: int


def check_rooms(step: StepGraph, axis: str) -> int:
    """Let a step end with an error where there are more rows of experts than room; returns how many places it asks.

    Args:
        step: as it is split over the axis.
        axis: the mesh axis of the experts.
    """
    of_ranks, of_pairs = _of_ranks(step, axis), _of_pairs(step, axis)
    if not of_ranks and not of_pairs:
        return 0
    ranks, editor = step.mesh[axis], Editor(step, phase="forward")
    counts: list[fx.Node] = []
    with editor.before(_behind_forward(step, {*of_ranks, *(wanted for wanted, *_ in of_pairs)})):
        if of_pairs:
            columns = [list(column) for column in zip(*of_pairs, strict=True)]
            counts.append(editor.call(row_exchange_ops.rows_by_pair, *columns, ranks, name="rows_by_pair"))
        if of_ranks:
            counts.append(editor.call(routing_ops.rows_by_rank, [*of_ranks], ranks, name="rows_by_rank"))
        flat = [editor.call(aten.view.default, each, [-1]) for each in counts]
        rows = editor.call(aten.cat.default, flat) if len(flat) > 1 else flat[0]
        for other in _OTHER_BATCHES:
            if step.mesh.get(other, 1) > 1:
                rows = editor.all_reduce(rows, other, op="max", stem=f"{counts[0].name}_{other}")
        asked = [*of_pairs.values(), *of_ranks.values()]
        columns = [[each.places for each in asked], [each.room for each in asked], [each.number for each in asked]]
        editor.call(routing_ops.check_room, rows, *columns, ranks, axis, [each.name for each in asked])
    return 1


def _behind_forward(step: StepGraph, needed: set[fx.Node]) -> fx.Node:
    """The first node that is not of forward, and behind what is needed."""
    missing = set(needed)
    for node in step.graph.nodes:
        if not missing and (node.op == "output" or node.meta["phase"] != "forward"):
            return node
        missing.discard(node)
    raise AssertionError("a graph ends with its output")


def _of_ranks(step: StepGraph, axis: str) -> dict[fx.Node, _Room]:
    """What holds the ends of the rows of experts -> the room for those that a product takes by them, if not for all."""
    found: dict[fx.Node, _Room] = {}
    for own in step.calls(routing_ops.own_ends):
        (ends, *_), products = own.args, list(own.users)
        rows = products[0].args[0]
        assert isinstance(ends, fx.Node) and isinstance(rows, fx.Node)
        lies = placement_of(rows, axis)
        if lies.room < lies.rows:
            found.setdefault(ends, _Room(_layer(ends), step.mesh[axis], lies.room, lies.rows))
    return found


def _of_pairs(step: StepGraph, axis: str) -> dict[tuple[Any, ...], _Room]:
    """(row numbers that are asked for, ends, how many rows there are, whether slots lie by expert) -> the room."""
    found: dict[tuple[Any, ...], _Room] = {}
    for sent in step.calls(row_exchange_ops.rows_to_send):
        wanted, ends, _, _, rows, room, by_expert = sent.args
        assert isinstance(wanted, fx.Node) and isinstance(ends, fx.Node) and isinstance(room, int)
        number = wanted.meta["val"].shape[0]
        found[wanted, ends, rows, by_expert] = _Room(_layer(ends), step.mesh[axis] ** 2, room, number)
    return found


def _layer(ends: fx.Node) -> str:
    return ends.meta["module"] or "the model"
