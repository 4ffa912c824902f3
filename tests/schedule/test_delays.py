"""A reduction that stands later: legal, within the bound on memory, and shorter where it stood in the way."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from unittest import mock

import pytest

from fxzero.schedule.delays import delayed_group, delays
from fxzero.schedule.evaluate import peak_of
from fxzero.schedule.least_memory import least_memory_order
from fxzero.schedule.list_schedule import Policy
from fxzero.schedule.local_search import _Search
from fxzero.schedule.problem import LAUNCH, Problem
from tests.schedule.small import small_problem
from tests.schedule.steps import problem_of, rewritten
from tests.schedule.test_evaluate import PLANS


def reductions(problem: Problem) -> list[int]:
    fetches, _ = problem.fetched
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


def test_delays_that_make_no_difference_are_not_tried_further() -> None:
    """Of several ways out the first and the last come first; those between follow where these two differ."""
    problem = small_problem(random.Random(0))
    for seconds, made in (
        ([2.0] * 4, 2),
        ([math.inf] * 4, 2),
        ([2.0, 3.0, 3.0, 3.0], 4),
        ([3.0, 3.0, 3.0, math.inf], 4),
    ):
        search = _Search(problem, 10**9, list(range(len(problem))))
        orders = [[index] for index in range(4)]
        tried: list[int] = []

        def make(policy: Policy, order: list[int], told: list[float] = seconds, into: list[int] = tried) -> float:
            into.append(order[0])
            return told[order[0]]

        with mock.patch.object(search, "make", make):
            search._make_from(orders, Policy(), 10)
        assert len(tried) == made and tried[:2] == [0, 3]
