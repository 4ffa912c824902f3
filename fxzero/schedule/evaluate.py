"""How long an order of calls takes, and what memory it holds.

Times are those of [Note: how a program runs] in `simulate/timeline.py`, memory is that of `cost/memory.py`: both on
arrays, so that a search can ask thousands of times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxzero.schedule.clock import Clock
from fxzero.schedule.problem import Problem


@dataclass(frozen=True)
class Times:
    """When the calls of an order run.

    Args:
        seconds: of the step.
        start: call -> when its lane begins with it; of a wait, when compute comes to it.
        stalls: (wait, seconds for which compute stands still), in order.
        clock: where all lanes stand then.
    """

    seconds: float
    start: list[float]
    stalls: list[tuple[int, float]]
    clock: Clock


def times_of(problem: Problem, order: Sequence[int]) -> Times:
    """When each call runs; in a chain, in the second of two such steps ([Note: a step that follows itself]).

    Args:
        problem: what is ordered.
        order: all its calls, in a legal order.
    """
    found = _times(problem, order, Clock(problem))
    return _times(problem, order, Clock(problem, before=found.clock)) if problem.leads else found


def _times(problem: Problem, order: Sequence[int], clock: Clock) -> Times:
    start = [0.0] * len(problem)
    for call in order:
        start[call] = clock.issue(call)
    return Times(clock.end, start, clock.stalls, clock)


def memory_of(problem: Problem, order: Sequence[int]) -> np.ndarray:
    """Bytes on the device while each position of an order runs, and at the end, as `memory_timeline` counts them.

    Args:
        problem: what is ordered.
        order: all its calls, in a legal order.
    """
    end = len(problem)
    position = np.empty(end + 1, dtype=np.int64)
    position[np.asarray(order, dtype=np.int64)] = np.arange(end)
    position[-1] = 0  # what is there at the start
    size, begin, calls, starts, having = problem.memory.flat
    last = np.full(len(size), end, dtype=np.int64)
    if len(having):
        last[having] = np.maximum.reduceat(position[calls], starts)
    line = np.zeros(end + 2, dtype=np.int64)
    np.add.at(line, position[begin], size)
    np.subtract.at(line, last + 1, size)
    return problem.memory.resting_bytes + np.cumsum(line)[:-1]


def peak_of(problem: Problem, order: Sequence[int]) -> int:
    """The most bytes at any position of an order."""
    return int(memory_of(problem, order).max())
