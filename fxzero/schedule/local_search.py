"""The best order that was found for a step: of list schedules by several policies, improved where compute waits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from fxzero.errors import PlanError
from fxzero.graph.text import size_text
from fxzero.schedule.bound import LowerBound, lower_bound
from fxzero.schedule.clock import Clock
from fxzero.schedule.delays import delayed_group, delays
from fxzero.schedule.evaluate import memory_of, times_of
from fxzero.schedule.least_memory import least_memory_order
from fxzero.schedule.list_schedule import (
    BY_PLACE,
    BY_PROGRAM,
    BY_SLACK,
    BY_WAY,
    Policy,
    list_schedule,
    ranks,
    waits_at_readers,
    ways_to_end,
)
from fxzero.schedule.problem import CARRIED, LAUNCH, Problem

POLICIES = (
    Policy(),
    Policy(ahead=1),
    Policy(ahead=0),
    Policy(ahead=2),
    Policy(fetch_first=False),
    Policy(ahead=1, fetch_first=False),
    Policy(ahead=0, fetch_first=False),
    Policy(compute=BY_SLACK),
    Policy(compute=BY_SLACK, fetch_first=False),
    Policy(in_turn=False),
    Policy(in_turn=False, compute=BY_SLACK),
    Policy(compute=BY_WAY),
)
LEAST_POLICIES, POLICIES_BY_CALLS = 4, 300_000  # that are tried: at least, and for all calls together
IN_TURN = (  # that keep compute near its turn
    Policy(fetch_first=False, early=4),
    Policy(fetch_first=False, early=2, light=True),
    Policy(fetch_first=False, early=0, light=True),
    Policy(early=4),
    Policy(fetch_first=False, early=4, inputs_first=True),
)
LEAST_IN_TURN, IN_TURN_BY_CALLS = 1, 100_000  # that are tried: at least, and for all calls together
ENOUGH = 0.995  # of the lower bound: nothing further is tried
MOST_ROUNDS, ROUNDS_BY_CALLS = 8, 120_000  # of improvement: at most, and for all calls together
PARTS_OF_ROOM = (0.75, 0.5, 0.25)  # between the smallest peak and the bound
MOST_DELAYS, DELAYS_BY_CALLS = 120, 400_000  # list schedules with something delayed: at most, and calls of all of them
MOST_DELAYS_IN_TURN, DELAYS_IN_TURN_BY_CALLS = 60, 200_000  # the same, of policies that keep compute near its turn
MOST_STALLS, LEAST_STALL = 4, 1e-3  # that are looked at in one round; of the step
MOST_LAUNCHES = 4  # before a stall
NO_GAIN = 1e-5  # of the step
IN_A_CHAIN = 0.01  # of the step: so much longer than the best one may an order seem to take
URGE = 4.0  # times the time lost by it, a launch becomes more urgent


@dataclass(frozen=True)
class Schedule:
    """An order with what is known of it.

    Args:
        order: all calls.
        seconds: that it takes.
        peak_bytes: of the device.
        bound: below which no order gets.
        how: what has made it.
    """

    order: list[int]
    seconds: float
    peak_bytes: int
    bound: LowerBound
    how: str

    @property
    def part_of_bound(self) -> float:
        """The lower bound's part of the time that it takes: 1.0 is best."""
        return self.bound.seconds / self.seconds if self.seconds else 1.0


def find_schedule(problem: Problem, *, bound_bytes: int | None = None) -> Schedule:
    """The fastest order that was found.

    Args:
        problem: what is ordered.
        bound_bytes: that the device's tensors may take, state included; None: as many as in the order of the program.

    Raises:
        PlanError: if even the order that holds least memory holds more.
    """
    program = list(range(len(problem)))
    limit = int(memory_of(problem, program).max()) if bound_bytes is None else bound_bytes
    way_out = _way_out(problem, limit)
    search = _Search(problem, limit, way_out)
    search.consider(program, "the order of the program")
    for policy in POLICIES[: _affordable(problem, POLICIES_BY_CALLS, least=LEAST_POLICIES)]:
        search.make(policy, search.way_out)
        if search.is_enough:
            return search.best
    search.in_part_of_the_room()
    search.urge()
    search.delay(Policy(ahead=search.policy.ahead), most=min(MOST_DELAYS, _affordable(problem, DELAYS_BY_CALLS)))
    if not search.is_enough:
        search.in_turn(way_out)
    return search.best


def _affordable(problem: Problem, calls: int, *, least: int = 1) -> int:
    """How often all calls of a problem may be gone through, for so many calls altogether."""
    return max(least, calls // max(1, len(problem)))


class _Search:
    """What was found so far.

    Args:
        problem: what is ordered.
        limit: bytes that the device's tensors may take.
        way_out: an order that takes no more.

    Attributes:
        best: the fastest order; of equal ones, the one with the lower peak.
        policy, way_out, order: what the fastest list schedule was made by, and from; and itself.
    """

    def __init__(self, problem: Problem, limit: int, way_out: list[int]) -> None:
        self.problem, self.limit, self.way_out = problem, limit, way_out
        self.policy, self.order = POLICIES[0], way_out
        self.ways = ways_to_end(problem)
        self.bound = lower_bound(problem)
        self._seconds = math.inf
        self._made = 0
        self._before: Clock | None = None  # at the end of the best order, where steps are in a chain
        self.best = self._schedule(way_out, "the order that holds least memory")[0]

    @property
    def is_enough(self) -> bool:
        """Whether nothing further need be tried."""
        return self.best.part_of_bound >= ENOUGH

    def _schedule(self, order: list[int], how: str) -> tuple[Schedule, Clock]:
        peak, times = int(memory_of(self.problem, order).max()), times_of(self.problem, order)
        return Schedule(order, times.seconds, peak, self.bound, how), times.clock

    def consider(self, order: list[int], how: str) -> float:
        """Keep an order if it is the best; the seconds that it takes."""
        found, clock = self._schedule(order, how)
        better = (found.seconds, found.peak_bytes) < (self.best.seconds, self.best.peak_bytes)
        if better and found.peak_bytes <= self.limit:
            self.best = found
            if self.problem.leads:
                self._before = clock
        return found.seconds

    def _listed(
        self,
        policy: Policy,
        way_out: list[int],
        *,
        limit: int,
        rank: list[float] | None = None,
        at_most_s: float = math.inf,
    ) -> list[int]:
        return list_schedule(
            self.problem,
            policy,
            way_out=way_out,
            bound_bytes=limit,
            ways=self.ways,
            rank=rank,
            before=self._before,
            at_most_s=at_most_s,
        )

    def make(self, policy: Policy, way_out: list[int], *, room: float = 1.0) -> float:
        """Consider a list schedule; the seconds that it takes, infinite if it was given up for being slower."""
        problem, limit = self.problem, self.limit
        if room < 1.0:
            smallest = int(memory_of(problem, way_out).max())
            limit = smallest + int(room * (limit - smallest))
        # in a chain it counts from the end of the best order, not of its own
        at_most = self._seconds * ((1 + IN_A_CHAIN) if problem.leads else (1 + 1e-9))
        order = self._listed(policy, way_out, limit=limit, at_most_s=at_most)
        self._made += 1
        if not order:
            return math.inf
        how = f"{policy}" + (f", {room:.0%} of the room" if room < 1.0 else "")
        seconds = self.consider(order, how)
        self.consider(waits_at_readers(problem, order), f"{how}, waits at readers")
        if seconds < self._seconds * (1 - NO_GAIN):
            self._seconds, self.policy, self.way_out, self.order = seconds, policy, way_out, order
        return seconds

    def in_part_of_the_room(self) -> None:
        """What is fetched early under a wider bound may leave compute less room."""
        policy = self.policy
        for part in PARTS_OF_ROOM:
            self.make(policy, self.way_out, room=part)

    def urge(self) -> None:
        """Launches that compute stood still for come earlier than before.

        The time that compute lost is added to the priority of each launch, and the list schedule made again.
        Source: squeaky wheel optimization (Joslin and Clements, 1999).
        """
        problem, policy, order = self.problem, self.policy, self.order
        rank = ranks(problem, self.ways)
        for _ in range(min(MOST_ROUNDS, _affordable(problem, ROUNDS_BY_CALLS))):
            stalls = times_of(problem, order).stalls
            if not stalls or self.is_enough:
                return
            for wait, seconds in stalls:
                rank[problem.launch_of[wait]] -= URGE * seconds
            order = self._listed(policy, self.way_out, limit=self.limit, rank=rank)
            self.consider(waits_at_readers(problem, order), f"{policy}, urged")

    def in_turn(self, way_out: list[int]) -> None:
        """The same from policies that keep compute near its turn; what was found before is not built upon.

        Args:
            way_out: that the search began with.
        """
        self._seconds = math.inf
        for policy in IN_TURN[: _affordable(self.problem, IN_TURN_BY_CALLS, least=LEAST_IN_TURN)]:
            self.make(policy, way_out)
            if self.is_enough:
                return
        self.delay(self.policy, most=min(MOST_DELAYS_IN_TURN, _affordable(self.problem, DELAYS_IN_TURN_BY_CALLS)))

    def delay(self, policy: Policy, *, most: int) -> None:
        """Reductions before the longest stalls are tried later, one after the other, while that makes the step shorter.

        Args:
            policy: of the list schedules, but for what compute prefers.
            most: how many list schedules are made.

        A way out says in which order things may still be finished, so it is there that a reduction is moved; the list
        schedules made from it follow ([Note: can it be finished]).
        """
        self._made, tried = 0, set[tuple[int, bool, float]]()
        while not self.is_enough:
            known = self._seconds
            stalls = sorted(times_of(self.problem, self.order).stalls, key=lambda stall: (-stall[1], stall[0]))
            longest = [wait for wait, seconds in stalls[:MOST_STALLS] if seconds > LEAST_STALL * self._seconds]
            any(self._delay_before(wait, policy, most, tried) for wait in longest)
            if self._seconds >= known:
                return

    def _delay_before(self, wait: int, policy: Policy, most: int, tried: set[tuple[int, bool, float]]) -> bool:
        """Try what was launched before a stall later; whether something was faster."""
        problem, way_out, known = self.problem, self.way_out, self._seconds
        fetches, _ = problem.fetched
        until = problem.launch_of[wait] if problem.kind[wait] == CARRIED else wait
        before = self.order[: self.order.index(until)]
        launches = [call for call in before if problem.kind[call] == LAUNCH and call not in fetches]
        for launch in reversed(launches[-MOST_LAUNCHES:]):
            for with_work in (True, False):
                if (launch, with_work, known) in tried:
                    continue
                tried.add((launch, with_work, known))
                group = delayed_group(problem, launch, with_work=with_work)
                orders = delays(problem, way_out, group, launch=launch, bound_bytes=self.limit)
                for compute in (BY_PROGRAM, BY_PLACE):
                    self._make_from(orders, replace(policy, compute=compute), most)
                if self._made >= most:
                    return self._seconds < known
        return self._seconds < known

    def _make_from(self, orders: list[list[int]], policy: Policy, most: int) -> None:
        """Consider list schedules from several ways out, the first and the last one first.

        Where these two take equally long, or both are given up, it makes no difference how long something is delayed,
        nor would it in those between.
        """
        ends = [self.make(policy, order) for order in (orders[:1] + orders[1:][-1:])[: most - self._made]]
        if len(ends) == 2 and ends[0] != ends[1] and abs(ends[1] - ends[0]) > NO_GAIN * ends[0]:
            for order in orders[1:-1][: most - self._made]:
                self.make(policy, order)


def _way_out(problem: Problem, limit: int) -> list[int]:
    """The order that holds least memory, if it fits."""
    least = least_memory_order(problem)
    line = memory_of(problem, least)
    if line.max() <= limit:
        return least
    at = int(np.argmax(line > limit))
    node = problem.nodes[least[min(at, len(least) - 1)]]
    raise PlanError.of(
        "Plan.memory_budget",
        expected=f"at least {size_text(int(line.max()))}, the peak of the order that holds least "
        f"memory; at %{node.name} ({node.meta['module'] or 'the model'}, {node.meta['phase']}) it holds "
        f"{size_text(int(line[at]))}",
        got=size_text(limit),
        fix="give it more, or need less: recompute='auto', zero=3, a smaller batch (accumulate=..), more ranks",
    )
