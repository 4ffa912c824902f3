"""Numbers of pieces: the fewest seconds of what was looked at, never more than with none, within so many looks."""

import itertools
import random
from collections.abc import Mapping

import pytest

from fxzero.schedule.piece_counts import fewest_seconds

OPTIONS = {"gather": [2, 4, 8], "scatter": [2, 4], "head": [2]}


def apart(saved: Mapping[tuple[str, int], float], looks: list[dict[str, int]]):
    """A step in which each kind saves by itself."""

    def seconds(chosen: Mapping[str, int]) -> float:
        looks.append(dict(chosen))
        return 10.0 - sum(saved[kind, count] for kind, count in chosen.items())

    return seconds


def every() -> list[tuple[str, int]]:
    return [(kind, count) for kind, counts in OPTIONS.items() for count in counts]


@pytest.mark.parametrize("seed", range(8))
def test_where_kinds_save_apart_the_best_of_all_is_found(seed: int) -> None:
    draw = random.Random(seed)
    saved = {pair: draw.uniform(-1, 1) for pair in every()}
    looks: list[dict[str, int]] = []
    found = fewest_seconds(OPTIONS, apart(saved, looks), most=100)
    choices = itertools.product(*([None, *counts] for counts in OPTIONS.values()))
    best = min(
        apart(saved, [])({kind: count for kind, count in zip(OPTIONS, choice, strict=True) if count})
        for choice in choices
    )
    assert found.seconds == pytest.approx(best) and found.whole_s == 10.0
    assert len(looks) == len({frozenset(look.items()) for look in looks})
    assert 1 not in found.chosen.values()


def test_what_saves_nothing_stays_whole() -> None:
    for saved in (-1.0, 0.0, 1e-4):  # of ten seconds, a hundred thousandth is not worth its calls
        found = fewest_seconds(OPTIONS, apart(dict.fromkeys(every(), saved / 3), []), most=100)
        assert found.chosen == {} and found.seconds == found.whole_s


@pytest.mark.parametrize("most", [0, 1, 3, 5])
def test_no_more_steps_are_looked_at_than_may_be(most: int) -> None:
    looks: list[dict[str, int]] = []
    found = fewest_seconds(OPTIONS, apart(dict.fromkeys(every(), 0.5), looks), most=most)
    assert looks[0] == {} and len(looks) == most + 1
    assert (found.seconds < found.whole_s) == (most > 0)
