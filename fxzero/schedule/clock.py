"""The time that passes as the calls of an order are issued: one account for what evaluates orders and what makes them.

It is that of [Note: how a program runs] in `simulate/timeline.py`, on arrays.
"""

from __future__ import annotations

import math
from collections import deque

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
        self._busy: dict[int, deque[tuple[float, float]]] = {
            lane: deque() for lane, factor in enumerate(problem.slowdown) if factor != 1.0
        }

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
                self.now = self._computed(max(self.now, self.issued), problem.launch_s[call])
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
                self.now = self._computed(max(self.now, self.issued), seconds)
        elif seconds:
            start = max(start, self.issued)
            self.now = self._computed(start, seconds)
        return start

    def _occupied(self, call: int, start: float) -> float:
        lane = self._problem.lane[call]
        end = self.done[call] = self.free[lane] = start + self._problem.seconds[call]
        if lane in self._busy:
            self._busy[lane].append((start, end))
        return start

    def _computed(self, start: float, seconds: float) -> float:
        """When compute that takes `seconds` alone ends: all that lanes will do until then is known already."""
        at, left = start, seconds
        while True:
            factor, until = 1.0, math.inf
            for lane, intervals in self._busy.items():
                while intervals and intervals[0][1] <= at:
                    intervals.popleft()
                if not intervals:
                    continue
                begin, end = intervals[0]
                if begin <= at:
                    factor, until = factor * self._problem.slowdown[lane], min(until, end)
                else:
                    until = min(until, begin)
            if at + left * factor <= until:
                return at + left * factor
            left -= (until - at) / factor
            at = until
