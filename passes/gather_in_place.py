"""Gathers between ranks of one host read the rows of all where they rest, rather than copies of them."""

from __future__ import annotations

from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.shared_rows import gathers_in_place


@graph_pass(requires=("algorithms-chosen", "parameters-sharded"), provides=("gathers-in-place",), numerics="bitwise")
def gather_in_place(step: StepGraph) -> int:
    """Let gathers that shared memory carries copy nothing, where no rank can write what others still read.

    See [Note: rows side by side] in `graph/shared_rows.py`. What a gather yields then takes no memory, however early it
    is launched.

    Args:
        step: the graph, in an order in which releases and launches stay as they are to each other.

    Returns:
        How many gathers.
    """
    launches = [node for node in gathers_in_place(step) if c10d.carrier_of(node) == c10d.SHARED_MEMORY]
    for launch in launches:
        launch.meta["algorithm"] = c10d.SHARED_ROWS
    return len(launches)
