"""ZeRO-2: a rank receives only its rows of each reduced gradient."""

from __future__ import annotations

from torch import fx

from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import Editor
from fxzero.graph.step_graph import identifier
from fxzero.passes.shard_optimizer_state import is_rows_of


@graph_pass(requires=("optimizer-state-sharded",), provides=("gradients-sharded",))
def shard_gradients(step: StepGraph) -> int:
    """Replace all-reduce followed by taking rows with a reduce-scatter (other axes reduce the rows afterwards).

    Source: ZeRO (Rajbhandari et al., 2020), section 5.
    """
    edits = 0
    for rows in [node for node in step.calls() if is_rows_of(node)]:
        chain = _reductions(rows)
        if chain is None:
            continue
        gradient, axes = chain
        sharding = rows.meta["sharding"]
        if sharding.axis not in axes:
            continue
        name = rows.meta["param"]
        editor = Editor(step, phase="backward", module=gradient.meta["module"], param=name)
        with editor.after(gradient):
            reduced = editor.reduce_scatter(gradient, sharding, op="avg", stem=f"{identifier(name)}_grad")
            for axis in axes:
                if axis != sharding.axis:
                    stem = f"{identifier(name)}_{axis}_grad"
                    reduced = editor.all_reduce(reduced, axis, op="avg", stem=stem, sharding=sharding)
        rows.replace_all_uses_with(reduced)
        edits += _erase_unused(step, rows)
    return edits


def _reductions(rows: fx.Node) -> tuple[fx.Node, tuple[str, ...]] | None:
    """The gradient and the axes of the all-reduces between it and `rows`, if that is all there is."""
    axes: list[str] = []
    node = rows.args[0]
    # A gradient may itself be waited for: it is added up or gathered over an axis that splits values.
    while isinstance(node, fx.Node) and "grad_of" not in node.meta and c10d.is_wait(node) and len(node.users) == 1:
        launch = c10d.launched_by(node)
        if launch.target is not c10d.all_reduce:
            return None
        axes.append(c10d.axis_of(launch))
        node = launch.args[0]
        if isinstance(node, fx.Node) and "grad_of" not in node.meta and not c10d.is_wait(node):
            node = node.args[0]  # the contiguous copy that a collective needs
    if not axes or not isinstance(node, fx.Node) or "grad_of" not in node.meta:
        return None
    return node, tuple(reversed(axes))


def _erase_unused(step: StepGraph, node: fx.Node) -> int:
    """Erase a node and what only it read; stops at gradients and inputs."""
    erased = 0
    stack = [node]
    while stack:
        dead = stack.pop()
        if dead.users or dead.op != "call_function" or "grad_of" in dead.meta:
            continue
        stack.extend(dead.all_input_nodes)
        step.graph.erase_node(dead)
        erased += 1
    return erased
