"""The time that passes as the calls of an order are issued: one account for what evaluates orders and what makes them.

It is that of [Note: how a program runs] in `simulate/timeline.py`, on arrays.
"""

from __future__ import annotations

from fxzero.cost.contention import Lanes
from fxzero.schedule.problem import CARRIED, LAUNCH, ON_HOST, WAIT, Problem


class Clock:
    """Where all lanes stand after the calls that were issued.

    Args:
        problem: whose calls are issued.
        before: of the step before, all issued: what it has launched for this one is under way, and time counts from
            its end. Without it, all that is there already.

    Attributes:
        now: second at which compute is through with what it was given.
        issued: second at which the thread that issues is free.
        stalls: (wait, seconds for which compute stands still), in order.
    """

    def __init__(self, problem: Problem, *, before: Clock | None = None) -> None:
        self.now = self.issued = 0.0
        self.stalls: list[tuple[int, float]] = []
        self._problem = problem
        self._follows = ON_HOST in problem.kind
        self._lanes = Lanes(problem.slowdown.__getitem__, problem.hindrance.__getitem__)
        self._done = [0.0] * len(problem)  # of a launch in its lane's own time
        self._carried = dict.fromkeys(problem.leads, 0.0)  # launch of the step before -> when it is done, like that
        if before is not None:
            self._lanes = before._lanes.since(before.through)
            for launch in self._carried:
                own = before._lanes.own_time(problem.lane[launch], before.through)
                self._carried[launch] = max(before._done[launch] - own, 0.0)

    @property
    def through(self) -> float:
        """Second at which compute and the thread that issues are through, and the next step may begin."""
        return max(self.now, self.issued)

    @property
    def end(self) -> float:
        """Second at which all lanes are through; in a chain, at which compute is."""
        return self.through if self._problem.leads else max(self.through, self._lanes.end(self.through))

    def free(self, lane: int) -> float:
        """Second at which a lane is through with what it was given, if compute runs on."""
        return self._lanes.free(lane)

    def done(self, call: int) -> float:
        """Second at which other lanes have made what a call stands for, if compute runs on; 0 where none takes part."""
        if self._problem.kind[call] == LAUNCH:
            return self._lanes.on_the_clock(self._problem.lane[call], self._done[call])
        return self._done[call]

    def due(self, wait: int) -> float:
        """Second at which what a wait is for is there, if compute runs on."""
        launch = self._problem.launch_of[wait]
        if self._problem.kind[wait] == WAIT:
            return self.done(launch)
        return self._lanes.on_the_clock(self._problem.lane[launch], self._carried[launch])

    def issue(self, call: int) -> float:
        """The second at which a call begins on its lane, if compute runs on; of a wait, at which compute comes to it.

        Args:
            call: the next one of the order.
        """
        problem, done = self._problem, self._done
        kind, seconds, lane = problem.kind[call], problem.seconds[call], problem.lane[call]
        ready = max(map(self.done, problem.reads[call]), default=0.0) if self._follows else 0.0
        if kind == LAUNCH:
            if problem.launch_s[call]:
                self._compute(problem.launch_s[call])
            start, done[call] = self._lanes.occupy(lane, max(self.now, self.issued, ready), seconds)
            return self._lanes.on_the_clock(lane, start)
        if kind == ON_HOST:
            start, done[call] = self._lanes.occupy(lane, max(self.issued, ready), seconds)
            self.issued = done[call]
            return start
        start = self.now
        if kind in (WAIT, CARRIED):
            launch = problem.launch_of[call]
            there = done[launch] if kind == WAIT else self._carried[launch]
            until = done[call] = max(ready, self._lanes.arrival(problem.lane[launch], there, start))
            if until > start:
                self.stalls.append((call, until - start))
                self._stand_still(until)
            if seconds:
                self._compute(seconds)
            return start
        done[call] = ready
        return self._compute(seconds) if seconds else start

    def _compute(self, seconds: float) -> float:
        """Compute runs for a while; when it begins."""
        if self.issued > self.now:
            self._stand_still(self.issued)
        start = self.now
        self.now = self._lanes.end_of(start, seconds)
        return start

    def _stand_still(self, until: float) -> None:
        self._lanes.stand_still(self.now, until)
        self.now = until
