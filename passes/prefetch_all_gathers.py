"""A gather is launched before its parameter is needed, so that it travels under compute."""

from __future__ import annotations

from torch import fx

from fxzero.graph import PHASES, StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.contract import graph_pass
from fxzero.graph.edit import move_launch


@graph_pass(requires=("parameters-sharded",), provides=("gathers-prefetched",))
def prefetch_all_gathers(step: StepGraph, *, distance: int) -> int:
    """Launch each bucket of gathers before the first wait of the bucket `distance` ahead of it.

    Not before its own phase begins: the last weights of forward, the first of backward, would be alive twice.

    Source: FSDP2's implicit prefetch, which is `distance` 1.

    Args:
        step: the graph.
        distance: buckets in flight; 0 launches a gather where it is needed.
    """
    if distance == 0:
        return 0
    buckets = _buckets(step)
    starts = [first_wait for first_wait, _ in buckets]
    phase_starts = {phase: nodes[0] for phase in PHASES if (nodes := step.phase(phase))}
    edits = 0
    for index, (_, launches) in enumerate(buckets):
        if index < distance:
            continue
        phase = launches[0].meta["phase"]
        anchor = starts[index - distance]
        if anchor.meta["phase"] != phase:
            anchor = phase_starts[phase]
        for launch in launches:
            if launch is not anchor:
                move_launch(launch, before=anchor)
                edits += 1
    return edits


def _buckets(step: StepGraph) -> list[tuple[fx.Node, list[fx.Node]]]:
    """(first wait, launches) of each bucket of parameter gathers outside the update, in program order."""
    buckets: list[tuple[fx.Node, list[fx.Node]]] = []
    launched: list[fx.Node] = []
    for node in step.calls():
        if node.meta["phase"] == "update":
            continue
        if c10d.gathers_parameters(node):
            launched.append(node)
        elif c10d.is_wait(node) and launched and c10d.launched_by(node) in launched:
            buckets.append((node, launched))
            launched = []
    return buckets
