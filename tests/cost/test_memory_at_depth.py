"""Lines through shallow models, and the course of a deep one that follows: on courses made by hand, with faults."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fxzero.cost.course_at_depth import course_at
from fxzero.cost.memory_at_depth import DepthLines
from fxzero.cost.memory_course import Course, Place


def course(
    depth: int, *, at_middle: int = 0, bend: int = 0, curve: int = 0, out_of_order: int | None = None, step: int = 1
) -> Course:
    """A forward up through the blocks and a backward down, where each block's gather is launched one block ahead.

    Args:
        depth: number of blocks.
        at_middle: bytes more in the middle block.
        bend: bytes more in the head, times the square of the depth.
        curve: bytes more in each block, times the square of its number.
        out_of_order: a block whose two places in backward are exchanged.
        step: blocks that the list has for each of depth.
    """
    blocks = depth * step
    seen = [("forward", "embed", "mm", 100)]
    for i in range(blocks):
        size = 110 + 10 * i + curve * i**2 + at_middle * (i == depth // 2)
        seen.append(("forward", f"blocks.{i}.lin", "mm", size))
    seen.append(("forward", "head", "mm", 50 + 20 * depth + bend * depth**2))
    for i in reversed(range(-1, blocks)):
        pair = [("backward", f"blocks.{i}.lin", "mm", 80 + 15 * i)] if i >= 0 else []
        if 1 <= i < blocks:
            pair.insert(0, ("backward", f"blocks.{i - 1}.lin", "all_gather", 90 + 15 * i))
        seen += pair[::-1] if i == out_of_order else pair
    seen.insert(blocks + 2, ("backward", f"blocks.{blocks - 1}.lin", "all_gather", 7))
    places = tuple(Place(0, phase, path, op, 0) for phase, path, op, _ in seen)
    lines = {"a": np.array([size for *_, size in seen]), "b": np.arange(len(seen)) * 0 + 3}
    return Course(10 + depth, places, lines, {"host": 5 * depth}, {("host", "in"): 7 * depth})


def lines_through(*, edge: int = 2, **faults: Any) -> DepthLines:
    return DepthLines({depth: course(depth, **faults) for depth in (2 * edge, 2 * edge + 1, 2 * edge + 2)}, edge=edge)


@pytest.mark.parametrize("edge", [2, 3])
@pytest.mark.parametrize("depth", [8, 9, 80])
def test_the_course_of_a_deep_model_is_drawn_to_the_byte(depth: int, edge: int) -> None:
    lines, direct = lines_through(edge=edge), course(depth)
    drawn = course_at(lines, depth)
    assert drawn.places == direct.places
    assert all((drawn.by_kind[kind] == line).all() for kind, line in direct.by_kind.items())
    assert (drawn.elsewhere, drawn.swapped, drawn.state_bytes) == (direct.elsewhere, direct.swapped, 10 + depth)
    found = lines.at(depth)
    assert (found.peak_bytes, found.kinds) == (direct.totals.max(), direct.peak_kinds)
    assert (found.elsewhere, found.swapped) == (direct.elsewhere, direct.swapped)


def test_the_peak_of_a_deep_model_may_stand_elsewhere_than_in_shallow_ones() -> None:
    lines = lines_through()
    assert "blocks.last-0.lin" in lines.at(4).place
    assert lines.at(80).peak_bytes == 1653 and lines.at(80).state_bytes == 90
    assert "head" in lines.at(80).place and lines.at(80).kinds == {"a": 1650, "b": 3}


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"bend": 1}, "memory is not linear at mm .forward of head"),
        ({"curve": 1}, "not linear at mm .forward of blocks"),
        ({"at_middle": 1000}, "not linear at mm .forward of blocks"),
        ({"step": 2}, "does not grow by one block each"),
    ],
)
def test_memory_off_the_lines_is_found(faults: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lines_through(**faults)


def test_depth_that_no_list_follows_is_found() -> None:
    with pytest.raises(ValueError, match="no list of modules grows"):
        DepthLines({depth: course(4) for depth in (4, 5, 6)}, edge=2)


def test_what_is_elsewhere_must_be_linear_too() -> None:
    courses = {depth: course(depth) for depth in (4, 5, 6)}
    third = courses[6]
    courses[6] = Course(third.state_bytes, third.places, third.by_kind, {"host": 31}, third.swapped)
    with pytest.raises(ValueError, match="what is off the device is not linear"):
        DepthLines(courses, edge=2)


def test_a_program_that_does_not_repeat_is_not_drawn() -> None:
    courses = {depth: course(depth, out_of_order=3 if depth == 6 else None) for depth in (4, 5, 6)}
    lines = DepthLines(courses, edge=2)
    with pytest.raises(ValueError, match="do not repeat from block to block"):
        course_at(lines, 80)
