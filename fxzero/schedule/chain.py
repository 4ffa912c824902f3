"""The lower bound of a step that follows itself ([Note: a step that follows itself] in `problem.py`).

[Note: what a chain cannot hide]
A step of a chain has no beginning at which lanes stand empty, and no end at which they must be. What is left:

- each lane has to do all its work once a step. Let compute take C seconds alone and a lane L, while which compute is
  slower by a factor f, and let the lane be slower by h while compute runs. If compute stands still for I seconds, the
  lane is busy beside it for L - I or more, so the step takes C + I + (1 - 1/f) max(0, L - I), which grows with I; and
  the lane does C / h of its work at most beside compute, so it takes L + (1 - 1/h) C;
- from a wait for what the step before has launched a chain of calls leads to the launch of the same for the next step,
  which is waited for one step later: the step takes as long as that chain;
- a parameter's gradient is reduced, then the parameter gathered for the next step, by one lane. From the issue of that
  reduction to the end of the wait for the gather the lane has both to do. Beside them only calls can run that need not
  come before the one or behind the other. What a matrix product that was put off until then makes is to be sent in
  that time, too ([Note: what follows a launch] in `exposed.py`). For what is left compute stands still.
"""

from __future__ import annotations

import math

from fxzero.schedule.exposed import exposed_behind
from fxzero.schedule.problem import CARRIED, LAUNCH, WAIT, Problem, closure, compute_seconds

_MOST_WAITS = 8  # that are looked at; each takes time linear in the number of calls


def reasons_in_a_chain(problem: Problem, *, bound_bytes: int | None = None) -> dict[str, float]:
    """Reason -> seconds that no order of the calls gets below, once steps follow each other.

    Args:
        problem: one in which something is carried.
        bound_bytes: that the device's tensors may take; None: as many as they like.
    """
    compute = sum(compute_seconds(problem, call) for call in range(len(problem)))
    found = {f"load of {problem.lanes[0]}": compute}
    waits = [wait for wait, kind in enumerate(problem.kind) if kind == CARRIED][:_MOST_WAITS]
    for lane, name in enumerate(problem.lanes[1:], start=1):
        busy = sum(s for s, own in zip(problem.seconds, problem.lane, strict=True) if own == lane)
        found[f"load of {name}"] = busy + (1 - 1 / problem.hindrance[lane]) * compute
        still = max((_exposed(problem, wait, lane, bound_bytes) for wait in waits), default=0.0)
        found[f"compute beside {name}"] = compute + still + (1 - 1 / problem.slowdown[lane]) * max(0.0, busy - still)
    found["critical path"] = max((_around(problem, wait) for wait in waits), default=0.0)
    return found


def _exposed(problem: Problem, wait: int, lane: int, bound_bytes: int | None) -> float:
    """Seconds for which compute stands still for a reduction and the gather for the next step that follows from it."""
    gather = problem.launch_of[wait]
    leading = closure(problem.before, gather)
    reductions = [problem.launch_of[call] for call in leading if problem.kind[call] == WAIT]
    reductions = [launch for launch in reductions if problem.lane[launch] == lane]
    if problem.lane[gather] != lane or not reductions:
        return 0.0
    before_wait = set(range(len(problem))) - closure(problem.after, wait)
    return exposed_behind(problem, max(reductions), then=gather, free=before_wait, bound_bytes=bound_bytes)


def _around(problem: Problem, wait: int) -> float:
    """Seconds of the longest chain of calls from a wait to the end of the launch for the same wait of the next step."""
    last = problem.launch_of[wait]
    done = [-math.inf] * (last + 1)  # of a launch: on its own lane
    issued = [-math.inf] * (last + 1)
    issued[wait] = done[wait] = 0.0
    for call in range(wait + 1, last + 1):
        start = max((issued[other] for other in problem.before[call]), default=-math.inf)
        ready = max((done[other] for other in problem.reads[call]), default=-math.inf)
        if problem.kind[call] == WAIT:
            start = max(start, ready, done[problem.launch_of[call]])
        issued[call] = start + compute_seconds(problem, call)
        done[call] = issued[call]
        if problem.kind[call] == LAUNCH:
            done[call] = max(issued[call], ready) + problem.seconds[call]
    return max(done[last], 0.0)
