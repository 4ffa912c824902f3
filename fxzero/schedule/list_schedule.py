"""An order made front to back: whenever compute is free, what matters most of all that may run and fits.

A launch is issued just before its lane would run dry, a wait as soon as its launch is done, compute by priority; where
nothing can be computed, compute stands still until the next launch is done. Calls that take no time come at once.
Memory is a constraint, see [Note: can it be finished]. Source: list scheduling (Graham, 1966) with the longest way to
the end as priority (Hu, 1961).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fxzero.graph import collectives as c10d
from fxzero.schedule.clock import Clock
from fxzero.schedule.least_memory import Reserve
from fxzero.schedule.out_of_turn import OutOfTurn
from fxzero.schedule.problem import CARRIED, LAUNCH, ON_HOST, RUN, WAIT, Problem, compute_seconds

_MOST_TRIED, _MOST_EARLY = 64, 200  # calls that do not fit, or are too early too, before a heap is left alone

BY_WAY, BY_PROGRAM, BY_PLACE, BY_SLACK = "by the way to the end", "by program", "by the way out", "by slack"


@dataclass(frozen=True)
class Policy:
    """What a list schedule prefers.

    Args:
        compute: the priority of compute: BY_WAY, BY_PROGRAM, BY_PLACE in the way out, or BY_SLACK: by program, unless a
            call has a way to the end that is longer than all compute that is left. Updates come last, unless a launch
            for the next step waits for them.
        ahead: how many fetches may be launched and unread when another one is launched.
        queue_s: seconds of work that lanes have queued beyond the call that compute is given.
        fetch_first: a lane takes fetches before what gives memory back.
        in_turn: fetches are launched in the order in which the way out reads them, so that what may come early does not
            take the memory of what is read before it.
        early, light: how early compute may run, of `OutOfTurn`: in mean seconds of a message, and whether calls that
            leave next to nothing behind may run however early.
        inputs_first: gradients of inputs come before products that are only sent, which come where they are sent: what
            was gathered is given back before memory is needed for these. Not with BY_WAY.
    """

    compute: str = BY_PROGRAM
    ahead: float = math.inf
    queue_s: float = 0.0
    fetch_first: bool = True
    in_turn: bool = True
    early: float = math.inf
    light: bool = False
    inputs_first: bool = False


def ways_to_end(problem: Problem) -> list[float]:
    """Call -> seconds of the longest chain of calls that begins with it.

    A launch for the next step may end after this one, by as much as that has to compute before it reads it.
    """
    way = [0.0] * len(problem)
    for call in reversed(range(len(problem))):
        behind = max((way[other] for other in problem.after[call]), default=0.0)
        way[call] = max(behind, 0.0) + problem.seconds[call] + problem.launch_s[call] - problem.leads.get(call, 0.0)
    return way


def ranks(problem: Problem, ways: Sequence[float]) -> list[float]:
    """Call -> priority of a launch among those of its lane, lowest first: what has most to follow it.

    Source: the largest tail first (Schrage, 1971), which what a lane does for the launch itself is no part of.

    Args:
        problem: what is ordered.
        ways: of `ways_to_end`.
    """
    return [seconds - way for seconds, way in zip(problem.seconds, ways, strict=True)]


def list_schedule(
    problem: Problem,
    policy: Policy,
    *,
    way_out: Sequence[int],
    bound_bytes: int,
    ways: Sequence[float],
    rank: Sequence[float] | None = None,
    before: Clock | None = None,
    at_most_s: float = math.inf,
) -> list[int]:
    """An order within the bound on memory; empty if it was given up.

    Args:
        problem: what is ordered.
        policy: what to prefer.
        way_out: an order whose peak is at most `bound_bytes`.
        bound_bytes: of the device.
        ways: of `ways_to_end`.
        rank: call -> priority of a launch among those of its lane, lowest first; default: by policy.
        before: of the step before, where that has launched something for this one.
        at_most_s: an order that is sure to take more seconds is given up.
    """
    run = _Run(problem, policy, way_out, bound_bytes, ways, rank, before)
    return run.order if run.go(at_most_s) else []


class _Run:
    def __init__(
        self,
        problem: Problem,
        policy: Policy,
        way_out: Sequence[int],
        bound_bytes: int,
        ways: Sequence[float],
        rank: Sequence[float] | None,
        before: Clock | None,
    ) -> None:
        self.problem, self.policy, self.ways = problem, policy, ways
        self.reserve = Reserve(problem, way_out, bound_bytes)
        self.order: list[int] = []
        self.missing = [len(earlier) for earlier in problem.before]
        self.clock = Clock(problem, before=before)
        self.at_once: list[tuple[float, int]] = []
        self.compute: list[tuple[float, int]] = []
        self.by_way: list[tuple[float, int]] = []  # the same calls
        self.left = sum(s for s, lane in zip(problem.seconds, problem.lane, strict=True) if lane == 0)
        self.to_do = [0.0] * len(problem.lanes)  # seconds of each lane alone
        for call in range(len(problem)):
            self.to_do[0] += compute_seconds(problem, call)
            if problem.lane[call] > 0:
                self.to_do[problem.lane[call]] += problem.seconds[call]
        self.waits: list[tuple[float, int]] = []  # (when done, wait)
        self.launches: dict[tuple[int, bool], list[tuple[float, int]]] = {}  # (lane, is a fetch) -> by priority
        self.fetches, self.fed_by = problem.fetched
        self.unread: set[int] = set()
        self.turns = {lane: deque[int]() for lane in range(len(problem.lanes))}  # fetches that are not launched yet
        if policy.in_turn:
            for call in way_out:
                if call in self.fetches:
                    self.turns[problem.lane[call]].append(call)
        self.priority = self._priorities(way_out)
        self.out_of_turn = OutOfTurn(problem, self.priority, early=policy.early, light=policy.light)
        self.rank = list(rank) if rank is not None else ranks(problem, ways)
        for call in range(len(problem)):
            if not self.missing[call]:
                self._ready(call)

    def go(self, at_most_s: float) -> bool:
        """Order all calls, unless that is sure to take more seconds."""
        while len(self.order) < len(self.problem):
            if self._at_least_s() > at_most_s:
                return False
            self._step()
        return True

    def _at_least_s(self) -> float:
        """Seconds that the step will take, whatever follows."""
        problem, now = self.problem, self.clock.now
        found = self.to_do[0]
        if not problem.leads:  # else lanes may go on in the next step
            for lane in range(1, len(problem.lanes)):
                under_way = max(0.0, self.clock.free(lane) - now) / problem.hindrance[lane]
                found = max(found, under_way + self.to_do[lane])
        return now + found

    def _priorities(self, way_out: Sequence[int]) -> list[float]:
        if self.policy.compute == BY_WAY:
            return [-way for way in self.ways]
        place = [0.0] * len(self.problem)
        for index, call in enumerate(way_out):
            is_last = self.problem.nodes[call].meta["phase"] == "update" and call not in self.problem.leading
            place[call] = (index if self.policy.compute == BY_PLACE else call) + is_last * len(self.problem)
        if self.policy.inputs_first:
            own = list(place)
            for call, launch in self.problem.products.items():  # behind the call before the launch, in their own order
                place[call] = own[launch] - 1 + own[call] / (2 * len(place))
        return place

    def _ready(self, call: int) -> None:
        kind = self.problem.kind[call]
        if kind in (WAIT, CARRIED):
            heapq.heappush(self.waits, (self.clock.due(call), call))
        elif kind == LAUNCH:
            key = (self.problem.lane[call], call in self.fetches)
            heapq.heappush(self.launches.setdefault(key, []), (self.rank[call], call))
        elif self.problem.lane[call] < 0 or kind == ON_HOST:
            heapq.heappush(self.at_once, (call, call))
        else:
            self._wait_for_compute(call)

    def _wait_for_compute(self, call: int) -> None:
        heapq.heappush(self.compute, (self.priority[call], call))
        if self.policy.compute == BY_SLACK:
            heapq.heappush(self.by_way, (-self.ways[call], call))

    def _step(self) -> None:
        """One decision."""
        while (call := self._first_that_fits(self.at_once)) is not None:
            self._take(call)
        if (call := self._first_that_fits(self.waits, until=self.clock.now)) is not None:
            self._take(call)
            return
        call = self._first_that_fits(self.by_way, until=-self.left)
        if call is None:
            call = self._first_that_fits(self.compute)
        wait = self._first_that_fits(self.waits) if call is None else None
        until = self.clock.now
        if call is not None:
            until += self.problem.seconds[call]
        elif wait is not None:
            until = max(until, self.clock.due(wait))
        if self._launch(until, idle=call is None and wait is not None):
            if call is not None:
                self._wait_for_compute(call)
            if wait is not None:
                heapq.heappush(self.waits, (self.clock.due(wait), wait))
            return
        call = wait if call is None else call
        if call is not None:
            self._take(call)
        elif len(self.order) < len(self.problem):
            self._take(self.reserve.next_call)  # nothing that is ready fits by itself: go on as the way out does

    def _first_that_fits(self, ready: list[tuple[float, int]], *, until: float = math.inf) -> int | None:
        """Take the first call from a heap that fits, of keys up to `until`; those before it stay."""
        kept: list[tuple[float, int]] = []
        found = None
        most = _MOST_TRIED if self.policy.early == math.inf else _MOST_EARLY
        while ready and found is None and len(kept) < most and ready[0][0] <= until:
            item = heapq.heappop(ready)
            if self.reserve.is_taken(item[1]):
                continue
            if self.out_of_turn.allows(item[1], self.reserve.is_taken) and self.reserve.fits(item[1]):
                found = item[1]
            else:
                kept.append(item)
        for item in kept:
            heapq.heappush(ready, item)
        return found

    def _launch(self, until: float, *, idle: bool) -> bool:
        """Issue one launch for a lane that would run dry before `until`; whether there was one.

        If compute is idle until then, also one whose issue takes compute less time than that: it costs nothing there.
        """
        for lane in range(1, len(self.problem.lanes)):
            runs_dry = self.clock.free(lane) <= until + self.policy.queue_s
            if not runs_dry and not idle:
                continue
            for fetch in (self.policy.fetch_first, not self.policy.fetch_first):
                heap = self.launches.get((lane, fetch))
                while heap and self.reserve.is_taken(heap[0][1]):
                    heapq.heappop(heap)
                if not heap or (fetch and len(self.unread) > self.policy.ahead):
                    continue
                call = heap[0][1] if not fetch or not self.policy.in_turn else self._in_turn(lane)
                if not runs_dry and not 0 < self.problem.launch_s[call] <= until - self.clock.now:
                    continue
                if self.missing[call] or not self.reserve.fits(call):
                    continue
                self._take(call)
                return True
        return False

    def _in_turn(self, lane: int) -> int:
        """The fetch of a lane that is read first, of those that are not launched; there is one."""
        turn = self.turns[lane]
        while self.reserve.is_taken(turn[0]):
            turn.popleft()
        return turn[0]

    def _take(self, call: int) -> None:
        problem = self.problem
        kind, lane = problem.kind[call], problem.lane[call]
        self.reserve.take(call)
        self.order.append(call)
        self.clock.issue(call)
        self.to_do[0] -= compute_seconds(problem, call)
        if lane > 0:
            self.to_do[lane] -= problem.seconds[call]
        if kind == LAUNCH and call in self.fetches:
            self.unread.add(call)
        elif kind == RUN and lane == 0:
            self.left -= problem.seconds[call]
        if self.unread and kind == RUN and lane >= 0:
            self.unread.difference_update(self.fed_by.get(call, ()))
        for other in problem.after[call]:
            self.missing[other] -= 1
            if not self.missing[other]:
                self._ready(other)


def waits_at_readers(problem: Problem, order: Sequence[int]) -> list[int]:
    """The order with each wait for a fetch, and what only hands it on, moved to its first reader.

    Nothing gets slower by it, and where a transfer takes longer than was thought, compute does not stand still early.
    """
    fetches, handed = problem.fetched
    moved: set[int] = set()
    for call, kind in enumerate(problem.kind):
        brought = call in handed or kind == CARRIED or any(other in moved for other in problem.reads[call])
        hands_on = kind in (WAIT, CARRIED) or problem.lane[call] < 0
        if brought and hands_on and call not in fetches and not _ends(problem, call):
            moved.add(call)
    out: list[int] = []
    placed = [False] * len(problem)

    def place(call: int) -> None:
        for other in problem.before[call]:
            if not placed[other] and other in moved:
                place(other)
        if not placed[call]:
            placed[call] = True
            out.append(call)

    for call in order:
        if call not in moved:
            place(call)
    for call in order:
        place(call)
    return out


def _ends(problem: Problem, call: int) -> bool:
    """Whether a call ends a life by itself: releases stay where they are."""
    return c10d.is_release(problem.nodes[call])
