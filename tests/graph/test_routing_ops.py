"""The rows of experts: taken, kept and put back, each rank those of its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxzero.graph.routing_ops import keep_rows, own_ends, put_rows, take_rows

PARTS = 2
COUNTS = st.lists(st.integers(0, 4), min_size=4, max_size=4).filter(any)


def ends_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).int()


@given(COUNTS, st.integers(0, 1), st.integers(0, 3))
def test_what_all_ranks_put_is_what_they_took(counts: list[int], dim: int, behind: int) -> None:
    ends, rows = ends_of(counts), sum(counts) + behind
    whole = torch.arange(1.0, 3 * rows + 1).view(rows, 3)
    x = whole if dim == 0 else whole.t().contiguous()
    put = []
    for index in range(PARTS):
        part = take_rows(x, ends, dim, PARTS, index, rows)
        own = own_ends(ends, PARTS, index, rows)
        first = int(ends[index * 2 - 1]) if index else 0
        mine = part.narrow(dim, 0, int(own[-1]))
        assert torch.equal(mine, x.narrow(dim, first, int(own[-1])))
        assert own.tolist() == [int(end) - first for end in ends[2 * index : 2 * index + 2]]
        part.narrow(dim, int(own[-1]), rows - int(own[-1])).fill_(torch.nan)
        kept = keep_rows(part, ends, dim, PARTS, index)
        assert torch.equal(kept.narrow(dim, 0, int(own[-1])), mine)
        assert not kept.narrow(dim, int(own[-1]), rows - int(own[-1])).any()
        put.append(put_rows(part, ends, dim, PARTS, index, rows))
    expected = x.clone()
    expected.narrow(dim, sum(counts), behind).zero_()
    assert torch.equal(sum(put), expected), "what means nothing, such as NaN, is nowhere"


@pytest.mark.parametrize("index", [0, 1])
def test_rows_without_room_are_left_out(index: int) -> None:
    ends, x = ends_of([3, 1, 1, 3]), torch.arange(1, 9)
    part = take_rows(x, ends, 0, PARTS, index, 2)
    assert part.tolist() == [1 + 4 * index, 2 + 4 * index]
    assert own_ends(ends, PARTS, index, 2).tolist() == ([2, 2] if index == 0 else [1, 2])
    put = put_rows(part, ends, 0, PARTS, index, 8)
    assert put.tolist() == [0] * 4 * index + part.tolist() + [0] * (6 - 4 * index)
    assert keep_rows(part, ends, 0, PARTS, index).tolist() == part.tolist()


def test_behind_the_own_rows_stand_rows_that_there_are() -> None:
    assert take_rows(torch.tensor([5, 6, 7, 8]), ends_of([1, 1, 1, 1]), 0, PARTS, 1, 4).tolist() == [7, 8, 5, 6]


@pytest.mark.parametrize("call", [take_rows, put_rows])
def test_the_form_is_known_without_running(call: object) -> None:
    ends, x = ends_of([1, 2, 3, 2]), torch.ones(8, 3)
    found = call(x.to("meta"), ends.to("meta"), 0, PARTS, 1, 5)  # type: ignore[operator]
    assert found.shape == call(x, ends, 0, PARTS, 1, 5).shape  # type: ignore[operator]
