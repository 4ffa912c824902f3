"""Orders in which a reduction, with what only leads to it and what follows from it, stands later.

In the order that holds least memory each gradient is reduced where it is born. What must be there meanwhile (an
embedding's gradient takes gigabytes, and as much again while it is sent) may leave no room for the next gather, so that
compute stands still for all of it. The same reduction some calls later, its matrix product with it, may leave room.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxzero.schedule.problem import RUN, Problem, compute_seconds

# of a launch's seconds: by how much compute it is delayed
PARTS = (0.25, 0.5, 1.0, 1.25, 1.5, 2.0, 3.0, 6.0)


def delayed_group(problem: Problem, launch: int, *, with_work: bool) -> set[int]:
    """What is delayed with a launch: all calls behind it, and those that nothing else waits for.

    Args:
        problem: what is ordered.
        launch: of a reduction.
        with_work: whether calls that lead to it are delayed too; else only it and what is behind it.
    """
    group = {launch}
    stack = [launch]
    while stack:
        for call in problem.after[stack.pop()]:
            if call not in group:
                group.add(call)
                stack.append(call)
    if not with_work:
        return group
    stack = [launch]
    while stack:
        for call in problem.before[stack.pop()]:
            if call not in group and problem.kind[call] == RUN and group.issuperset(problem.after[call]):
                group.add(call)
                stack.append(call)
    return group


def delays(
    problem: Problem, order: Sequence[int], group: set[int], *, launch: int, bound_bytes: int
) -> list[list[int]]:
    """Orders within the bound on memory in which a group stands together, later than it may.

    Args:
        problem: what is ordered.
        order: a legal order within the bound.
        group: of `delayed_group`.
        launch: its launch, whose seconds are the measure of the delays.
        bound_bytes: of the device.
    """
    kept = [call for call in order if call not in group]
    moved = [call for call in order if call in group]
    position = {call: index for index, call in enumerate(kept)}
    first = max(
        (position[other] + 1 for call in moved for other in problem.before[call] if other in position), default=0
    )
    fits = _fits(problem, kept, moved, first, bound_bytes)
    if not fits.any():
        return []
    passed = np.concatenate([[0.0], np.cumsum([compute_seconds(problem, call) for call in kept[first:]])])
    places = set()
    for part in PARTS:
        place = int(np.searchsorted(passed, part * problem.seconds[launch]))
        at = np.flatnonzero(fits[: min(place, len(fits) - 1) + 1])
        if len(at):
            places.add(first + int(at[-1]))
    return [kept[:place] + moved + kept[place:] for place in sorted(places)]


def _fits(problem: Problem, kept: list[int], moved: list[int], first: int, bound_bytes: int) -> np.ndarray:
    """Whether the group may stand before each call of the rest from `first` on, and at its end."""
    memory, group, count = problem.memory, set(moved), len(kept)
    position = {call: index for index, call in enumerate(kept)}
    line = np.zeros(count + 2, dtype=np.int64)  # without the group: what it reads dies at its last other reader
    waiting = np.zeros(count + 2, dtype=np.int64)  # what is there for the group alone
    for storage, begin in enumerate(memory.begin):
        size, uses = memory.size[storage], memory.uses[storage]
        if begin in group:
            continue
        last = max((position[call] for call in uses if call in position), default=position.get(begin, -1))
        last = last if uses else count
        line[position[begin] if begin >= 0 else 0] += size
        line[last + 1] -= size
        if not group.isdisjoint(uses):
            waiting[last + 1] += size
    line, waiting = np.cumsum(line)[: count + 1], np.cumsum(waiting)[: count + 1]
    held = problem.memory.resting_bytes + line + waiting
    at = np.maximum.accumulate(held[first:]) <= bound_bytes
    # between two calls there is no more than beside either
    between = np.minimum(held[first:], np.concatenate([held[first - 1 : first] if first else held[:1], held[first:-1]]))
    return at & (between + _peak_inside(problem, moved) <= bound_bytes)


def _peak_inside(problem: Problem, moved: list[int]) -> int:
    """The most bytes that a group has of its own while it runs in this order, less what it has done with by then."""
    memory = problem.memory
    place = {call: index for index, call in enumerate(moved)}
    line = np.zeros(len(moved) + 1, dtype=np.int64)
    touched = {s for call in moved for s in (*memory.used_by.get(call, ()), *memory.begun_by.get(call, ()))}
    for storage in touched:
        uses = memory.uses[storage]
        begin = place.get(memory.begin[storage])
        if begin is not None:
            line[begin] += memory.size[storage]
        if uses and all(call in place for call in uses):
            line[max(place[call] for call in uses) + 1] -= memory.size[storage]
    return int(np.cumsum(line)[:-1].max())
