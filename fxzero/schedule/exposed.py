"""What of transfers no order hides under compute.

[Note: exposed transfers]
While a launch is under way, compute can only run calls that need not stand before it nor behind its wait. Launches of
one lane are under way one after the other, and each call runs once. So for every set of them, compute stands still at
least for the seconds that they take, less those of what can run beside any of them. What no gradient leads to (the
decay of a parameter) may run beside many; updates are therefore counted once for the whole set, other calls for each.
What runs beside may be slowed down by all lanes, and so cover more than it takes alone.

[Note: what follows a launch]
Of several launches one is issued last, and by then all that must come before any of them. The step cannot end before
the lane has done it and all that is launched behind it. A call that runs behind it (a gradient's matrix product, put
off to have something to do meanwhile) has its own launch there too: it covers its seconds less those of that launch.
Memory says how many can be put off: what the heaviest call of each still reads is held while the last launch, or what
leads to it, runs. Which one is issued last is not known: the least of them all counts, with what is exposed of those
that are waited for before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxzero.schedule.problem import LAUNCH, WAIT, Problem, closure, compute_seconds

_PLACES = 8  # calls before a launch at which memory is counted
_MOST_LASTS = 3  # launches of which the last one is looked at


@dataclass(frozen=True)
class _Exposed:
    """Of a launch: seconds less those of other calls beside it, and the updates that can run beside it as well."""

    seconds: float
    launch: int
    updates: set[int]


def exposed_seconds(problem: Problem, lane: int, *, num_launches: int, bound_bytes: int | None = None) -> float:
    """The least that compute stands still for a lane, whatever the order.

    Args:
        problem: what is ordered.
        lane: whose launches are looked at.
        num_launches: of how many, the longest ones; each takes time linear in the number of calls.
        bound_bytes: that the device's tensors may take; None: as many as they like.
    """
    launches = [call for call in range(len(problem)) if problem.kind[call] == LAUNCH and problem.lane[call] == lane]
    launches.sort(key=lambda call: (-problem.seconds[call], call))
    launches = launches[:num_launches]
    factor = math.prod(problem.slowdown)
    alone = [_beside(problem, launch, factor) for launch in launches]
    best = _together(problem, alone, factor)
    leads_to = _first_launches(problem, lane)
    lasts = [call for call in launches if all(leads_to[other] < 0 for other in problem.after[call])]
    for count in range(1, min(_MOST_LASTS, len(lasts)) + 1):
        earlier = set(lasts[:count]).union(*(closure(problem.before, launch) for launch in lasts[:count]))
        waited_for = {problem.launch_of[call] for call in earlier if problem.kind[call] == WAIT}
        first = [other for other in alone if other.launch in waited_for]
        behind = [_behind(problem, launch, earlier, leads_to, factor, bound_bytes) for launch in lasts[:count]]
        best = max(best, min(_together(problem, first, factor, last=last) for last in behind))
    return best


def exposed_behind(
    problem: Problem, launch: int, *, then: int, free: set[int], bound_bytes: int | None = None
) -> float:
    """What compute stands still for at least from where a launch is issued until another one of its lane is done.

    Args:
        problem: what is ordered.
        launch: in a step.
        then: what follows from it and is waited for in the next step. What must run between the two counts as if it ran
            beside them: meanwhile the lane can do what was put off.
        free: calls that may run in the next step before it is waited for; what they launch is not counted.
        bound_bytes: that the device's tensors may take; None: as many as they like.
    """
    lane = problem.lane[launch]
    factor = math.prod(problem.slowdown) / problem.hindrance[lane]  # of compute's own seconds, in the lane's
    earlier = {launch, *closure(problem.before, launch), *free}
    found = _behind(problem, launch, earlier, _first_launches(problem, lane), factor, bound_bytes)
    covered = factor * sum(compute_seconds(problem, call) for call in found.updates | free)
    return max(0.0, found.seconds + problem.seconds[then] - covered)


def _together(problem: Problem, found: list[_Exposed], factor: float, *, last: _Exposed | None = None) -> float:
    """The most that a set of launches is exposed, of those that begin with the most exposed one, and the last."""
    chosen = [other for other in found if other.seconds > 0]
    chosen.sort(key=lambda other: (-other.seconds, other.launch))
    best = total = 0.0
    taken: set[int] = set()
    for other in (*([last] if last else ()), *chosen):
        total += other.seconds
        taken |= other.updates
        best = max(best, total - factor * sum(compute_seconds(problem, call) for call in taken))
    return best


def _beside(problem: Problem, launch: int, factor: float) -> _Exposed:
    """What is exposed of a launch by what can run while it is under way."""
    fixed = closure(problem.before, launch) | {launch}
    later = closure(problem.after, launch)
    for wait in later:
        if problem.kind[wait] == WAIT and problem.launch_of[wait] == launch:
            fixed |= closure(problem.after, wait) | {wait}
    beside = {call for call in range(len(problem)) if call not in fixed and compute_seconds(problem, call)}
    updates = {call for call in beside if _is_update(problem, call)}
    covered = factor * sum(compute_seconds(problem, call) for call in beside - updates)
    return _Exposed(problem.seconds[launch] - covered, launch, updates)


def _behind(
    problem: Problem,
    launch: int,
    earlier: set[int],
    leads_to: list[int],
    factor: float,
    bound_bytes: int | None,
) -> _Exposed:
    """What is exposed of a launch and of all behind it; see [Note: what follows a launch]."""
    updates: set[int] = set()
    put_off: dict[int, list[int]] = {}  # launch -> the calls that lead to it and may run behind this one
    covered = 0.0
    for call in range(len(problem)):
        if call in earlier or not compute_seconds(problem, call):
            continue
        if _is_update(problem, call):
            updates.add(call)
        elif leads_to[call] < 0:
            covered += factor * compute_seconds(problem, call)
        else:
            put_off.setdefault(leads_to[call], []).append(call)
    gains: list[_PutOff] = []
    for other, calls in put_off.items():
        seconds = factor * sum(compute_seconds(problem, call) for call in calls) - problem.seconds[other]
        heaviest = max(calls, key=lambda call: (compute_seconds(problem, call), -call))
        if seconds > factor * compute_seconds(problem, heaviest):
            covered += seconds  # something is gained without the heaviest call too
        elif seconds > 0:
            gains.append(_PutOff(seconds, heaviest))
    most = sum(gain.seconds for gain in gains)
    if bound_bytes is not None and gains:
        leading = closure(problem.before, launch)
        places = (launch, *sorted(leading, reverse=True)[:_PLACES])
        most = min(most, *(_gain_within(problem, gains, place, bound_bytes) for place in places))
    return _Exposed(problem.seconds[launch] - covered - most, launch, updates)


@dataclass(frozen=True)
class _PutOff:
    """What covers seconds behind a launch, if its heaviest call runs there."""

    seconds: float
    heaviest: int


def _gain_within(problem: Problem, gains: list[_PutOff], place: int, bound_bytes: int) -> float:
    """The most seconds that can be put off behind a call by what memory lets be held for them while it runs."""
    earlier, later = closure(problem.before, place), closure(problem.after, place)
    memory = problem.memory
    room = float(bound_bytes - memory.resting_bytes)
    wanted = {gain.heaviest for gain in gains}
    sizes = dict.fromkeys(wanted, 0.0)
    for storage, begin in enumerate(memory.begin):
        uses, size = memory.uses[storage], memory.size[storage]
        if begin != place and begin >= 0 and begin not in earlier:
            continue
        if begin == place or not uses or any(use == place or use in later for use in uses):
            room -= size
            continue
        readers = wanted.intersection(uses)
        for call in readers:  # of several, each takes a part of it, which is no more than what any of them takes
            sizes[call] += size / len(readers)
    total = 0.0
    for gain in sorted(gains, key=lambda gain: (sizes[gain.heaviest] / gain.seconds, gain.heaviest)):
        held = sizes[gain.heaviest]
        part = min(1.0, max(0.0, room) / held) if held else 1.0
        total += part * gain.seconds
        room -= part * held
    return total


def _first_launches(problem: Problem, lane: int) -> list[int]:
    """Call -> the first launch of a lane by the program that it leads to, or is; -1: none."""
    found = [-1] * len(problem)
    for call in reversed(range(len(problem))):
        if problem.kind[call] == LAUNCH and problem.lane[call] == lane:
            found[call] = call
        else:
            found[call] = min((found[other] for other in problem.after[call] if found[other] >= 0), default=-1)
    return found


def _is_update(problem: Problem, call: int) -> bool:
    return problem.nodes[call].meta["phase"] == "update"
