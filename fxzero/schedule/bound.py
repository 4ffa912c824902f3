"""A time below which no order of a step's calls gets, and what makes it so.

Three reasons are looked at, and the strongest counts:
- the longest chain of calls that wait for each other;
- for each lane: what it has to do cannot begin before the first of it can be there (head), and something follows
  the last of it (tail), also for any part of its work: Jackson's preemptive schedule yields the strongest such bound
  (Carlier, 1982);
- memory: at a call that surely holds much, only so many bytes can have been fetched ahead, so that the lane still has
  the rest to do ([Note: memory edges]).

It holds for the calls as they are: another cut of buckets has another bound. What lanes do to each other's speed is
left out, on both sides.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from fxzero.schedule.problem import LAUNCH, ON_HOST, WAIT, Problem

Job = tuple[float, float, float]  # head, seconds, tail


@dataclass(frozen=True)
class LowerBound:
    """No order takes less than `seconds`.

    Args:
        seconds: the strongest of all reasons.
        binds: that reason: "critical path", "load of <lane>" or "memory".
        by_reason: reason -> seconds.
    """

    seconds: float
    binds: str
    by_reason: dict[str, float]


@dataclass(frozen=True)
class Reach:
    """Earliest times, were there a lane for each call.

    Args:
        before, after: call -> seconds from the start to its beginning, to its end on the compute lane.
        done: launch, call on the host -> seconds until its own lane is through with it.
        tail: call -> seconds from its end (of a launch: on its own lane) to the end of the step.
        tail_issued: launch -> seconds from where it is issued to the end of the step.
    """

    before: list[float]
    after: list[float]
    done: list[float]
    tail: list[float]
    tail_issued: list[float]


def lower_bound(problem: Problem) -> LowerBound:
    """The bound of a step without regard to memory.

    Args:
        problem: what is to be ordered.
    """
    reach = reach_of(problem)
    found = {"critical path": max(map(sum, zip(reach.after, reach.tail_issued, strict=True)), default=0.0)}
    for lane, name in enumerate(problem.lanes):
        found[f"load of {name}"] = preemptive_makespan(jobs_of(problem, reach, lane))
    binds = max(found, key=lambda reason: found[reason])
    return LowerBound(found[binds], binds, found)


def reach_of(problem: Problem) -> Reach:
    """The earliest times of all calls, and the least that follows each."""
    count = len(problem)
    before, after, done = [0.0] * count, [0.0] * count, [0.0] * count
    for call in range(count):
        kind, seconds = problem.kind[call], problem.seconds[call]
        start = max((after[other] for other in problem.before[call]), default=0.0)
        ready = max((done[other] for other in problem.reads[call]), default=0.0)
        if kind == WAIT:
            start = max(start, ready, done[problem.launch_of[call]])
        before[call] = start
        after[call] = start + (problem.launch_s[call] if kind == LAUNCH else 0.0 if kind == ON_HOST else seconds)
        if kind == LAUNCH:
            done[call] = max(after[call], ready) + seconds
        elif kind == ON_HOST:
            done[call] = ready + seconds
            after[call] = max(after[call], done[call])
        else:
            done[call] = ready
    tail, issued = [0.0] * count, [0.0] * count
    for call in reversed(range(count)):
        way = 0.0
        for other in problem.after[call]:
            kind = problem.kind[other]
            own = problem.launch_s[other] if kind == LAUNCH else problem.seconds[other] if kind != ON_HOST else 0.0
            way = max(way, own + issued[other])
        issued[call] = max(way, issued[call])
        if problem.kind[call] == LAUNCH:
            issued[call] = max(issued[call], problem.seconds[call] + tail[call])
        else:
            tail[call] = issued[call]
        if problem.kind[call] == WAIT:
            launch = problem.launch_of[call]
            tail[launch] = max(tail[launch], problem.seconds[call] + issued[call])
    return Reach(before, after, done, tail, issued)


def jobs_of(problem: Problem, reach: Reach, lane: int) -> list[Job]:
    """What a lane has to do: of the compute lane, launching too."""
    jobs = []
    for call in range(len(problem)):
        kind = problem.kind[call]
        if kind == LAUNCH and lane == 0 and problem.launch_s[call]:
            jobs.append((reach.before[call], problem.launch_s[call], reach.tail_issued[call]))
        if problem.lane[call] != lane or not problem.seconds[call]:
            continue
        head = reach.done[call] - problem.seconds[call] if kind in (LAUNCH, ON_HOST) else reach.before[call]
        jobs.append((head, problem.seconds[call], reach.tail[call]))
    return jobs


def preemptive_makespan(jobs: Iterable[Job]) -> float:
    """The least time in which one lane can do jobs that it may interrupt: longest tail first."""
    todo = sorted(jobs)
    open_jobs: list[tuple[float, float]] = []  # (-tail, seconds left)
    now = latest = 0.0
    index = 0
    while index < len(todo) or open_jobs:
        if not open_jobs:
            now = max(now, todo[index][0])
        while index < len(todo) and todo[index][0] <= now:
            heapq.heappush(open_jobs, (-todo[index][2], todo[index][1]))
            index += 1
        until = todo[index][0] if index < len(todo) else float("inf")
        tail, left = heapq.heappop(open_jobs)
        if now + left <= until:
            now += left
            latest = max(latest, now - tail)
        else:
            heapq.heappush(open_jobs, (tail, left - (until - now)))
            now = until
    return latest
