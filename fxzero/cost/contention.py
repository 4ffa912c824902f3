"""Compute and lanes that slow each other down: one account for the simulator and for the search.

[Note: a lane's own time]
While compute runs, what a lane does may take a factor longer, its hindrance. A lane's own time passes like the clock's
while compute runs, and that much faster while compute stands still; in it, work always takes its seconds alone times
the hindrance, whatever compute does. So a lane's plan never changes in its own time, and only the way from there to the
clock's is kept: a difference that grows whenever compute stands still.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Lane:
    """One lane; times are its own.

    Attributes:
        slowdown: the factor by which compute takes longer while it is busy.
        hindrance: the factor by which its work takes longer while compute runs.
        free: when it is through with what it was given.
        ahead: seconds by which its own time is ahead of the clock's.
        busy: when it is busy, in order; what is over is forgotten.
        bends: (own time, clock's) where its own time begins to pass like the clock's, or faster.
    """

    slowdown: float
    hindrance: float
    free: float = 0.0
    ahead: float = 0.0
    busy: deque[tuple[float, float]] = field(default_factory=deque)
    bends: list[tuple[float, float]] = field(default_factory=list)


class Lanes:
    """What lanes have to do, and how long compute takes beside them ([Note: a lane's own time]).

    Compute is asked for in the order of the clock; what lanes will do meanwhile was given to them before.

    Args:
        slowdown: lane -> the factor by which compute takes longer while it is busy, 1 or more.
        hindrance: lane -> the factor by which its work takes longer while compute runs, 1 or more.
    """

    def __init__(self, slowdown: Callable[[Any], float], hindrance: Callable[[Any], float] = lambda lane: 1.0) -> None:
        self._slowdown, self._hindrance = slowdown, hindrance
        self._lanes: dict[Hashable, _Lane] = {}
        self._slowing: list[_Lane] = []
        self._hindered: list[_Lane] = []

    def occupy(self, lane: Hashable, earliest: float, seconds: float) -> tuple[float, float]:
        """A lane takes work behind what it has; returns when it begins and ends with it, in the lane's own time.

        Args:
            lane: which.
            earliest: when it may begin, by the clock.
            seconds: that it takes when nothing else runs.
        """
        own = self._lanes.get(lane) or self._new(lane)
        start = max(earliest + own.ahead, own.free)
        own.free = end = start + seconds * own.hindrance
        if own.slowdown != 1.0:
            own.busy.append((start, end))
        return start, end

    def free(self, lane: Hashable) -> float:
        """When a lane is through with what it has, by the clock, if compute runs on."""
        own = self._lanes.get(lane)
        return own.free - own.ahead if own else 0.0

    def own_time(self, lane: Hashable, now: float) -> float:
        """A lane's own time at the clock's `now`, up to which all that compute did is known."""
        own = self._lanes.get(lane)
        return now + own.ahead if own else now

    def on_the_clock(self, lane: Hashable, moment: float) -> float:
        """When a lane comes to a moment of its own time, by the clock, if compute runs on."""
        own = self._lanes.get(lane)
        return moment - own.ahead if own else moment

    def arrival(self, lane: Hashable, moment: float, now: float) -> float:
        """When a lane comes to a moment of its own time, if compute stands still from now on until then."""
        own = self._lanes.get(lane)
        if own is None or own.hindrance == 1.0:
            return moment
        at = moment - own.ahead
        return at if at <= now else now + (at - now) / own.hindrance

    def stand_still(self, now: float, until: float) -> None:
        """Compute has nothing to do for a while."""
        for own in self._hindered:
            own.bends.append((now + own.ahead, now))
            own.ahead += (until - now) * (own.hindrance - 1)
            own.bends.append((until + own.ahead, until))

    def end_of(self, start: float, seconds: float) -> float:
        """When compute that takes `seconds` alone ends."""
        at, left = start, seconds
        while True:
            factor, until = 1.0, math.inf
            for own in self._slowing:
                while own.busy and own.busy[0][1] - own.ahead <= at:
                    own.busy.popleft()
                if not own.busy:
                    continue
                begin, end = own.busy[0]
                if begin - own.ahead <= at:
                    factor, until = factor * own.slowdown, min(until, end - own.ahead)
                else:
                    until = min(until, begin - own.ahead)
            if at + left * factor <= until:
                return at + left * factor
            left -= (until - at) / factor
            at = until

    def end(self, now: float) -> float:
        """When all lanes are through, if compute stands still from now on."""
        return max((self.arrival(lane, own.free, now) for lane, own in self._lanes.items()), default=now)

    def when(self, lane: Hashable, moment: float, now: float) -> float:
        """When a lane came to a moment of its own time, compute having stood still from now on.

        Args:
            lane: which.
            moment: in its own time.
            now: where compute has ended.
        """
        own = self._lanes.get(lane)
        if own is None or own.hindrance == 1.0:
            return moment
        if moment > now + own.ahead:
            return self.arrival(lane, moment, now)
        after = bisect_right(own.bends, (moment, math.inf))
        if after == len(own.bends):
            return moment - own.ahead
        own_to, to = own.bends[after]
        if after % 2 == 0:  # the clock's pace ends there
            return to - (own_to - moment)
        return to - (own_to - moment) / own.hindrance

    def since(self, origin: float) -> Lanes:
        """The same lanes, with all times counted from a moment of the clock's; what is over by then is left out."""
        moved = Lanes(self._slowdown, self._hindrance)
        for lane, own in self._lanes.items():
            new = moved._new(lane)
            shift = origin + own.ahead
            new.free = max(own.free - shift, 0.0)
            new.busy = deque((start - shift, end - shift) for start, end in own.busy if end > shift)
        return moved

    def _new(self, lane: Hashable) -> _Lane:
        own = self._lanes[lane] = _Lane(self._slowdown(lane), self._hindrance(lane))
        if own.slowdown != 1.0:
            self._slowing.append(own)
        if own.hindrance != 1.0:
            self._hindered.append(own)
        return own
