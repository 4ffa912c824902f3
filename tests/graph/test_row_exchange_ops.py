"""Rows that go by all-to-all: every rank gets what it asks for, and gradients the other way."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxzero.graph.row_exchange_ops import add_rows, pick_rows, places_received, rows_by_pair, rows_to_send

PARTS, TOKENS, ASSIGNED = 2, 4, 8
EXPERTS = st.lists(st.integers(0, 3), min_size=ASSIGNED, max_size=ASSIGNED)


def sorted_by_expert(experts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of a stable sort, and where each expert's rows end."""
    chosen = torch.tensor(experts)
    return chosen.sort(stable=True)[1], chosen.bincount(minlength=4).cumsum(0).int()


def exchanged(sent: list[torch.Tensor]) -> list[torch.Tensor]:
    """What an all-to-all of equal parts yields."""
    return [torch.cat([each.chunk(PARTS)[rank] for each in sent]) for rank in range(PARTS)]


def spans(ends: torch.Tensor) -> list[slice]:
    """Of each rank, its rows in the order by expert."""
    last = ends.view(PARTS, -1)[:, -1].tolist()
    return [slice(begin, end) for begin, end in zip([0, *last[:-1]], last, strict=True)]


def numbers(wanted: torch.Tensor, ends: torch.Tensor, rows: int, room: int, by_expert: bool, slots: int) -> list:
    """Of each rank, which rows it sends, and where those that come to it lie."""
    return [
        (
            rows_to_send(wanted, ends, PARTS, rank, rows, room, by_expert),
            places_received(wanted, ends, PARTS, rank, rows, room, by_expert, slots),
        )
        for rank in range(PARTS)
    ]


@given(EXPERTS)
def test_tokens_go_to_their_experts_and_gradients_come_back(experts: list[int]) -> None:
    order, ends = sorted_by_expert(experts)
    wanted, whole = order // (ASSIGNED // TOKENS), torch.arange(1.0, 2 * TOKENS + 1).view(TOKENS, 2)
    at = numbers(wanted, ends, TOKENS, ASSIGNED, True, ASSIGNED)
    came = exchanged([pick_rows(part, at[rank][0]) for rank, part in enumerate(whole.chunk(PARTS))])
    gradient = torch.arange(1.0, 2 * ASSIGNED + 1).view(ASSIGNED, 2)
    back = []
    for rank, own in enumerate(spans(ends)):
        rows = pick_rows(came[rank], at[rank][1])
        assert torch.equal(rows[: own.stop - own.start], whole[wanted[own]])
        mine = torch.full((ASSIGNED, 2), torch.nan)
        mine[: own.stop - own.start] = gradient[own]
        back.append(add_rows(mine, at[rank][1], PARTS * ASSIGNED))
    back = exchanged(back)
    found = torch.cat([add_rows(back[rank], at[rank][0], TOKENS // PARTS) for rank in range(PARTS)])
    expected = torch.zeros(TOKENS, 2).index_put_((wanted,), gradient, accumulate=True)
    assert torch.equal(found, expected), "what means nothing, such as NaN, is nowhere"


@given(EXPERTS, st.booleans())
def test_rows_of_experts_go_to_their_tokens_and_gradients_back(experts: list[int], from_the_end: bool) -> None:
    order, ends = sorted_by_expert(experts)
    wanted = order.argsort() - (ASSIGNED if from_the_end else 0)
    whole = torch.arange(1.0, 2 * ASSIGNED + 1).view(ASSIGNED, 2)
    at = numbers(wanted, ends, ASSIGNED, ASSIGNED, False, ASSIGNED // PARTS)
    held = []
    for own in spans(ends):
        held.append(torch.full((ASSIGNED, 2), torch.nan))
        held[-1][: own.stop - own.start] = whole[own]
    came = exchanged([pick_rows(part, at[rank][0]) for rank, part in enumerate(held)])
    found = torch.cat([pick_rows(came[rank], at[rank][1]) for rank in range(PARTS)])
    assert torch.equal(found, whole[wanted])
    sent = [add_rows(part, at[rank][1], PARTS * ASSIGNED) for rank, part in enumerate(whole.chunk(PARTS))]
    back = exchanged(sent)
    for rank, own in enumerate(spans(ends)):
        rows = add_rows(back[rank], at[rank][0], ASSIGNED)
        assert torch.equal(rows[: own.stop - own.start], whole[order[own]])


@given(EXPERTS)
def test_pairs_of_ranks_send_as_many_rows_as_are_counted(experts: list[int]) -> None:
    order, ends = sorted_by_expert(experts)
    tokens, back = order // 2, order.argsort()
    forth, returned = rows_by_pair([tokens, back], [ends, ends], [TOKENS, ASSIGNED], [True, False], PARTS)
    sent = [(numbers(tokens, ends, TOKENS, ASSIGNED, True, 1)[rank][0] >= 0).view(PARTS, -1).sum(1) for rank in (0, 1)]
    assert torch.equal(forth.view(PARTS, PARTS), torch.stack(sent))
    assert torch.equal(returned.view(PARTS, PARTS), torch.stack(sent).t()), "each row comes from where it went"


def test_rows_without_room_are_left_out() -> None:
    order, ends = sorted_by_expert([0, 0, 0, 1, 2, 3, 3, 3])
    wanted = order // 2
    (sends, places), _ = numbers(wanted, ends, TOKENS, 3, True, ASSIGNED)
    assert sends.tolist() == [0, 0, 1, -1, -1, -1] and places.tolist() == [0, 1, 2] + [-1] * 5
    assert pick_rows(torch.tensor([5, 6]), torch.tensor([1, -1, 2, 0])).tolist() == [6, 0, 0, 5]
    assert add_rows(torch.tensor([1, 2, 4, 8]), torch.tensor([1, -1, 2, 1]), 2).tolist() == [0, 9]


def test_rows_of_no_expert_are_nobodys() -> None:
    order, ends = sorted_by_expert([0, 1, 2, 3, 3, 3, 3, 3])
    ends = ends.clamp(max=5)
    back = numbers(order.argsort(), ends, ASSIGNED, ASSIGNED, False, ASSIGNED // PARTS)
    assert (back[1][1] < 0).tolist() == [False, True, True, True]
    counts = rows_by_pair([order // 2, order.argsort()], [ends, ends], [TOKENS, ASSIGNED], [True, False], PARTS)
    assert counts.sum(1).tolist() == [5, 5]


@pytest.mark.parametrize("by_expert", [True, False])
def test_the_form_is_known_without_running(by_expert: bool) -> None:
    order, ends = sorted_by_expert([0, 3, 1, 2, 2, 1, 0, 3])
    for device in ("cpu", "meta"):
        wanted, last, x = order.to(device), ends.to(device), torch.ones(8, 3, device=device)
        at = rows_to_send(wanted, last, PARTS, 0, ASSIGNED, 3, by_expert)
        places = places_received(wanted, last, PARTS, 0, ASSIGNED, 3, by_expert, 5)
        assert (at.shape, places.shape, at.dtype, places.dtype) == ((6,), (5,), torch.int64, torch.int64)
        assert pick_rows(x, at).shape == (6, 3) and add_rows(x[:6], at, 4).shape == (4, 3)
        assert rows_by_pair([wanted], [last], [ASSIGNED], [by_expert], PARTS).shape == (1, 4)
