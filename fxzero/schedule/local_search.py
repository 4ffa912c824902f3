"""The best order that was found for a step: of list schedules by several policies, improved where compute waits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fxzero.errors import PlanError
from fxzero.graph.text import size_text
from fxzero.schedule.bound import LowerBound, lower_bound
from fxzero.schedule.evaluate import memory_of, times_of
from fxzero.schedule.least_memory import least_memory_order
from fxzero.schedule.list_schedule import BY_SLACK, BY_WAY, Policy, list_schedule, waits_at_readers, ways_to_end
from fxzero.schedule.problem import Problem

POLICIES = (
    Policy(),
    Policy(compute=BY_SLACK),
    Policy(compute=BY_SLACK, fetch_first=False),
    Policy(fetch_first=False),
    Policy(ahead=1),
    Policy(ahead=3, fetch_first=False),
    Policy(compute=BY_WAY),
)
ENOUGH = 0.995  # of the lower bound: nothing further is tried
MOST_ROUNDS, ROUNDS_BY_CALLS = 8, 120_000  # of improvement: at most, and for all calls together
PARTS_OF_ROOM = (0.75, 0.5, 0.25)  # between the smallest peak and the bound
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
    program_peak = int(memory_of(problem, program).max())
    limit = program_peak if bound_bytes is None else bound_bytes
    way_out = _way_out(problem, limit)
    bound = lower_bound(problem)
    best: Schedule | None = None

    def consider(order: list[int], how: str) -> None:
        nonlocal best
        peak = int(memory_of(problem, order).max())
        if peak > limit:
            return
        found = Schedule(order, times_of(problem, order).seconds, peak, bound, how)
        if best is None or (found.seconds, found.peak_bytes) < (best.seconds, best.peak_bytes):
            best = found

    consider(program, "the order of the program")
    consider(way_out, "the order that holds least memory")
    ways = ways_to_end(problem)
    made: list[tuple[float, int, Policy, list[int]]] = []
    for index, policy in enumerate(POLICIES):
        order = list_schedule(problem, policy, way_out=way_out, bound_bytes=limit, ways=ways)
        made.append((times_of(problem, order).seconds, index, policy, order))
        consider(order, str(policy))
        consider(waits_at_readers(problem, order), f"{policy}, waits at readers")
        if best is not None and best.part_of_bound >= ENOUGH:
            return best
    _, _, policy, order = min(made)
    smallest = int(memory_of(problem, way_out).max())
    for part in PARTS_OF_ROOM:  # what is fetched early under a wider bound may leave compute less room
        tighter = smallest + int(part * (limit - smallest))
        other = list_schedule(problem, policy, way_out=way_out, bound_bytes=tighter, ways=ways)
        consider(waits_at_readers(problem, other), f"{policy}, {part:.0%} of the room")
    for number, urged in enumerate(_urged(problem, policy, order, way_out=way_out, limit=limit, ways=ways)):
        consider(waits_at_readers(problem, urged), f"{policy}, improved {number + 1} times")
    assert best is not None, "the way out fits"
    return best


def _urged(
    problem: Problem, policy: Policy, order: list[int], *, way_out: Sequence[int], limit: int, ways: Sequence[float]
) -> Iterator[list[int]]:
    """Orders in which launches that compute stood still for come earlier than before.

    The time that compute lost is added to the priority of each launch, and the list schedule made again.
    Source: squeaky wheel optimization (Joslin and Clements, 1999).
    """
    rank = [-way for way in ways]
    for _ in range(min(MOST_ROUNDS, max(1, ROUNDS_BY_CALLS // len(problem)))):
        stalls = times_of(problem, order).stalls
        if not stalls:
            return
        for wait, seconds in stalls:
            rank[problem.launch_of[wait]] -= URGE * seconds
        order = list_schedule(problem, policy, way_out=way_out, bound_bytes=limit, ways=ways, rank=rank)
        yield order


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
