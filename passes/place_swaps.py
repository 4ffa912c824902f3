"""Moves of tensors travel under compute: launched ahead of their need, waited for when the next ones are launched.

[Note: units]
Moves are grouped, in program order, into units of about `bucket_bytes`. Unit i + distance is brought in when unit i is
first read; what unit i has sent out is waited for, and its memory free, when unit i + distance is sent. So at most
distance + 1 units are on their way in each direction, whatever the size of the model.
"""

from __future__ import annotations

from torch import fx

from fxzero.graph import StepGraph
from fxzero.graph.contract import graph_pass
from fxzero.graph.step_graph import first_argument, num_bytes
from fxzero.graph.swap_ops import swap_in, swap_out, wait_of


@graph_pass(requires=("updates-placed",), provides=("swaps-placed",))
def place_swaps(step: StepGraph, *, distance: int = 1, bucket_bytes: int = 0) -> int:
    """Launch each swap-in ahead of its first reader, and wait for each swap-out only when it must be done.

    Args:
        step: the graph, with each launch and its wait where the value is read or made.
        distance: units on their way, beside the one that is needed; 0 moves nothing.
        bucket_bytes: of a unit; 0: each tensor alone.
    """
    if distance == 0:
        return 0
    return _delay_waits(step, distance, bucket_bytes) + _launch_ahead(step, distance, bucket_bytes)


def _units(launches: list[fx.Node], bucket_bytes: int) -> list[list[fx.Node]]:
    units: list[list[fx.Node]] = []
    total = 0
    for launch in launches:
        size = num_bytes(launch.meta["val"])
        if units and total + size <= bucket_bytes:
            units[-1].append(launch)
            total += size
        else:
            units.append([launch])
            total = size
    return units


def _delay_waits(step: StepGraph, distance: int, bucket_bytes: int) -> int:
    position = step.positions()
    units = _units(step.calls(swap_out), bucket_bytes)
    edits = 0
    for index, unit in enumerate(units):
        later = units[index + distance][0] if index + distance < len(units) else step.output
        for launch in unit:
            wait = wait_of(launch)
            target = min([later, *wait.users], key=position.__getitem__)
            if target is not wait.next:
                target.prepend(wait)
                edits += 1
    return edits


def _launch_ahead(step: StepGraph, distance: int, bucket_bytes: int) -> int:
    position = step.positions()
    units = _units(step.calls(swap_in), bucket_bytes)
    edits = 0
    for index, unit in enumerate(units[distance:]):
        anchor = wait_of(units[index][0])
        for launch in unit:
            source = first_argument(launch)
            after = source if position[source] > position[anchor] else None
            if after is None:
                anchor.prepend(launch)
            elif after.op == "call_function":
                after.append(launch)
            edits += 1
    return edits
