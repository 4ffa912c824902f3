"""Whether a gradient has overflowed, from the rows that each rank keeps: one small all-reduce for all gradients."""

from __future__ import annotations

import torch

from fxzero.graph import StepGraph, ops
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor
from fxzero.graph.step_graph import first_argument
from fxzero.passes.shard_optimizer_state import rows_for

aten = torch.ops.aten


@graph_pass(requires=("optimizer-state-sharded",), provides=("overflow-agreed",))
def agree_on_overflow(step: StepGraph, *, axis: str) -> int:
    """Look for infinities in rows instead of whole gradients, and let the ranks of `axis` agree on what they found.

    Args:
        step: the graph, whose update takes rows of reduced gradients.
        axis: the mesh axis of those rows.
    """
    edits = 0
    for flags in step.calls(aten.stack.default):
        looks = flags.all_input_nodes
        if not looks or any(look.target is not ops.nonfinite for look in looks):
            continue
        sharded = {look: rows for look in looks if (rows := rows_for(first_argument(look), axis)) is not None}
        for look, rows in sharded.items():
            look.replace_input_with(first_argument(look), rows)
        if sharded:
            readers = list(flags.users)
            editor = Editor(step, phase="update")
            with editor.after(flags):
                agreed = editor.all_reduce(flags, axis, op="max", stem="overflow")
            for reader in readers:
                reader.replace_input_with(flags, agreed)
            edits += len(sharded)
    return edits
