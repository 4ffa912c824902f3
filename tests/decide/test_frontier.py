"""The answers of a block, against all that there are, on small random graphs."""

import itertools
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fxzero.decide.frontier as module
from fxzero.decide.activations import Option, Problem, Value
from fxzero.decide.frontier import Choice, frontier

Points = list[tuple[int, float]]

ENOUGH = 200  # bounds: all answers of a small problem are found


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to six values in order, each with memory of its own, an earlier one's, or at hand anyway."""
    values: list[Value] = []
    storages: list[tuple[Option, ...]] = []
    for index in range(draw(st.integers(1, 6))):
        sources = tuple(sorted(draw(st.sets(st.integers(0, index - 1), max_size=3)))) if index else ()
        kind = draw(st.sampled_from(["own", "own", "own", "shared", "at hand"]))
        storage = None if kind == "at hand" else len(storages)
        if kind == "shared" and storages:
            storage = draw(st.integers(0, len(storages) - 1))
        elif storage is not None:
            size = draw(st.integers(0, 9))
            options = [Option("keep", size)]
            if draw(st.booleans()):
                options.append(Option("bool", size // 4, float(draw(st.integers(1, 5)))))
            storages.append(tuple(options))
        seconds = draw(st.none() | st.integers(0, 9).map(float))
        values.append(Value(storage, seconds, sources, draw(st.booleans())))
    return Problem(tuple(storages), tuple(values))


def all_answers(problem: Problem) -> Iterator[tuple[int, float]]:
    """(bytes, seconds) of every way to carry storages and to have values again in which nothing is missing."""
    again = [index for index, value in enumerate(problem.values) if value.seconds is not None]
    for kept in itertools.product(*([None, *options] for options in problem.storages)):
        for flags in itertools.product([False, True], repeat=len(again)):
            chosen = {index for index, flag in zip(again, flags, strict=True) if flag}

            def available(index: int, kept: tuple = kept, chosen: set = chosen) -> bool:
                storage = problem.values[index].storage
                return storage is None or kept[storage] is not None or index in chosen

            reads = [index for index, value in enumerate(problem.values) if value.read]
            needs = [*reads, *(source for index in chosen for source in problem.values[index].sources)]
            if all(map(available, needs)):
                options = [option for option in kept if option is not None]
                seconds = sum(o.seconds for o in options) + sum(problem.values[i].seconds or 0.0 for i in chosen)
                yield sum(o.kept_bytes for o in options), seconds


def not_beaten(points: Iterator[tuple[int, float]]) -> Points:
    """The points with falling bytes and rising seconds that no other point beats."""
    best: Points = []
    for size, seconds in sorted(set(points)):
        if not best or seconds < best[-1][1]:
            best.append((size, seconds))
    return best[::-1]


def found(problem: Problem, **options: int) -> Points:
    return [(choice.kept_bytes, choice.seconds) for choice in frontier(problem, **options)]


@settings(max_examples=60, deadline=None)
@given(problems())
def test_it_finds_what_trying_everything_finds(problem: Problem) -> None:
    assert found(problem, num_bounds=ENOUGH) == not_beaten(all_answers(problem))


@settings(max_examples=30, deadline=None)
@given(problems())
def test_with_few_bounds_it_finds_some_of_them(problem: Problem) -> None:
    points = found(problem, num_bounds=2)
    every = not_beaten(all_answers(problem))
    assert set(points) <= set(every) and points[0] == every[0] and points[-1] == every[-1]


# backward reads 1 and 2; 2 follows from 1, 1 from 0, which cannot be had again
CHAIN = Problem(
    ((Option("keep", 1),), (Option("keep", 8),), (Option("keep", 4),)),
    (Value(0, None, (), False), Value(1, 3.0, (0,), True), Value(2, 1.0, (1,), True)),
)


def test_what_follows_from_nothing_kept_is_not_had_again() -> None:
    assert frontier(CHAIN) == (
        Choice(((1, 0), (2, 0)), (), 12, 0.0),
        Choice(((1, 0),), (2,), 8, 1.0),
        Choice(((0, 0), (2, 0)), (1,), 5, 3.0),
        Choice(((0, 0),), (1, 2), 1, 4.0),
    )


def test_a_program_that_forgets_what_values_follow_from_is_found() -> None:
    rows = module._Program._rows

    def forgetful(program: module._Program) -> list:
        return [(row, bound) for row, bound in rows(program) if bound]

    with mock.patch.object(module._Program, "_rows", forgetful), pytest.raises(AssertionError, match="value 0 is"):
        frontier.__wrapped__(CHAIN)


def test_nothing_to_decide() -> None:
    assert frontier(Problem((), ())) == (Choice((), (), 0, 0.0),)
