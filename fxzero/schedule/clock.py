"""The time that passes as the calls of an order are issued: one account for what evaluates orders and what makes them.

It is that of [Note: how a program runs] in `simulate/timeline.py`, on arrays.
"""

from __future__ import annotations

from fxzero.cost.contention import BusyLanes
from fxzero.schedule.problem import LAUNCH, ON_HOST, WAIT, Problem


class Clock:
    """Where all lanes stand after the calls that were issued.

    Args:
        problem: whose calls are issued.

    Attributes:
        now: second at which compute is through with what it was given.
        issued: second at which the thread that issues is free.
        free: lane -> second at which it is through with what it was given; of compute, 0.
        done: call -> second at which other lanes have made what it stands for; 0 where none has a part in it.
        stalls: (wait, seconds for which compute stands still), in order.
    """

    def __init__(self, problem: Problem) -> None:
        self.now = self.issued = 0.0
        self.free = [0.0] * len(problem.lanes)
        self.done = [0.0] * len(problem)
        self.stalls: list[tuple[int, float]] = []
        self._problem = problem
        self._follows = ON_HOST in problem.kind
        self._busy = BusyLanes()

    @property
    def end(self) -> float:
        """Second at which all lanes are through."""
        return max(self.now, self.issued, *self.free)

    def issue(self, call: int) -> float:
        """The second at which a call begins on its lane; of a wait, at which compute comes to it.

        Args:
            call: the next one of the order.
        """
        problem = self._problem
        kind, seconds, done = problem.kind[call], problem.seconds[call], self.done
        if self._follows:
            for source in problem.reads[call]:
                if done[source] > done[call]:
                    done[call] = done[source]
        if kind == LAUNCH:
            if problem.launch_s[call]:
                self.now = self._busy.end_of(max(self.now, self.issued), problem.launch_s[call])
            start = max(self.now, self.issued, self.free[problem.lane[call]], done[call])
            return self._occupied(call, start)
        if kind == ON_HOST:
            start = max(self.issued, done[call])
            self._occupied(call, start)
            self.issued = done[call]
            return start
        start = self.now
        if kind == WAIT:
            until = done[call] = max(done[call], done[problem.launch_of[call]])
            if until > start:
                self.stalls.append((call, until - start))
                self.now = until
            if seconds:
                self.now = self._busy.end_of(max(self.now, self.issued), seconds)
        elif seconds:
            start = max(start, self.issued)
            self.now = self._busy.end_of(start, seconds)
        return start

    def _occupied(self, call: int, start: float) -> float:
        lane = self._problem.lane[call]
        end = self.done[call] = self.free[lane] = start + self._problem.seconds[call]
        self._busy.add(lane, self._problem.slowdown[lane], start, end)
        return start
