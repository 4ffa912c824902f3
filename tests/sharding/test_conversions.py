"""From each placement of a value to each other one, run by all ranks."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import fx

from fxzero import compat
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import REPLICATED, Placement, divides, local_shape, partial, shard
from fxzero.graph.edit import Editor, coordinate
from fxzero.graph.step_graph import Result, StateEntry
from fxzero.sharding.conversions import ALGORITHMS, Axis, conversion, convert, copied_bytes, route
from tests.sharding.by_execution import AXIS, compare, parts_of, run_ranks

BLOCKS = (1, 2, 3)
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
REDUCED = (partial("sum"), partial("max"), partial("norm2"))


def one_value(whole: torch.Tensor, lies: Placement, *, ranks: int) -> tuple[StepGraph, fx.Node]:
    """A step that takes a part of a tensor and returns it."""
    step = StepGraph(fx.Graph(), mesh={AXIS: ranks})
    node = step.graph.placeholder("x")
    node.meta = {"entry": StateEntry("buffer", "x"), "phase": "forward", "module": ""}
    with compat.new_fake_mode():
        node.meta["val"] = torch.empty(local_shape(whole.shape, lies, ranks), dtype=whole.dtype)
    output = step.graph.output((node,))
    output.meta = {"results": (Result("buffer", "x"),)}
    return step, node


def converted(whole: torch.Tensor, before: Placement, after: Placement, *, ranks: int = 2) -> str | None:
    """How a value that was converted differs from what it was; None where it does not."""
    step, node = one_value(whole, before, ranks=ranks)
    axis = Axis(AXIS, ranks, coordinate(step, AXIS))
    editor = Editor(step, phase="forward")
    with editor.before(step.output):
        made, lies = node, before
        for step_to in route(tuple(whole.shape), before, after, ranks):
            made, lies = convert(editor, made, tuple(whole.shape), lies, step_to, axis), step_to
    step.set_result("buffer", "x", made)
    for call in filter(c10d.is_collective, step.calls()):
        assert call.meta["val"].dtype is not torch.bool, "not every backend sends truth values"
    assert tuple(made.meta["val"].shape) == local_shape(whole.shape, after, ranks)
    assert made.meta["val"].dtype == whole.dtype
    parts = parts_of(whole, before, ranks, torch.Generator().manual_seed(0))
    found = run_ranks(step, [parts], ranks)["x"]
    tolerance = 1e-5 if whole.dtype is torch.float32 else 2e-2
    return compare(found, whole, after, tolerance=tolerance)


def drawn(shape: list[int], dtype: torch.dtype, *, negative: bool) -> torch.Tensor:
    """A tensor no two of whose elements are equal, where the dtype has so many."""
    count = math.prod(shape)
    numbers = torch.randperm(count, generator=torch.Generator().manual_seed(1)).reshape(shape)
    if dtype is torch.bool:
        return numbers % 3 == 0
    signed = numbers - count // 2 if negative else numbers
    return (signed / 8).to(dtype) if dtype.is_floating_point else signed.to(dtype)


def placements(shape: list[int], dtype: torch.dtype, *, ranks: int = 2) -> list[Placement]:
    blocked = [shard(dim, blocks) for dim in range(len(shape)) for blocks in BLOCKS]
    shards = [placement for placement in blocked if divides(shape, placement, ranks)]
    summed = {torch.bool: (), torch.int64: (partial("sum"), partial("max"))}.get(dtype, REDUCED)
    return [REPLICATED, *shards, *summed]


@st.composite
def values_converted(draw: st.DrawFn, ranks: int) -> tuple[list[int], torch.dtype, Placement, Placement]:
    """A shape, a dtype, and two placements of which the first is converted to the second."""
    shape = draw(st.lists(st.sampled_from([1, 3, ranks, 2 * ranks, 6 * ranks]), min_size=1, max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    lies = placements(shape, dtype, ranks=ranks)
    pairs = [(a, b) for a in lies for b in lies if a != b and route(tuple(shape), a, b, ranks)]
    return shape, dtype, *draw(st.sampled_from(pairs or [(REPLICATED, REPLICATED)]))


@pytest.mark.parametrize("ranks", [2, 4])
@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_converted_value_is_the_same(data: st.DataObject, ranks: int) -> None:
    shape, dtype, before, after = data.draw(values_converted(ranks))
    assume(before != after)
    signed = "max" not in (before.reduction, after.reduction) and before.reduction != "norm2"
    difference = converted(drawn(shape, dtype, negative=signed), before, after, ranks=ranks)
    assert difference is None, f"{dtype} {shape} {before} -> {after}: {difference}"


def test_every_kind_of_conversion_is_among_them() -> None:
    lies = placements([4, 4], torch.float32)
    found = {conversion(before, after) for before in lies for after in lies if before != after}
    assert found - {None} == set(ALGORITHMS) - {"take", "lay"}  # those are in test_routing.py


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (REPLICATED, partial("norm2")),  # it would lose the sign of what is no norm
        (shard(0), partial("max")),  # zeros are greater than what is negative
        (partial("max"), shard(0)),
        (partial("sum"), partial("max")),
        (shard(0, 2), shard(0)),
    ],
)
def test_what_no_collective_does_is_not_offered(before: Placement, after: Placement) -> None:
    assert conversion(before, after) is None


@pytest.mark.parametrize(
    ("shape", "ranks", "way"),
    [
        ((8, 24), 4, [shard(0), shard(1, 3)]),
        ((6, 24), 4, [REPLICATED, shard(1, 3)]),
        ((24, 7), 2, []),
        ((8, 12), 2, [REPLICATED, shard(1, 3)]),  # of two ranks each sends half, either way
    ],
)
def test_blocks_of_a_dim_are_made_by_way_of_another_dim(
    shape: tuple[int, ...], ranks: int, way: list[Placement]
) -> None:
    assert list(route(shape, shard(1), shard(1, 3), ranks)) == way


def test_parts_of_blocks_are_copied_where_those_of_one_are_not() -> None:
    copied = functools.partial(copied_bytes, (24, 5), 4, ranks=2)
    assert [copied(shard(0), REPLICATED), copied(partial(), shard(0))] == [0, 0]
    assert [copied(shard(0, 3), REPLICATED), copied(partial(), shard(0, 3))] == [480, 480]


def test_where_parts_go_by_another_dim_nothing_is_gathered() -> None:
    step, node = one_value(torch.empty(8, 24), shard(1), ranks=4)
    editor = Editor(step, phase="forward")
    with editor.before(step.output):
        made, lies = node, shard(1)
        for after in route((8, 24), shard(1), shard(1, 3), 4):
            made, lies = convert(editor, made, (8, 24), lies, after, Axis(AXIS, 4, coordinate(step, AXIS))), after
    assert [c10d.TABLE[call.target].name for call in filter(c10d.is_collective, step.calls())] == ["all_to_all"] * 2


@pytest.mark.parametrize("name", ["_from_front", "_to_front"])
def test_a_part_in_the_wrong_place_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from fxzero.sharding import conversions

    right = getattr(conversions, name)

    def of_one_block(editor: Editor, value: fx.Node, *args: Any) -> fx.Node:
        return right(editor, value, *(shard(arg.dim) if isinstance(arg, Placement) else arg for arg in args))

    monkeypatch.setattr(conversions, name, of_one_block)
    whole = drawn([3, 12], torch.float32, negative=True)
    before, after = (shard(1, 3), REPLICATED) if name == "_from_front" else (partial(), shard(1, 3))
    assert converted(whole, before, after) is not None
