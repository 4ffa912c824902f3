"""How much longer compute takes while other lanes are busy: one account for the simulator and for the search."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable


class BusyLanes:
    """When lanes that slow compute down are busy.

    A lane's times come in order, and compute is asked for in order, so that what is over is forgotten.
    """

    def __init__(self) -> None:
        self._lanes: dict[Hashable, tuple[float, deque[tuple[float, float]]]] = {}

    def add(self, lane: Hashable, factor: float, start: float, end: float) -> None:
        """A lane is busy from `start` to `end`: compute then takes `factor` times as long, per busy lane."""
        if factor == 1.0:
            return
        if lane not in self._lanes:
            self._lanes[lane] = factor, deque()
        self._lanes[lane][1].append((start, end))

    def end_of(self, start: float, seconds: float) -> float:
        """When compute that takes `seconds` alone ends: all that lanes will do until then is known already."""
        at, left = start, seconds
        while True:
            factor, until = 1.0, math.inf
            for slowed, intervals in self._lanes.values():
                while intervals and intervals[0][1] <= at:
                    intervals.popleft()
                if not intervals:
                    continue
                begin, end = intervals[0]
                if begin <= at:
                    factor, until = factor * slowed, min(until, end)
                else:
                    until = min(until, begin)
            if at + left * factor <= until:
                return at + left * factor
            left -= (until - at) / factor
            at = until

    def since(self, origin: float) -> BusyLanes:
        """What is not over at `origin`, in seconds from there."""
        moved = BusyLanes()
        for lane, (factor, intervals) in self._lanes.items():
            for start, end in intervals:
                if end > origin:
                    moved.add(lane, factor, start - origin, end - origin)
        return moved
