"""No more fetches are launched ahead than a policy says; in the order that holds least, none is."""

from __future__ import annotations

import math

import pytest

from fxzero.cost.compute import computes
from fxzero.schedule.least_memory import least_memory_order
from fxzero.schedule.list_schedule import Policy, list_schedule, ways_to_end
from fxzero.schedule.problem import RUN, Problem, closure
from tests.schedule.steps import problem_of, rewritten


def most_unread(problem: Problem, ahead: float) -> int:
    """The most fetches that were launched and not read yet when another one was launched, with ample memory."""
    order = list_schedule(
        problem,
        Policy(ahead=ahead, queue_s=1.0),
        way_out=least_memory_order(problem),
        bound_bytes=10**9,
        ways=ways_to_end(problem),
    )
    fetches, fed_by = problem.fetched
    unread: set[int] = set()
    most = 0
    for call in order:
        if call in fetches:
            most = max(most, len(unread))
            unread.add(call)
        elif problem.kind[call] == RUN and problem.lane[call] == 0:
            unread.difference_update(fed_by.get(call, ()))
    return most


def test_fetches_ahead_are_as_many_as_the_policy_says() -> None:
    """Without a limit there are more: the first three lines can fail."""
    problem = problem_of(rewritten(zero=3, depth=5))
    for ahead in (1, 2, 3):
        assert most_unread(problem, ahead) == ahead
    assert most_unread(problem, math.inf) > 3


@pytest.mark.parametrize("hardware", ["h100", "cpu"])
def test_a_decay_of_weights_brings_no_gather_to_the_front(hardware: str) -> None:
    """AdamW shrinks weights whatever their gradients: that may come late, and a gather stands where it is read."""
    problem = problem_of(rewritten(zero=3, regather=False), hardware)
    order = least_memory_order(problem)
    position = {call: index for index, call in enumerate(order)}
    fetches, _ = problem.fetched
    computed = [c for c, n in enumerate(problem.nodes) if n.meta["phase"] == "forward" and computes(n)]
    read_by = {launch: min(c for c in computed if launch in closure(problem.before, c)) for launch in fetches}
    for launch, reader in read_by.items():
        between = [c for c in order[position[launch] : position[reader]] if c in computed]
        assert not between, (problem.nodes[launch], [problem.nodes[c] for c in between])
