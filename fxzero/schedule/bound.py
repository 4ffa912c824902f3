"""A time below which no order of a step's calls gets, and what makes it so.

These reasons are looked at, and the strongest counts:
- the longest chain of calls that wait for each other;
- for each lane: what it has to do cannot begin before the first of it can be there (head), and something follows
  the last of it (tail), also for any part of its work: Jackson's preemptive schedule yields the strongest such bound
  (Carlier, 1982);
- the same for what must come before a call: it yields a later head than the longest chain does, where a lane has more
  to do for it than one chain shows;
- compute beside a lane: what of transfers cannot be hidden under compute, and how much slower compute is beside the
  rest ([Note: compute beside a lane]);
- memory: while a call runs, only so many bytes can have been fetched ahead, so that the lane has the rest still to do
  ([Note: memory edges]).

[Note: memory edges]
While a call runs, memory is taken by what must have begun before it and has a use that must come after it, and by what
was fetched for later readers. What it needs itself and what surely stays leave room for so many bytes of the second
kind. All other fetches for calls that follow it are launched behind it: they make a job list whose heads are its end.
Those that may come early are chosen as favourably as can be, in parts too (most seconds a byte), so the bound holds
for every order.

[Note: compute beside a lane]
Let compute take C seconds alone, and a lane L seconds, while which compute is slower by a factor f. If compute stands
still for I seconds, the lane is busy for L - I seconds of the others at least, so the step takes
C + I + (1 - 1/f) max(0, L - I) or more, which grows with I. Compute stands still before its first call can begin, after
its last one, and for what cannot be hidden ([Note: exposed transfers] in `exposed.py`): the larger of both is an I.

While compute runs, for C seconds or more, the lane is slower by its own factor h and does C / h of its work at most; so
the step also takes L + (1 - 1/h) C or more.

It holds for the calls as they are: another cut of buckets has another bound. For a step that carries something to the
next one other reasons count ([Note: what a chain cannot hide] in `chain.py`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from fxzero.schedule.chain import reasons_in_a_chain
from fxzero.schedule.exposed import exposed_seconds
from fxzero.schedule.problem import LAUNCH, ON_HOST, WAIT, Problem, closure, compute_seconds

Job = tuple[float, float, float]  # head, seconds, tail


@dataclass(frozen=True)
class LowerBound:
    """No order takes less than `seconds`.

    Args:
        seconds: the strongest of all reasons.
        binds: that reason: "critical path", "load of <lane>", "compute beside <lane>" or "memory".
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


def lower_bound(problem: Problem, *, bound_bytes: int | None = None, places: int = 0) -> LowerBound:
    """The bound of a step.

    Args:
        problem: what is to be ordered.
        bound_bytes: that the device's tensors may take; None: as many as they like.
        places: at how many calls, spread over the longest chain, and for how many launches of each lane, the stronger
            statements are tried; each takes time linear in the number of calls.
    """
    if problem.leads:
        return _strongest(reasons_in_a_chain(problem, bound_bytes=bound_bytes))
    reach = reach_of(problem)
    found = {"critical path": max(map(sum, zip(reach.after, reach.tail_issued, strict=True)), default=0.0)}
    memory = 0.0
    for call in _along_the_chain(problem, reach, places):
        head = _head(problem, reach, call)
        if head > reach.before[call]:
            reach = reach_of(problem, floor={call: head}, known=reach)
        if bound_bytes is not None:
            memory = max(memory, _with_memory(problem, reach, call, bound_bytes))
    for lane, name in enumerate(problem.lanes):
        found[f"load of {name}"] = preemptive_makespan(jobs_of(problem, reach, lane))
        if lane:
            found[f"compute beside {name}"] = _compute_beside(problem, reach, lane, places, bound_bytes)
    if bound_bytes is not None:
        found["memory"] = memory
    return _strongest(found)


def _strongest(found: dict[str, float]) -> LowerBound:
    binds = max(found, key=lambda reason: found[reason])
    return LowerBound(found[binds], binds, found)


def _compute_beside(problem: Problem, reach: Reach, lane: int, num_launches: int, bound_bytes: int | None) -> float:
    """See [Note: compute beside a lane]."""
    jobs = jobs_of(problem, reach, 0)
    compute = sum(seconds for _, seconds, _ in jobs)
    busy = sum(s for s, own in zip(problem.seconds, problem.lane, strict=True) if own == lane)
    still = min((head for head, _, _ in jobs), default=0.0) + min((tail for _, _, tail in jobs), default=0.0)
    still = max(still, exposed_seconds(problem, lane, num_launches=num_launches, bound_bytes=bound_bytes))
    slower = compute + still + (1 - 1 / problem.slowdown[lane]) * max(0.0, busy - still)
    return max(slower, busy + (1 - 1 / problem.hindrance[lane]) * compute)


def _along_the_chain(problem: Problem, reach: Reach, places: int) -> list[int]:
    """Calls of the longest chain, evenly spread over its time, first to last."""
    if not places or not len(problem):
        return []
    through = [
        reach.before[call] + compute_seconds(problem, call) + reach.tail_issued[call] for call in range(len(problem))
    ]
    most = max(through)
    chain = [
        call
        for call in range(len(problem))
        if problem.lane[call] == 0 and problem.seconds[call] and through[call] >= most * (1 - 1e-9)
    ]
    chain.sort(key=lambda call: (reach.before[call], call))
    count = min(places, len(chain))
    return [chain[(2 * index + 1) * len(chain) // (2 * count)] for index in range(count)]


def _head(problem: Problem, reach: Reach, call: int) -> float:
    """The earliest time of a call by what all lanes have to do before it."""
    earlier = closure(problem.before, call)
    tail = dict.fromkeys(earlier, 0.0)  # from the end of each of them to the beginning of the call
    tail[call] = 0.0
    landed: dict[int, float] = {}  # launch -> from the end of its transfer
    for other in sorted((*earlier, call), reverse=True):
        kind = problem.kind[other]
        if kind == WAIT and other != call:
            launch = problem.launch_of[other]
            landed[launch] = max(landed.get(launch, 0.0), tail[other] + problem.seconds[other])
        own = compute_seconds(problem, other) if other != call else 0.0
        behind = tail[other]
        if kind == LAUNCH and other in landed:
            behind = max(behind, landed[other] + problem.seconds[other])
        for before in problem.before[other]:
            tail[before] = max(tail[before], own + behind)
    best = reach.before[call]
    for lane in range(len(problem.lanes)):
        jobs = []
        for other in earlier:
            kind = problem.kind[other]
            if kind == LAUNCH and lane == 0 and problem.launch_s[other]:
                jobs.append((reach.before[other], problem.launch_s[other], tail[other]))
            if problem.lane[other] != lane or not problem.seconds[other] or (kind == LAUNCH and other not in landed):
                continue
            head = reach.done[other] - problem.seconds[other] if kind in (LAUNCH, ON_HOST) else reach.before[other]
            jobs.append((head, problem.seconds[other], landed[other] if kind == LAUNCH else tail[other]))
        if lane == 0 or ON_HOST not in problem.kind:
            best = max(best, preemptive_makespan(jobs))
    return best


def _with_memory(problem: Problem, reach: Reach, call: int, bound_bytes: int) -> float:
    """The time of the step by what cannot be fetched before a call."""
    earlier, later = closure(problem.before, call), closure(problem.after, call)
    memory = problem.memory
    held = memory.resting_bytes
    fetched: dict[int, int] = {}  # launch -> bytes that it brings for calls behind this one
    for storage, begin in enumerate(memory.begin):
        uses = memory.uses[storage]
        ends_later = not uses or any(use == call or use in later for use in uses)
        if begin == call or ((begin < 0 or begin in earlier) and ends_later):
            held += memory.size[storage]
        elif begin >= 0 and problem.kind[begin] == LAUNCH and begin not in later and _all_behind(uses, call, later):
            fetched[begin] = fetched.get(begin, 0) + memory.size[storage]
    end = reach.before[call] + problem.seconds[call]
    best = 0.0
    for lane in range(1, len(problem.lanes)):
        behind = [other for other in fetched if problem.lane[other] == lane]
        total = sum(problem.seconds[other] for other in behind)
        room = max(0, bound_bytes - held)
        for other in sorted(behind, key=lambda other: (fetched[other] / (problem.seconds[other] or 1e-12), other)):
            part = min(1.0, room / fetched[other])
            room -= int(part * fetched[other])
            total -= part * problem.seconds[other]
        following = [other for other in later if problem.lane[other] == lane]
        total += sum(problem.seconds[other] for other in following)
        tail = min((reach.tail[other] for other in (*behind, *following)), default=0.0)
        if total:
            best = max(best, end + total + tail)
    return best


def _all_behind(uses: list[int], call: int, later: set[int]) -> bool:
    """Whether a storage has a reader behind a call, so that it is held while the call runs if it began before."""
    return any(use in later for use in uses)


def reach_of(problem: Problem, *, floor: dict[int, float] | None = None, known: Reach | None = None) -> Reach:
    """The earliest times of all calls, and the least that follows each.

    Args:
        problem: what is to be ordered.
        floor: call -> a later beginning than is known of it, with all that follows from that.
        known: what was found before.
    """
    count = len(problem)
    before, after, done = [0.0] * count, [0.0] * count, [0.0] * count
    for call in range(count):
        kind, seconds = problem.kind[call], problem.seconds[call]
        start = max((after[other] for other in problem.before[call]), default=0.0)
        start = max(start, known.before[call] if known else 0.0, floor.get(call, 0.0) if floor else 0.0)
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
    if known:
        return Reach(before, after, done, known.tail, known.tail_issued)
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
