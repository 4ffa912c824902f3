"""Nothing runs whose value nobody reads."""

from __future__ import annotations

from fxzero.graph import StepGraph
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import erase_dead


@graph_pass(requires=("captured",))
def remove_dead_nodes(step: StepGraph) -> int:
    """Erase calls and mesh coordinates without readers; random calls (they advance the generator) and releases stay."""
    removed = erase_dead(step)
    for node in step.inputs("coordinate"):
        if not node.users:
            step.graph.erase_node(node)
            removed += 1
    return removed
