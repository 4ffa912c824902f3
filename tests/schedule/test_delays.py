"""A reduction that stands later: legal, within the bound on memory, and shorter where it stood in the way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fxzero.schedule.delays import delayed_group, delays
from fxzero.schedule.evaluate import peak_of
from fxzero.schedule.least_memory import least_memory_order
from fxzero.schedule.list_schedule import fetches_of
from fxzero.schedule.problem import LAUNCH, Problem
from tests.schedule.steps import problem_of, rewritten
from tests.schedule.test_evaluate import PLANS


def reductions(problem: Problem) -> list[int]:
    fetches, _ = fetches_of(problem)
    return [call for call in range(len(problem)) if problem.kind[call] == LAUNCH and call not in fetches]


@pytest.mark.parametrize("name", PLANS)
def test_delays_are_legal_and_keep_the_bound(name: str) -> None:
    problem = problem_of(rewritten(**PLANS[name]))
    least = least_memory_order(problem)
    limit = int(1.1 * peak_of(problem, least))
    found = 0
    for launch in reductions(problem):
        for with_work in (True, False):
            group = delayed_group(problem, launch, with_work=with_work)
            for order in delays(problem, least, group, launch=launch, bound_bytes=limit):
                found += 1
                assert problem.is_legal(order)
                assert peak_of(problem, order) <= limit
    assert found


def test_a_bound_that_delays_do_not_keep_shows() -> None:
    """Were memory not counted, some delays would take more than the bound: the test above can fail."""
    problem = problem_of(rewritten(zero=3, depth=6))
    least = least_memory_order(problem)
    limit = peak_of(problem, least)
    free = replace(problem, memory=replace(problem.memory, size=[0] * len(problem.memory.size)))
    peaks = []
    for launch in reductions(problem):
        group = delayed_group(problem, launch, with_work=True)
        orders = delays(free, least, group, launch=launch, bound_bytes=limit)
        peaks += [peak_of(problem, order) for order in orders]
    assert max(peaks) > limit


def test_a_group_is_what_only_leads_to_a_launch_and_what_follows() -> None:
    problem = problem_of(rewritten(zero=3))
    launch = reductions(problem)[0]
    behind, whole = (delayed_group(problem, launch, with_work=with_work) for with_work in (False, True))
    assert behind < whole
    for call in whole:
        assert call in behind or set(problem.after[call]) <= whole
        assert set(problem.after[call]) <= whole
