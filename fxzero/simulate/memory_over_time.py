"""Memory of a step over time: its course over the program (`cost/memory.py`), each node at the time it is reached."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxzero.cost.allocator import Allocator
from fxzero.cost.memory import MemoryTimeline, memory_timeline
from fxzero.cost.memory_kinds import KINDS
from fxzero.simulate.timeline import Timeline


@dataclass(frozen=True)
class MemoryOverTime:
    """Bytes on this rank from each moment on, until the next.

    Args:
        seconds: the moments, in order; of nodes that are reached at the same one, it holds the greatest total.
        bytes_by_kind: kind -> bytes on the device.
        tiers: "host" and "nvme" -> bytes there.
        peak_bytes: the most on the device.
    """

    seconds: np.ndarray
    bytes_by_kind: dict[str, np.ndarray]
    tiers: dict[str, np.ndarray]
    peak_bytes: int

    @property
    def total(self) -> np.ndarray:
        """Bytes of all kinds."""
        return sum(self.bytes_by_kind.values(), start=np.zeros(len(self.seconds), dtype=np.int64))


def memory_over_time(timeline: Timeline, *, allocator: Allocator | None = None) -> MemoryOverTime:
    """The bytes that stand on a rank over the time of a step.

    Args:
        timeline: predicted or measured.
        allocator: whose rules sizes follow; default: that of the graph's device.
    """
    courses: dict[int, MemoryTimeline] = {}
    for index, step in enumerate(timeline.steps):
        if id(step) not in courses:
            beside = [*timeline.steps[:index], *timeline.steps[index + 1 :]]
            courses[id(step)] = memory_timeline(step, beside=beside, allocator=allocator)
    along = [courses[id(step)] for step in timeline.steps]
    seconds = np.concatenate([np.asarray(reached, dtype=float) for reached in timeline.reached_s])
    lines = {kind: np.concatenate([course.bytes_by_kind[kind] for course in along]) for kind in KINDS}
    tiers = {tier: np.concatenate([course.tiers[tier] for course in along]) for tier in along[0].tiers}
    total = np.concatenate([course.total for course in along])
    picked = _greatest_of_each_moment(seconds, total)
    return MemoryOverTime(
        seconds[picked],
        {kind: line[picked] for kind, line in lines.items()},
        {tier: line[picked] for tier, line in tiers.items()},
        int(total.max()),
    )


def _greatest_of_each_moment(seconds: np.ndarray, total: np.ndarray) -> np.ndarray:
    """The index of the node with the greatest total among those that are reached at the same time."""
    order = np.lexsort((total, seconds))
    last = np.append(seconds[order][1:] != seconds[order][:-1], True)
    return order[last]
