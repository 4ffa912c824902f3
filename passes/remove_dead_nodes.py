"""Nothing runs whose value nobody reads."""

from __future__ import annotations

from fxzero.graph import StepGraph
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import erase_dead


@graph_pass(requires=("captured",))
def remove_dead_nodes(step: StepGraph) -> int:
    """Erase calls without readers; random ones (they advance the generator) and releases stay."""
    return erase_dead(step)
