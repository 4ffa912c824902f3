"""How long an order of calls takes, and what memory it holds.

Times are those of [Note: how a program runs] in `simulate/timeline.py`, with lanes that do not slow each other down,
and memory is that of `cost/memory.py`: both on arrays, so that a search can ask thousands of times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxzero.schedule.problem import LAUNCH, ON_HOST, WAIT, Problem


@dataclass(frozen=True)
class Times:
    """When the calls of an order run.

    Args:
        seconds: of the step.
        start: call -> when its lane begins with it; of a wait, when compute comes to it.
        stalls: (wait, seconds for which compute stands still), in order.
    """

    seconds: float
    start: list[float]
    stalls: list[tuple[int, float]]


def times_of(problem: Problem, order: Sequence[int]) -> Times:
    """When each call runs.

    Args:
        problem: what is ordered.
        order: all its calls, in a legal order.
    """
    kind, lane, seconds, launch_s, launch_of = (
        problem.kind, problem.lane, problem.seconds, problem.launch_s, problem.launch_of
    )  # fmt: skip
    done = [0.0] * len(problem)  # of what other lanes have made, and of what is computed from it
    start = [0.0] * len(problem)
    free = [0.0] * len(problem.lanes)
    follows = ON_HOST in kind
    now = issued = 0.0
    stalls: list[tuple[int, float]] = []
    for call in order:
        what = kind[call]
        start[call] = now
        if follows:
            for source in problem.reads[call]:
                if done[source] > done[call]:
                    done[call] = done[source]
        if what == LAUNCH:
            if launch_s[call]:
                now = max(now, issued) + launch_s[call]
            start[call] = max(now, issued, free[lane[call]], done[call])
            free[lane[call]] = done[call] = start[call] + seconds[call]
        elif what == WAIT:
            until = done[call] = max(done[call], done[launch_of[call]])
            if until > now:
                stalls.append((call, until - now))
                now = until
            if seconds[call]:
                now = max(now, issued) + seconds[call]
        elif what == ON_HOST:
            start[call] = max(issued, done[call])
            issued = free[lane[call]] = done[call] = start[call] + seconds[call]
        elif seconds[call]:
            start[call] = max(now, issued)
            now = start[call] + seconds[call]
    return Times(max([now, issued, *free]), start, stalls)


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
