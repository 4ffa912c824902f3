"""No order gets below the bound, and the bound is what it should be where that is known."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from fxzero.schedule.bound import LowerBound, lower_bound, preemptive_makespan, reach_of
from fxzero.schedule.evaluate import peak_of, times_of
from fxzero.schedule.exposed import exposed_seconds
from fxzero.schedule.least_memory import least_memory_order
from fxzero.schedule.list_schedule import Policy, list_schedule, ways_to_end
from fxzero.schedule.problem import LAUNCH, RUN, WAIT, Problem
from tests.schedule.orders import random_order
from tests.schedule.small import all_orders, small_problem
from tests.schedule.steps import problem_of, rewritten
from tests.schedule.test_evaluate import PLANS


def bounds(problem: Problem, bytes_: int) -> LowerBound:
    return lower_bound(problem, bound_bytes=bytes_, places=8)


@pytest.mark.parametrize("hardware", ["h100", "h100_ethernet", "cpu"])
@pytest.mark.parametrize("name", PLANS)
def test_no_order_is_below_the_bound(name: str, hardware: str) -> None:
    problem = problem_of(rewritten(**PLANS[name]), hardware)
    least = least_memory_order(problem)
    ways = ways_to_end(problem)
    rng = random.Random(0)
    scheduled = [
        list_schedule(problem, Policy(), way_out=least, bound_bytes=int(part * peak_of(problem, least)), ways=ways)
        for part in (1.0, 1.2, 2.0)
    ]
    for order in (least, range(len(problem)), *scheduled, *(random_order(problem, rng) for _ in range(5))):
        found = bounds(problem, peak_of(problem, order))
        assert found.seconds <= times_of(problem, order).seconds * (1 + 1e-9)
        assert found.seconds == found.by_reason[found.binds]


@pytest.mark.parametrize("seed", range(40))
def test_the_best_of_all_orders_is_not_below_the_bound(seed: int) -> None:
    """Small problems of which every order is tried, at bounds from the smallest peak on."""
    rng = random.Random(seed)
    problem = small_problem(rng, num_launches=rng.choice((2, 3)), num_runs=3)
    tried = [(peak_of(problem, order), times_of(problem, order).seconds) for order in all_orders(problem)]
    for limit in sorted({peak for peak, _ in tried}):
        best = min(seconds for peak, seconds in tried if peak <= limit)
        assert bounds(problem, limit).seconds <= best * (1 + 1e-9)


def test_what_cannot_be_hidden_makes_the_bound_higher() -> None:
    """Compute, a launch that reads it, compute behind its wait; a planted second reading of the same seconds shows."""
    problem = one_after_the_other()
    assert lower_bound(problem, places=1).by_reason["compute beside net:dp"] == 2.0 + 5.0
    assert exposed_seconds(problem, 1, num_launches=1) == 5.0
    best = min(times_of(problem, order).seconds for order in all_orders(problem))
    assert best == 7.0 < 2.0 + 2 * exposed_seconds(problem, 1, num_launches=1)


def test_what_runs_beside_a_lane_covers_more_of_it() -> None:
    """Four seconds of a launch, two of an update beside it, which take three: counted as two, the bound is too high."""
    problem = one_after_the_other()
    problem.nodes[3].meta["phase"] = "update"
    reads: list[list[int]] = [[], [0], [1], [0]]
    problem = replace(problem, reads=reads, before=reads, seconds=[1.0, 4.0, 0.0, 2.0], slowdown=[1.0, 1.5])
    best = min(times_of(problem, order).seconds for order in all_orders(problem))
    assert lower_bound(problem, places=1).seconds == pytest.approx(best) == 5.0
    assert exposed_seconds(problem, 1, num_launches=1) == 4.0 - 1.5 * 2.0
    assert exposed_seconds(replace(problem, slowdown=[1.0, 1.0]), 1, num_launches=1) == 4.0 - 2.0


def test_compute_is_slower_beside_a_lane() -> None:
    """Ten seconds of compute beside five of a lane that makes it slower by half: 10 + 5 / 3."""
    problem = one_after_the_other()
    beside = replace(problem, reads=[[], [], [1], []], before=[[], [], [1], []], slowdown=[1.0, 1.5])
    beside = replace(beside, seconds=[9.0, 5.0, 0.0, 1.0])
    best = min(times_of(beside, order).seconds for order in all_orders(beside))
    assert lower_bound(beside).seconds == pytest.approx(10 + 5 / 3) == pytest.approx(best)


def one_after_the_other() -> Problem:
    problem = small_problem(random.Random(0), num_launches=1, num_runs=2)
    for node in problem.nodes:
        node.meta["phase"] = "backward"
    reads: list[list[int]] = [[], [0], [1], [2]]
    return replace(
        problem,
        kind=[RUN, LAUNCH, WAIT, RUN],
        lane=[0, 1, -1, 0],
        seconds=[1.0, 5.0, 0.0, 1.0],
        launch_s=[0.0] * 4,
        launch_of=[-1, -1, 1, -1],
        slowdown=[1.0, 1.0],
        reads=reads,
        before=reads,
    )


def test_a_bound_that_is_too_high_shows() -> None:
    problem = problem_of(rewritten(zero=3))
    longer = replace(problem, seconds=[1.5 * s for s in problem.seconds])
    order = list_schedule(
        problem, Policy(), way_out=least_memory_order(problem), bound_bytes=10**9, ways=ways_to_end(problem)
    )
    assert lower_bound(longer).seconds > times_of(problem, order).seconds


def test_heads_through_lanes_are_later_than_chains() -> None:
    problem = problem_of(rewritten(zero=3, depth=6), "h100_ethernet")
    assert lower_bound(problem, places=8).seconds >= lower_bound(problem).seconds
    before = reach_of(problem).before
    call = max(range(len(problem)), key=before.__getitem__)
    floor = before[call] + 1.0
    assert reach_of(problem, floor={call: floor}).before[call] == floor


def test_less_memory_makes_the_bound_higher() -> None:
    """Slow links, and room for one bucket at a time: what cannot be fetched ahead shows."""
    problem = problem_of(rewritten(zero=3, depth=8), "h100_ethernet")
    smallest = peak_of(problem, least_memory_order(problem))
    tight, ample = (bounds(problem, limit).by_reason["memory"] for limit in (smallest, 10 * smallest))
    assert tight > ample


@pytest.mark.parametrize(
    ("jobs", "seconds"),
    [
        ([], 0.0),
        ([(1.0, 2.0, 3.0)], 6.0),
        ([(0.0, 2.0, 5.0), (0.0, 3.0, 0.0)], 7.0),  # the one with the longer tail first
        ([(0.0, 4.0, 0.0), (1.0, 1.0, 5.0)], 7.0),  # which interrupts the other
        ([(0.0, 1.0, 0.0), (5.0, 1.0, 0.0)], 6.0),  # the lane stands still until the second is there
    ],
)
def test_jackson(jobs: list[tuple[float, float, float]], seconds: float) -> None:
    assert preemptive_makespan(jobs) == seconds
