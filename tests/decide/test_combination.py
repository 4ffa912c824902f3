"""One answer a block under a bound at every place, against trying all."""

import itertools
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fxzero.decide.combination as module
from fxzero.decide.combination import Alternative, Combination

NOTHING = Alternative(0.0, {})

CHANGES = st.dictionaries(st.integers(0, 9), st.integers(-9, 9).map(float), max_size=3)
ALTERNATIVES = st.builds(
    lambda seconds, change: Alternative(float(seconds), dict(sorted(change.items()))), st.integers(1, 9), CHANGES
)
BLOCKS = st.lists(st.lists(ALTERNATIVES, max_size=3).map(lambda more: [NOTHING, *more]), min_size=1, max_size=3)
ALIVE = st.lists(st.integers(5, 40), min_size=10, max_size=10).map(lambda sizes: np.array(sizes, dtype=float))


def peaks(combination: Combination) -> dict[tuple[int, ...], tuple[float, float]]:
    """Every answer -> (its peak, its seconds)."""
    every = itertools.product(*(range(len(block)) for block in combination.blocks))
    return {
        chosen: (
            float(max(combination.alive_with(chosen))),
            sum(block[number].seconds for block, number in zip(combination.blocks, chosen, strict=True)),
        )
        for chosen in every
    }


@settings(max_examples=60, deadline=None)
@given(ALIVE, BLOCKS, st.integers(1, 40))
def test_it_finds_the_least_time_that_fits(alive: np.ndarray, blocks: list, budget: int) -> None:
    combination = Combination(alive, blocks)
    every = peaks(combination)
    fitting = [seconds for peak, seconds in every.values() if peak <= budget]
    chosen = combination.within(budget)
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert every[tuple(chosen)][0] <= budget * (1 + 1e-6)
        assert every[tuple(chosen)][1] == pytest.approx(min(fitting), rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(ALIVE, BLOCKS)
def test_it_finds_the_lowest_peak(alive: np.ndarray, blocks: list) -> None:
    combination = Combination(alive, blocks)
    every = peaks(combination)
    lowest = min(peak for peak, _ in every.values())
    assert every[tuple(combination.smallest())][0] == pytest.approx(lowest, rel=1e-6)


def test_the_change_of_an_answer_begins_where_it_says() -> None:
    alive = np.array([1.0, 5.0, 3.0, 5.0])
    combination = Combination(alive, [[NOTHING, Alternative(1.0, {1: -2.0, 3: 2.0})]])
    assert combination.alive_with([1]).tolist() == [1.0, 3.0, 1.0, 5.0]


def test_what_does_not_stand_at_the_peak_is_left_alone() -> None:
    alive = np.array([1.0, 9.0, 1.0, 5.0])
    beside, under = Alternative(1e-3, {3: -4.0}), Alternative(1.0, {1: -4.0, 2: 4.0})
    combination = Combination(alive, [[NOTHING, beside], [NOTHING, under]])
    assert combination.within(9.0) == [0, 0]
    assert combination.within(6.0) == [0, 1]
    assert combination.within(4.5) is None


def test_a_search_that_bounds_only_the_first_peak_is_found() -> None:
    """The twin of the comparison above: the second peak is not seen."""
    alive = np.array([9.0, 1.0, 8.0])
    blocks = [[NOTHING, Alternative(1.0, {0: -4.0, 1: 4.0}), Alternative(2.0, {0: -4.0})]]
    assert Combination(alive, blocks).within(6.0) == [2]
    with mock.patch.object(module, "_MAX_ROUNDS", 1):
        assert Combination(alive, blocks).within(6.0) == [1]
