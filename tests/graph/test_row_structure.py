"""Which calls join one kernel over rows, and what each of their values is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxzero.graph.row_structure import RowStructure, Space, joined, positions
from tests.lower.row_regions import Handmade

aten = torch.ops.aten


def structure(build: Callable[[Handmade, Any], Any], *shape: int) -> Any:
    """The structure of the exponential of a tensor and what is built on it, or the call that does not fit."""
    region = Handmade()
    build(region, region.call(aten.exp.default, region.input(torch.empty(shape))))
    return joined(region.calls)


def parts(build: Callable[[Handmade, Any], Any], *shape: int) -> tuple[tuple[int, int], list[str]]:
    fit = structure(build, *shape).best
    return (fit.space.rows, fit.space.columns), list(fit.parts.values())


def total(region: Handmade, x: Any, dims: list[int], keep: bool = True) -> Any:
    return region.call(aten.sum.dim_IntList, x, dims, keep)


def test_pointwise_calls_are_one_long_row() -> None:
    assert parts(lambda r, x: r.call(aten.neg.default, x), 2, 16, 24) == ((1, 768), ["column", "column"])


def test_a_reduction_says_what_a_row_is() -> None:
    found = parts(lambda r, x: r.call(aten.sub.Tensor, x, total(r, x, [2])), 2, 16, 24)
    assert found == ((32, 24), ["full", "row", "full"])
    assert parts(lambda r, x: total(r, x, [1, 2]), 2, 16, 24) == ((2, 384), ["full", "row"])
    assert parts(lambda r, x: total(r, x, [0, 1, 2]), 2, 16, 24) == ((1, 768), ["column", "scalar"])


def test_a_broadcast_input_makes_its_columns_a_row_since_nothing_is_divided_then() -> None:
    found = parts(lambda r, x: r.call(aten.mul.Tensor, x, r.input(torch.empty(24))), 2, 16, 24)
    assert found == ((32, 24), ["full", "full"])


def test_of_a_square_what_a_value_is_follows_from_what_it_is_made_of() -> None:
    def rows(region: Handmade, x: Any) -> None:
        sums = region.call(aten.neg.default, total(region, x, [1], keep=False))
        region.call(aten.mul.Tensor, x, region.call(aten.unsqueeze.default, sums, 1))

    assert parts(rows, 24, 24) == ((24, 24), ["full", "row", "row", "row", "full"])

    def wrong(region: Handmade, x: Any) -> None:
        region.call(aten.mul.Tensor, x, total(region, x, [1], keep=False))  # rows where columns are

    assert structure(wrong, 24, 24).target is aten.mul.Tensor


def test_calls_that_come_before_the_largest_are_seen_again() -> None:
    def build(region: Handmade, x: Any) -> None:
        wide = region.call(aten.add.Tensor, region.input(torch.empty(16, 24)), x)
        total(region, wide, [1])

    assert parts(build, 16, 1) == ((16, 24), ["row", "full", "row"])
    assert parts(build, 24) == ((16, 24), ["column", "full", "row"])
    assert structure(lambda r, x: (total(r, x, [0]), build(r, x)), 24).target is aten.add.Tensor


def test_what_does_not_join_changes_nothing() -> None:
    region = Handmade()
    x = region.call(aten.exp.default, region.input(torch.empty(8, 6)))
    row = total(region, x, [1])
    found = joined(region.calls)
    column = total(region, x, [0])
    before = found.best
    assert not found.take(column)
    assert found.best == before and column not in found.calls
    assert found.take(region.call(aten.sub.Tensor, x, row))


@pytest.mark.parametrize(("keeps", "joining"), [(False, [True, True, True, False]), (True, [True, False, True, True])])
def test_a_pass_keeps_the_last_dimension_a_row(keeps: bool, joining: list[bool]) -> None:
    region = Handmade()
    scores = region.call(aten.exp.default, region.input(torch.empty(4, 7, 7)))
    mask = region.call(aten.logical_not.default, region.input(torch.empty(7, 7, dtype=torch.bool)))
    masked = region.call(aten.masked_fill.Scalar, scores, mask, 0.0)
    soft = region.call(aten._softmax.default, masked, 2, False)
    found = RowStructure(keeps_last=keeps)
    assert [found.take(node) for node in (scores, mask, masked, soft)] == joining


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_positions_find_the_elements_that_broadcasting_does(at: list[int], data: Any) -> None:
    shape = [data.draw(st.sampled_from([1, size])) for size in at]
    order = data.draw(st.permutations(range(len(shape))))
    whole = torch.arange(torch.Size(shape).numel()).reshape([shape[i] for i in order])
    x = whole.permute([order.index(i) for i in range(len(order))])
    assert list(x.shape) == shape
    num = torch.Size(at).numel()
    columns = data.draw(st.sampled_from([c for c in range(1, num + 1) if num % c == 0]))
    space = Space(num // columns, columns)
    found = positions(x.shape, x.stride(), at=at, part=space.whole, space=space)
    assert found is not None
    memory = whole.flatten()
    for place, want in enumerate(x.expand(at).flatten().tolist()):
        row, column = divmod(place, columns)
        indices = ((found.rows, row), (found.columns, column), (found.places, place))
        assert memory[sum(offset(dims, index) for dims, index in indices)] == want


def offset(dims: tuple[tuple[int, int], ...], index: int) -> int:
    out = 0
    for size, stride in reversed(dims):
        index, digit = divmod(index, size)
        out += digit * stride
    return out
