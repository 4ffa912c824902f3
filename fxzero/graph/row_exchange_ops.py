"""The ops of rows that go from the ranks that have them to those that ask for them: all-to-all, in parts of one size.

rows_to_send(wanted, ends, num_parts, index, rows, room, by_expert) -> at [num_parts * room]
                                        which of its own rows a rank sends to each rank, -1 where it sends none
places_received(wanted, ends, num_parts, index, rows, room, by_expert, slots) -> at [slots]
                                        where among what comes to a rank the rows for its own slots lie; -1: nowhere
pick_rows(x, at) -> rows                x's rows of these numbers; zeros where a number is none of x's
add_rows(x, at, rows) -> sums [rows]    zeros, to which each row of x is added at its number, if that is one of them
rows_by_pair(wanted, ends, rows, by_expert, num_parts) -> counts [len(wanted), num_parts * num_parts]
                                        of each of some tensors of row numbers, what rank 0 sends to each, then rank 1

[Note: rows by all-to-all]
`wanted` says for each slot which row goes there, as the index of `x[wanted]` does; it is whole on every rank. One side
lies by expert ([Note: rows of experts] in `routing_ops.py`), the other in equal parts of tokens, or of their
assignments: `by_expert` says that the slots do, else the rows. So every rank knows who sends what to whom, nobody
sends counts, and what comes is put where it belongs. Between any two ranks there is room for a fixed number of rows, in
the order of the slots; what has none is left out, so a step asks `rows_by_pair` before its update.
The way back, for gradients, is the transposed one: what is picked there is added here, with the same numbers.
"""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("fxzero", "FRAGMENT")
_ROWS = "Tensor wanted, Tensor ends, int num_parts, SymInt index, int rows, int room, bool by_expert"
_LIBRARY.define(f"rows_to_send({_ROWS}) -> Tensor")
_LIBRARY.define(f"places_received({_ROWS}, int slots) -> Tensor")
_LIBRARY.define("pick_rows(Tensor x, Tensor at) -> Tensor")
_LIBRARY.define("add_rows(Tensor x, Tensor at, int rows) -> Tensor")
_LIBRARY.define("rows_by_pair(Tensor[] wanted, Tensor[] ends, int[] rows, bool[] by_expert, int num_parts) -> Tensor")


def _bounds(
    wanted: torch.Tensor, ends: torch.Tensor, num_parts: int, rows: int, by_expert: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each rank's slots begin, and its rows; behind the last, where they end."""
    last = ends.long().view(num_parts, -1)[:, -1]
    of_experts = torch.cat([last.new_zeros(1), last])
    others = rows if by_expert else wanted.shape[0]
    equal = torch.arange(num_parts + 1, device=ends.device) * (others // num_parts)
    return (of_experts, equal) if by_expert else (equal, of_experts)


def _whose(numbers: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """The rank of each number; as many as there are ranks where it is nobody's."""
    return torch.searchsorted(bounds[1:], numbers, right=True)


@torch.library.impl(_LIBRARY, "rows_to_send", "CompositeExplicitAutograd")
def _rows_to_send(
    wanted: torch.Tensor, ends: torch.Tensor, num_parts: int, index: int, rows: int, room: int, by_expert: bool
) -> torch.Tensor:
    slots, own = _bounds(wanted, ends, num_parts, rows, by_expert)
    numbers = wanted % rows  # -1 is the last
    asker = _whose(torch.arange(wanted.shape[0], device=wanted.device), slots)
    is_mine = (_whose(numbers, own) == index) & (asker < num_parts)
    asker = asker.clamp(max=num_parts - 1)
    before = torch.nn.functional.pad(is_mine.cumsum(0), (1, 0))
    place = before[:-1] - before[slots[:-1]][asker]
    nowhere = num_parts * room
    place = torch.where(is_mine & (place < room), asker * room + place, nowhere)
    at = wanted.new_full((nowhere + 1,), -1)
    return at.scatter_(0, place, numbers - own[index])[:-1]


@torch.library.register_fake("fxzero::rows_to_send", lib=_LIBRARY)
def _rows_to_send_fake(
    wanted: torch.Tensor, ends: torch.Tensor, num_parts: int, index: int, rows: int, room: int, by_expert: bool
) -> torch.Tensor:
    return wanted.new_empty((num_parts * room,))


@torch.library.impl(_LIBRARY, "places_received", "CompositeExplicitAutograd")
def _places_received(
    wanted: torch.Tensor,
    ends: torch.Tensor,
    num_parts: int,
    index: int,
    rows: int,
    room: int,
    by_expert: bool,
    slots: int,
) -> torch.Tensor:
    asked, own = _bounds(wanted, ends, num_parts, rows, by_expert)
    slot = asked[index] + torch.arange(slots, device=wanted.device)
    sender = _whose(wanted[slot.clamp(max=wanted.shape[0] - 1)] % rows, own)
    sender = torch.where(slot < asked[index + 1], sender, num_parts)
    by_rank = sender.unsqueeze(1) == torch.arange(num_parts + 1, device=wanted.device)
    place = by_rank.cumsum(0).gather(1, sender.unsqueeze(1)).squeeze(1) - 1
    return torch.where((sender < num_parts) & (place < room), sender * room + place, -1)


@torch.library.register_fake("fxzero::places_received", lib=_LIBRARY)
def _places_received_fake(
    wanted: torch.Tensor,
    ends: torch.Tensor,
    num_parts: int,
    index: int,
    rows: int,
    room: int,
    by_expert: bool,
    slots: int,
) -> torch.Tensor:
    return wanted.new_empty((slots,))


def _is_row(at: torch.Tensor, rows: int) -> torch.Tensor:
    return (at >= 0) & (at < rows)


@torch.library.impl(_LIBRARY, "pick_rows", "CompositeExplicitAutograd")
def _pick_rows(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    others = ~_is_row(at, x.shape[0])
    picked = x.index_select(0, at.clamp(0, x.shape[0] - 1))
    return picked.masked_fill_(others.view(-1, *[1] * (x.dim() - 1)), 0)


@torch.library.register_fake("fxzero::pick_rows", lib=_LIBRARY)
def _pick_rows_fake(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return x.new_empty((at.shape[0], *x.shape[1:]))


@torch.library.impl(_LIBRARY, "add_rows", "CompositeExplicitAutograd")
def _add_rows(x: torch.Tensor, at: torch.Tensor, rows: int) -> torch.Tensor:
    sums = x.new_zeros((rows + 1, *x.shape[1:]))
    return sums.index_put_((torch.where(_is_row(at, rows), at, rows),), x, accumulate=True)[:-1]


@torch.library.register_fake("fxzero::add_rows", lib=_LIBRARY)
def _add_rows_fake(x: torch.Tensor, at: torch.Tensor, rows: int) -> torch.Tensor:
    return x.new_empty((rows, *x.shape[1:]))


@torch.library.impl(_LIBRARY, "rows_by_pair", "CompositeExplicitAutograd")
def _rows_by_pair(
    wanted: list[torch.Tensor], ends: list[torch.Tensor], rows: list[int], by_expert: list[bool], num_parts: int
) -> torch.Tensor:
    found = []
    for each, last, number, slots_lie in zip(wanted, ends, rows, by_expert, strict=True):
        asked, own = _bounds(each, last, num_parts, number, slots_lie)
        asker = _whose(torch.arange(each.shape[0], device=each.device), asked)
        sender = _whose(each % number, own)
        pair = sender * (num_parts + 1) + asker  # what is nobody's has a pair of its own
        counts = pair.new_zeros((num_parts + 1) ** 2).scatter_add_(0, pair, torch.ones_like(pair))
        found.append(counts.view(num_parts + 1, -1)[:-1, :-1].reshape(-1))
    return torch.stack(found)


@torch.library.register_fake("fxzero::rows_by_pair", lib=_LIBRARY)
def _rows_by_pair_fake(
    wanted: list[torch.Tensor], ends: list[torch.Tensor], rows: list[int], by_expert: list[bool], num_parts: int
) -> torch.Tensor:
    return wanted[0].new_empty((len(wanted), num_parts * num_parts))


rows_to_send = torch.ops.fxzero.rows_to_send.default
places_received = torch.ops.fxzero.places_received.default
pick_rows = torch.ops.fxzero.pick_rows.default
add_rows = torch.ops.fxzero.add_rows.default
rows_by_pair = torch.ops.fxzero.rows_by_pair.default
OPS = (rows_to_send, places_received, pick_rows, add_rows, rows_by_pair)
