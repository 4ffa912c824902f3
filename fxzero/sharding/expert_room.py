"""Whether the rows of experts have had room: asked once a step, before anything is updated.

[Note: room for rows]
Which experts tokens go to is known on the device, when forward has run. Sizes are fixed before, so a rank either has
room for all rows, or may get more than it has room for. Then forward and backward go on with those for which there is
room, and the step ends with an error: no row is ever left out in silence. How many rows each rank has is known to all
ranks of the axis, since the ends of rows are whole; ranks with other batches learn it by a reduction of a few numbers,
so that all raise the same error and none waits for one that did. What is asked stands behind forward, and before every
update in each order of the program.
"""

from __future__ import annotations

from torch import fx

from fxzero.graph import StepGraph, routing_ops
from fxzero.graph.axis_placement import Placement, placement_of
from fxzero.graph.edit import Editor

_OTHER_BATCHES = ("dp", "dp_replicate")


def check_rooms(step: StepGraph, axis: str) -> int:
    """Let a step end with an error where a rank has more rows of experts than room; returns how many places it asks.

    Args:
        step: as it is split over the axis.
        axis: the mesh axis of the experts.
    """
    short = {ends: lies for ends, lies in _rows(step, axis).items() if lies.room < lies.rows}
    if not short:
        return 0
    editor = Editor(step, phase="forward")
    behind = next(node for node in step.graph.nodes if node.op == "output" or node.meta["phase"] != "forward")
    with editor.before(behind):
        rows = editor.call(routing_ops.rows_by_rank, [*short], step.mesh[axis], name="rows_by_rank")
        for other in _OTHER_BATCHES:
            if step.mesh.get(other, 1) > 1:
                rows = editor.all_reduce(rows, other, op="max", stem=f"rows_by_rank_{other}")
        rooms, numbers = [lies.room for lies in short.values()], [lies.rows for lies in short.values()]
        names = [ends.meta["module"] or "the model" for ends in short]
        editor.call(routing_ops.check_room, rows, rooms, numbers, axis, names)
    return 1


def _rows(step: StepGraph, axis: str) -> dict[fx.Node, Placement]:
    """What holds the ends of the rows of experts -> how the rows lie that a product takes by them."""
    found: dict[fx.Node, Placement] = {}
    for own in step.calls(routing_ops.own_ends):
        (ends, *_), products = own.args, list(own.users)
        rows = products[0].args[0]
        assert isinstance(ends, fx.Node) and isinstance(rows, fx.Node)
        found.setdefault(ends, placement_of(rows, axis))
    return found
