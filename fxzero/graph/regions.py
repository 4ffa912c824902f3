"""Regions: runs of calls that are compiled as one, marked in the graph, and what goes in and out of them.

[Note: regions]
The pass `cut_regions` gives calls that stand together the same `meta["region"]`, a number that grows with program
order. What the scheduler has placed (collectives, waits, moves) is in no region, so its order stays; inside of a
region the compiler orders. A region runs where its calls stand; what dies in it is handed over with its last
reference, so that the memory goes at the last use inside.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxzero.graph.step_graph import StepGraph


@dataclass(frozen=True)
class Region:
    """Calls that run as one.

    Args:
        number: that its calls carry.
        calls: in program order, at least one.
    """

    number: int
    calls: tuple[fx.Node, ...]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """What its calls read and none of them makes, in the order of their first reading."""
        inside = set(self.calls)
        read = (source for node in self.calls for source in node.all_input_nodes)
        return tuple(dict.fromkeys(source for source in read if source not in inside))

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """What is read outside of it, or returned, in program order."""
        inside = set(self.calls)
        return tuple(node for node in self.calls if any(user not in inside for user in node.users))


def region_of(node: fx.Node) -> int | None:
    """The number of the region that a call is in."""
    return node.meta.get("region")


def regions(step: StepGraph) -> list[Region]:
    """The regions of a program, in order."""
    grouped = itertools.groupby(step.calls(), key=region_of)
    return [Region(number, tuple(calls)) for number, calls in grouped if number is not None]


def mark(number: int, calls: Sequence[fx.Node]) -> None:
    """Let calls that stand together be a region."""
    for node in calls:
        node.meta["region"] = number
