"""What follows the last launch is exposed in every order, and nothing more is claimed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fxzero.schedule.bound import lower_bound
from fxzero.schedule.evaluate import peak_of, times_of
from fxzero.schedule.exposed import exposed_seconds
from fxzero.schedule.problem import Problem
from tests.schedule.chains import backward_chain
from tests.schedule.small import all_orders

REASON = "compute beside net:dp"


def best_times(problem: Problem) -> Iterator[tuple[int, float]]:
    """(bound on memory, the least time of all orders within it), at each bound that makes a difference."""
    tried = [(peak_of(problem, order), times_of(problem, order).seconds) for order in all_orders(problem)]
    for limit in sorted({peak for peak, _ in tried}):
        yield limit, min(seconds for peak, seconds in tried if peak <= limit)


def bound_of(problem: Problem, limit: int | None) -> float:
    return lower_bound(problem, bound_bytes=limit, places=8).by_reason[REASON]


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_a_chain_is_below_the_bound(seed: int) -> None:
    problem = backward_chain(random.Random(seed))
    for limit, seconds in best_times(problem):
        assert bound_of(problem, limit) <= seconds * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_no_order_of_a_longer_chain_is_below_the_bound(seed: int) -> None:
    problem = backward_chain(random.Random(seed), num_products=2, update=False)
    for limit, seconds in best_times(problem):
        assert bound_of(problem, limit) <= seconds * (1 + 1e-9)


def test_a_bound_that_counts_memory_twice_shows() -> None:
    """Were more held than is, less could be put off: the tests above can fail."""
    above = 0
    for seed in range(10):
        problem = backward_chain(random.Random(seed))
        memory = replace(problem.memory, size=[3 * size for size in problem.memory.size])
        twice = replace(problem, memory=memory)
        above += sum(bound_of(twice, limit) > seconds + 1e-9 for limit, seconds in best_times(problem))
    assert above


def test_what_is_put_off_brings_its_own_launch() -> None:
    """Gradients of one second each, a product of four that is sent for two, and five seconds for the last gradient.

    With the product behind it the last launch is covered for 4 - 2 of its seconds: 6 + 3. Where memory lets nothing be
    put off, it is not covered.
    """
    problem = backward_chain(random.Random(0), update=False)
    seconds = [1.0, 4.0, 2.0, 0.0, 1.0, 5.0, 0.0]
    memory = replace(problem.memory, size=[8, 1, 1, 1, 1])
    problem = replace(problem, seconds=seconds, launch_s=[0.0] * 7, slowdown=[1.0, 1.0], memory=memory)
    assert exposed_seconds(problem, 1, num_launches=2) == 5.0 - (4.0 - 2.0)
    tight, best = next(best_times(problem))
    assert exposed_seconds(problem, 1, num_launches=2, bound_bytes=tight) == 3.0  # the product fits behind it
    larger = replace(problem, memory=replace(problem.memory, size=[8, 1, 1, 1, 4]))
    tight, best = next(best_times(larger))
    assert exposed_seconds(larger, 1, num_launches=2, bound_bytes=tight) <= best - 6.0
