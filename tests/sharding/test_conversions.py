"""From each placement of a value to each other one, run by all ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import fx

from fxzero import compat
from fxzero.graph import StepGraph
from fxzero.graph import collectives as c10d
from fxzero.graph.axis_placement import REPLICATED, Placement, local_shape, partial, shard
from fxzero.graph.edit import Editor, coordinate
from fxzero.graph.step_graph import Result, StateEntry
from fxzero.sharding.conversions import ALGORITHMS, OF_ROWS, Axis, conversion, convert
from tests.sharding.by_execution import AXIS, compare, parts_of, run_ranks

RANKS = 2  # the process group of a test has so many
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
REDUCED = (partial("sum"), partial("max"), partial("norm2"))


def converted(whole: torch.Tensor, before: Placement, after: Placement) -> str | None:
    """How a value that was converted differs from what it was; None where it does not."""
    step = StepGraph(fx.Graph(), mesh={AXIS: RANKS})
    node = step.graph.placeholder("x")
    node.meta = {"entry": StateEntry("buffer", "x"), "phase": "forward", "module": ""}
    with compat.new_fake_mode():
        node.meta["val"] = torch.empty(local_shape(whole.shape, before, RANKS), dtype=whole.dtype)
    axis = Axis(AXIS, RANKS, coordinate(step, AXIS))
    output = step.graph.output((node,))
    output.meta = {"results": (Result("buffer", "x"),)}
    editor = Editor(step, phase="forward")
    with editor.before(output):
        made = convert(editor, node, tuple(whole.shape), before, after, axis)
    step.set_result("buffer", "x", made)
    for call in filter(c10d.is_collective, step.calls()):
        assert call.meta["val"].dtype is not torch.bool, "not every backend sends truth values"
    assert tuple(made.meta["val"].shape) == local_shape(whole.shape, after, RANKS)
    assert made.meta["val"].dtype == whole.dtype
    parts = parts_of(whole, before, RANKS, torch.Generator().manual_seed(0))
    found = run_ranks(step, [parts], RANKS)["x"]
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


def placements(shape: list[int], dtype: torch.dtype) -> list[Placement]:
    shards = [shard(dim, k) for dim, size in enumerate(shape) for k in (1, 2, 3) if size % (k * RANKS) == 0]
    summed = {torch.bool: (), torch.int64: (partial("sum"), partial("max"))}.get(dtype, REDUCED)
    return [REPLICATED, *shards, *summed]


@st.composite
def values_converted(draw: st.DrawFn) -> tuple[list[int], torch.dtype, Placement, Placement]:
    """A shape, a dtype, and two placements of which the first is converted to the second."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    lies = placements(shape, dtype)
    pairs = [(a, b) for a in lies for b in lies if a != b and conversion(a, b) is not None]
    return shape, dtype, *draw(st.sampled_from(pairs or [(REPLICATED, REPLICATED)]))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(values_converted())
def test_a_converted_value_is_the_same(case: tuple[list[int], torch.dtype, Placement, Placement]) -> None:
    shape, dtype, before, after = case
    assume(before != after)
    signed = "max" not in (before.reduction, after.reduction) and before.reduction != "norm2"
    difference = converted(drawn(shape, dtype, negative=signed), before, after)
    assert difference is None, f"{dtype} {shape} {before} -> {after}: {difference}"


def test_every_kind_of_conversion_is_among_them() -> None:
    lies = [*placements([4, 4], torch.float32), shard(0, 2)]
    found = {conversion(before, after) for before in lies for after in lies if before != after}
    assert found - {None} == set(ALGORITHMS) - set(OF_ROWS.values())  # those are in test_routing.py


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (REPLICATED, partial("norm2")),  # it would lose the sign of what is no norm
        (shard(0), partial("max")),  # zeros are greater than what is negative
        (partial("max"), shard(0)),
        (partial("sum"), partial("max")),
        (shard(0, 2), partial()),
        (shard(0, 2), shard(0)),
    ],
)
def test_what_no_collective_does_is_not_offered(before: Placement, after: Placement) -> None:
    assert conversion(before, after) is None


def test_a_part_in_the_wrong_place_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxzero.sharding import conversions

    monkeypatch.setattr(conversions, "_from_front", lambda editor, value, part, shape, lies, ranks: value)
    whole = drawn([3, 4], torch.float32, negative=True)
    with pytest.raises(AssertionError):
        assert converted(whole, shard(1), REPLICATED) is None
