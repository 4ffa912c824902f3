"""The order that holds least memory, and whether an order that began otherwise can still be finished within a bound.

[Note: can it be finished]
A memory bound as a constraint needs more than that the next call fits: what was fetched early may leave too little for
the rest. So a partial order is kept finishable. The rest could always follow in one order that is known to fit, the one
that holds least; `Reserve` knows what memory that would take at each of its positions, and lets a call come early only
where the line so raised stays below the bound. This is the banker's algorithm (Dijkstra, 1965) with one known way out.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from fxzero.graph import collectives as c10d
from fxzero.graph import swap_ops
from fxzero.schedule.evaluate import memory_of
from fxzero.schedule.problem import LAUNCH, WAIT, Problem


def least_memory_order(problem: Problem) -> list[int]:
    """The order with the lowest peak of three: that of the program, and two in which nothing is fetched early."""
    orders = [_frugal(problem, updates_at_once=True), _frugal(problem, updates_at_once=False), [*range(len(problem))]]
    return min(orders, key=lambda order: int(memory_of(problem, order).max()))


def without_overlap(problem: Problem) -> list[int]:
    """The order in which each transfer is waited for where it is launched, and a fetch launched where it is read."""
    return _frugal(problem, updates_at_once=True)


def _frugal(problem: Problem, *, updates_at_once: bool) -> list[int]:
    """Each tensor is fetched where it is first read; what gives memory back happens at once.

    Compute keeps the order of the program. Gathers and moves to the device, with what prepares them, stand before their
    first reader; releases, reductions and moves off the device stand behind what they wait for. So do updates, unless
    they stand where the program has them: their own temporaries may be what makes a peak.
    """
    fetched = _fetched(problem)
    at_once = _at_once(problem, fetched, updates_at_once)
    order: list[int] = []
    placed = [False] * len(problem)
    missing = [0] * len(problem)
    waiting: list[list[int]] = [[] for _ in problem.nodes]
    needs: list[set[int]] = []  # with what is fetched left out: it comes when it is asked for
    for call, earlier in enumerate(problem.before):
        need = {n for other in earlier for n in (needs[other] if other in fetched else (other,))}
        needs.append(need)
        if call in at_once:
            if problem.nodes[call].meta["phase"] == "update":  # a decay of weights, say, brings no gather to the front
                need = set(earlier)
            missing[call] = len(need)
            for other in need:
                waiting[other].append(call)
    ready: list[int] = [call for call in at_once if not missing[call]]
    heapq.heapify(ready)

    def place(call: int) -> None:
        stack = [call]
        while stack:
            top = stack[-1]
            earlier = [other for other in problem.before[top] if not placed[other]]
            if earlier:
                stack += reversed(earlier)
                continue
            stack.pop()
            if placed[top]:
                continue
            placed[top] = True
            order.append(top)
            for other in waiting[top]:
                missing[other] -= 1
                if not missing[other]:
                    heapq.heappush(ready, other)

    for call in range(len(problem)):
        while ready:
            place(heapq.heappop(ready))
        if call not in fetched and call not in at_once:
            place(call)
    while ready:
        place(heapq.heappop(ready))
    for call in range(len(problem)):
        place(call)
    return order


def _fetched(problem: Problem) -> set[int]:
    """Calls that bring a tensor to the device for a later reader, and what only prepares or hands on these."""
    nodes = problem.nodes
    fetched: set[int] = set()
    for call, node in enumerate(nodes):
        brings = c10d.gathers_parameters(node) or (problem.kind[call] == LAUNCH and node.target is swap_ops.swap_in)
        hands_on = problem.lane[call] < 0 and any(other in fetched for other in problem.reads[call])
        if brings or (hands_on and not c10d.is_release(node)):
            fetched.add(call)
    for call in reversed(range(len(nodes))):
        if call in fetched or c10d.is_release(nodes[call]) or problem.kind[call] == WAIT:
            continue
        readers = [other for other in problem.after[call] if call in problem.reads[other]]
        if readers and all(other in fetched for other in problem.after[call]) and not _long_lived(problem, call):
            fetched.add(call)
    return fetched


def _long_lived(problem: Problem, call: int) -> bool:
    """Whether a call follows from compute: it then stands where the program has it."""
    return any(problem.lane[other] >= 0 or problem.kind[other] == WAIT for other in problem.reads[call])


def _at_once(problem: Problem, fetched: set[int], updates: bool) -> set[int]:
    """Calls that give memory back, or lead to one that does."""
    found: set[int] = set()
    for call, node in enumerate(problem.nodes):
        if call in fetched:
            continue
        is_update = node.meta["phase"] == "update"
        gives = problem.kind[call] in (LAUNCH, WAIT) or c10d.is_release(node) or is_update
        if gives or (any(other in found for other in problem.reads[call]) and node.meta["phase"] == "backward"):
            if updates or not is_update:
                found.add(call)
    return found


class Reserve:
    """Memory as an order grows call by call; see [Note: can it be finished].

    Args:
        problem: what is ordered.
        way_out: an order whose peak is at most `bound_bytes`.
        bound_bytes: of the device.

    Attributes:
        bytes_now: on the device between the calls that were taken and the next one.
    """

    def __init__(self, problem: Problem, way_out: Sequence[int], bound_bytes: int) -> None:
        memory = problem.memory
        self.bound_bytes = bound_bytes
        self._memory = memory
        self._order = list(way_out)
        self._position = [0] * len(problem)
        for index, call in enumerate(way_out):
            self._position[call] = index
        self._taken = [False] * len(problem)
        self._next = 0
        self._line = _Line(memory_of(problem, way_out))
        self.bytes_now = memory.resting_bytes + sum(memory.size[s] for s in memory.begun_by.get(-1, ()))
        # of each storage, the calls that may end it: the last in the way out stands last
        self._uses = [sorted(calls, key=self._position.__getitem__) for calls in memory.uses]

    @property
    def next_call(self) -> int:
        """The first call of the way out that was not taken yet; it always fits."""
        return self._order[self._next]

    def is_taken(self, call: int) -> bool:
        """Whether a call was taken."""
        return self._taken[call]

    def fits(self, call: int) -> bool:
        """Whether the order may go on with a call that is ready."""
        begun = self._memory.begun_by.get(call)
        position = self._position[call]
        if not begun or position == self._next:
            return True
        sizes = self._memory.size
        if self.bytes_now + sum(sizes[s] for s in begun) > self.bound_bytes:
            return False
        lasting = sum(sizes[s] for s in begun if self._memory.uses[s] != [call])
        return self._line.highest(self._next, position) + lasting <= self.bound_bytes

    def take(self, call: int) -> None:
        """The order goes on with a call."""
        memory, position = self._memory, self._position[call]
        self._taken[call] = True
        early = position > self._next
        for storage in memory.begun_by.get(call, ()):
            self.bytes_now += memory.size[storage]
            if early:
                self._line.add(self._next, position, memory.size[storage])
        if not early:
            while self._next < len(self._order) and self._taken[self._order[self._next]]:
                self._next += 1
        for storage in memory.used_by.get(call, ()):
            self._end(storage)

    def _end(self, storage: int) -> None:
        """A storage may die earlier than it would have."""
        uses, size = self._uses[storage], self._memory.size[storage]
        if not uses or not self._taken[uses[-1]]:
            return
        last = self._position[uses[-1]]
        while uses and self._taken[uses[-1]]:
            uses.pop()
        if not uses:
            self.bytes_now -= size
        first = max(self._next, self._position[uses[-1]] + 1 if uses else 0)
        if first <= last:
            self._line.add(first, last + 1, -size)


class _Line:
    """Numbers to which a value is added over a range, and the highest of a range: in blocks, so that both are quick."""

    _BITS = 7

    def __init__(self, values: np.ndarray) -> None:
        blocks = (len(values) >> self._BITS) + 1
        lowest = np.iinfo(np.int64).min // 4
        self._values = np.full((blocks, 1 << self._BITS), lowest, dtype=np.int64)
        self._values.reshape(-1)[: len(values)] = values
        self._added = np.zeros(blocks, dtype=np.int64)
        self._highest = self._values.max(axis=1)

    def _parts(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """(block, first, end) of the blocks that a range covers in part."""
        bits, mask = self._BITS, (1 << self._BITS) - 1
        first, last = start >> bits, (end - 1) >> bits
        if first == last:
            return [(first, start & mask, ((end - 1) & mask) + 1)]
        return [(first, start & mask, mask + 1), (last, 0, ((end - 1) & mask) + 1)]

    def add(self, start: int, end: int, value: int) -> None:
        """Add to all from `start` to before `end`."""
        parts = self._parts(start, end)
        for block, first, stop in parts:
            row = self._values[block]
            row[first:stop] += value
            self._highest[block] = row.max() + self._added[block]
        if len(parts) == 2:
            middle = slice(parts[0][0] + 1, parts[1][0])
            self._added[middle] += value
            self._highest[middle] += value

    def highest(self, start: int, end: int) -> int:
        """The highest from `start` to before `end`."""
        parts = self._parts(start, end)
        found = max(int(self._values[block][first:stop].max() + self._added[block]) for block, first, stop in parts)
        if len(parts) == 2 and parts[0][0] + 1 < parts[1][0]:
            found = max(found, int(self._highest[parts[0][0] + 1 : parts[1][0]].max()))
        return found
