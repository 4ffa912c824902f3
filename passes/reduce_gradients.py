"""Data parallelism at its plainest: every gradient is averaged over the data-parallel ranks."""

from __future__ import annotations

from fxzero.graph import StepGraph
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor
from fxzero.graph.step_graph import identifier


@graph_pass(requires=("captured",), provides=("gradients-reduced",))
def reduce_gradients(step: StepGraph, *, axes: tuple[str, ...]) -> int:
    """Average each gradient over the given mesh axes, one all-reduce an axis, before the update reads it.

    Args:
        step: the graph.
        axes: the mesh axes over which the batch is split, the one that shards first.
    """
    edits = 0
    for name, gradient in step.gradients().items():
        readers = [user for user in gradient.users if user.op == "output" or user.meta["phase"] == "update"]
        if not readers:
            continue
        editor = Editor(step, phase="backward", module=gradient.meta["module"], param=name)
        reduced = gradient
        with editor.after(gradient):
            for axis in axes:
                stem = identifier(name) if axis == axes[0] else f"{identifier(name)}_{axis}"
                reduced = editor.all_reduce(reduced, axis, op="avg", stem=f"{stem}_grad")
                edits += 1
        for reader in readers:
            reader.replace_input_with(gradient, reduced)
    return edits
