"""Compute runs before its turn as far as a policy says, and no farther."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fxzero.schedule.least_memory import least_memory_order
from fxzero.schedule.list_schedule import Policy, list_schedule, ways_to_end
from fxzero.schedule.out_of_turn import OutOfTurn
from fxzero.schedule.problem import LAUNCH, RUN, Problem
from tests.schedule.steps import problem_of, rewritten


@pytest.fixture(scope="module")
def slow() -> Problem:
    """Blocks that are recomputed, behind links so slow that compute often waits."""
    return problem_of(rewritten(zero=3, depth=5, recompute="blocks"), "h100_ethernet")


def queue_of(problem: Problem) -> list[int]:
    """Compute by program, updates left out."""
    phases = [node.meta["phase"] for node in problem.nodes]
    timed = [call for call in range(len(problem)) if problem.kind[call] == RUN and problem.lane[call] == 0]
    return [call for call in timed if problem.seconds[call] and phases[call] != "update"]


def earliest(problem: Problem, *, early: float, light: bool = False) -> float:
    """The most mean seconds of a message by which a call ran before the first one left, with ample memory."""
    policy = Policy(early=early, light=light)
    order = list_schedule(
        problem, policy, way_out=least_memory_order(problem), bound_bytes=10**15, ways=ways_to_end(problem)
    )
    left, turn, passed = queue_of(problem), {}, 0.0
    for call in left:
        turn[call], passed = passed, passed + problem.seconds[call]
    most = 0.0
    for call in order:
        if call in turn:
            most = max(most, turn[call] - turn[left[0]])
            left.remove(call)
    messages = [seconds for seconds, kind in zip(problem.seconds, problem.kind, strict=True) if kind == LAUNCH]
    return most / (sum(messages) / len(messages))


def test_no_call_is_earlier_than_the_policy_says(slow: Problem) -> None:
    """Without a limit some are: the other lines can fail."""
    farthest = earliest(slow, early=math.inf)
    assert farthest > 0
    assert earliest(slow, early=0.0) == 0.0
    assert earliest(slow, early=0.5 * farthest) <= 0.5 * farthest
    assert earliest(slow, early=1.01 * farthest) == farthest


def test_what_leaves_nothing_behind_may_be_early(slow: Problem) -> None:
    """All calls of a small step are light; with values of gigabytes none is that leaves one behind."""
    farthest = earliest(slow, early=math.inf)
    assert earliest(slow, early=0.0, light=True) == farthest
    memory = replace(slow.memory, size=[10**9 for _ in slow.memory.size])
    assert earliest(replace(slow, memory=memory), early=0.0, light=True) < farthest


def test_turns_go_on_as_calls_run(slow: Problem) -> None:
    first, second, *_ = queue_of(slow)
    out_of_turn = OutOfTurn(slow, [*map(float, range(len(slow)))], early=0.0, light=False)
    taken: set[int] = set()
    assert out_of_turn.allows(first, taken.__contains__)
    assert not out_of_turn.allows(second, taken.__contains__)
    taken.add(first)
    assert out_of_turn.allows(second, taken.__contains__)
