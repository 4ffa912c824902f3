"""How far compute may run before its turn.

Where the next call of the program must wait for a gather or for room, a list schedule takes another one. An update is
a good choice, and what comes soon. The first calls of a block that is recomputed much later are a bad one: they save no
time, and what they leave behind takes the room that the next message needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fxzero.schedule.problem import LAUNCH, RUN, Problem

_LIGHT_BYTES = 1e6  # that a light call leaves behind, at most


class OutOfTurn:
    """Which calls of compute may run now.

    A call's turn is the compute that stands before it, by priority, updates left out. How early a call is, is its turn
    less that of the first call that did not run yet.

    Args:
        problem: what is ordered.
        priority: call -> its place among compute, lowest first.
        early: how early a call may be, in mean seconds of a message.
        light: whether calls that leave next to nothing behind may be as early as they like.
    """

    def __init__(self, problem: Problem, priority: Sequence[float], *, early: float, light: bool) -> None:
        self._anything = early == math.inf
        if self._anything:
            return
        messages = [problem.seconds[call] for call in range(len(problem)) if problem.kind[call] == LAUNCH]
        self._early_s = early * sum(messages) / max(1, len(messages))
        queue = [call for call in range(len(problem)) if _has_turn(problem, call)]
        self._queue = sorted(queue, key=lambda call: (priority[call], call))
        self._turn, self._free = [0.0] * len(problem), [True] * len(problem)
        passed = 0.0
        for call in self._queue:
            self._turn[call], self._free[call] = passed, light and _left_behind(problem, call) <= _LIGHT_BYTES
            passed += problem.seconds[call]
        self._first = 0

    def allows(self, call: int, is_taken: Callable[[int], bool]) -> bool:
        """Whether a call may run now.

        Args:
            call: that is ready.
            is_taken: whether a call ran; what ran once has run for good.
        """
        if self._anything or self._free[call]:
            return True
        while is_taken(self._queue[self._first]):
            self._first += 1
        return self._turn[call] <= self._turn[self._queue[self._first]] + self._early_s


def _has_turn(problem: Problem, call: int) -> bool:
    is_update = problem.nodes[call].meta["phase"] == "update"
    return problem.kind[call] == RUN and problem.lane[call] == 0 and problem.seconds[call] > 0 and not is_update


def _left_behind(problem: Problem, call: int) -> int:
    """Bytes that begin with a call and outlive it."""
    memory = problem.memory
    return sum(memory.size[s] for s in memory.begun_by.get(call, ()) if memory.uses[s] != [call])
