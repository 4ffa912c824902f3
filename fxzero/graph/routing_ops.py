"""The ops of experts over ranks: which rows of a tensor that is sorted by expert are a rank's, and where they lie.

own_ends(ends, num_parts, index, room) -> ends          where the rows of each of a rank's experts end, counted from
                                                        the first of them, and at most `room`
take_rows(x, ends, dim, num_parts, index, room) -> part the rows of rank `index`'s experts, and what follows them
keep_rows(part, ends, dim, num_parts, index) -> part    zeros behind these rows
put_rows(part, ends, dim, num_parts, index, rows) -> x  zeros, but for these rows, where they stood
rows_by_rank(ends, num_parts) -> rows [len(ends), num_parts]
                                                        of each of some tensors of ends, how many rows each rank has
check_room(rows, places, rooms, numbers, num_parts, axis, names)
                                                        an error where there are more rows at some place, one of a
                                                        rank or of a pair of ranks, than room; `places` says for each
                                                        name how many of `rows` are its; the host waits for them

[Note: rows of experts]
The rows of a tensor are sorted by expert along a dim, and `ends` says behind which row each expert's end. Rank i of n
has the i-th of n equal parts of the experts, and their rows at the front of a buffer with room for a fixed number of
them: sizes are the same on every rank and at each step, and nobody asks the device how many there are. Behind its own
rows a rank holds rows of others (`take_rows` goes on where they end, and over the end to the begin), so an index among
them is one that occurs, or what an op has made of such rows; none of it may reach a sum. Rows that a buffer has no
room for are left out; a step that has less room than all rows need therefore asks `check_room` before its update.
"""

from __future__ import annotations

import itertools
import math

import torch

from fxzero.errors import PlanError

_LIBRARY = torch.library.Library("fxzero", "FRAGMENT")
_LIBRARY.define("own_ends(Tensor ends, int num_parts, SymInt index, int room) -> Tensor")
_LIBRARY.define("take_rows(Tensor x, Tensor ends, int dim, int num_parts, SymInt index, int room) -> Tensor")
_LIBRARY.define("keep_rows(Tensor part, Tensor ends, int dim, int num_parts, SymInt index) -> Tensor")
_LIBRARY.define("put_rows(Tensor part, Tensor ends, int dim, int num_parts, SymInt index, int rows) -> Tensor")
_LIBRARY.define("rows_by_rank(Tensor[] ends, int num_parts) -> Tensor")
_PLACES = "int[] places, int[] rooms, int[] numbers, int num_parts"
_LIBRARY.define(f"check_room(Tensor rows, {_PLACES}, str axis, str[] names) -> ()")


def _span(ends: torch.Tensor, num_parts: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a rank's rows begin and end; 0-dim, so that the host need not wait for them."""
    experts = ends.shape[0] // num_parts
    first = ends[index * experts - 1] if index else ends.new_zeros(())
    return first.long(), ends[(index + 1) * experts - 1].long()


def _along(dim: int, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A mask of rows in a form that fits a tensor that has them along a dim."""
    return mask.view([-1 if at == dim else 1 for at in range(x.dim())])


@torch.library.impl(_LIBRARY, "own_ends", "CompositeExplicitAutograd")
def _own_ends(ends: torch.Tensor, num_parts: int, index: int, room: int) -> torch.Tensor:
    experts = ends.shape[0] // num_parts
    first, _ = _span(ends, num_parts, index)
    own = ends[index * experts : (index + 1) * experts] - first.to(ends.dtype)
    return own.clamp(max=room)


@torch.library.register_fake("fxzero::own_ends", lib=_LIBRARY)
def _own_ends_fake(ends: torch.Tensor, num_parts: int, index: int, room: int) -> torch.Tensor:
    return ends.new_empty((ends.shape[0] // num_parts,))


@torch.library.impl(_LIBRARY, "take_rows", "CompositeExplicitAutograd")
def _take_rows(x: torch.Tensor, ends: torch.Tensor, dim: int, num_parts: int, index: int, room: int) -> torch.Tensor:
    first, _ = _span(ends, num_parts, index)
    at = (torch.arange(room, device=x.device) + first) % x.shape[dim]
    return x.index_select(dim, at)


@torch.library.register_fake("fxzero::take_rows", lib=_LIBRARY)
def _take_rows_fake(
    x: torch.Tensor, ends: torch.Tensor, dim: int, num_parts: int, index: int, room: int
) -> torch.Tensor:
    return x.new_empty(_with(x, dim, room))


@torch.library.impl(_LIBRARY, "keep_rows", "CompositeExplicitAutograd")
def _keep_rows(part: torch.Tensor, ends: torch.Tensor, dim: int, num_parts: int, index: int) -> torch.Tensor:
    first, last = _span(ends, num_parts, index)
    others = torch.arange(part.shape[dim], device=part.device) >= last - first
    return part.clone(memory_format=torch.contiguous_format).masked_fill_(_along(dim, others, part), 0)


@torch.library.register_fake("fxzero::keep_rows", lib=_LIBRARY)
def _keep_rows_fake(part: torch.Tensor, ends: torch.Tensor, dim: int, num_parts: int, index: int) -> torch.Tensor:
    return part.new_empty(part.shape)


@torch.library.impl(_LIBRARY, "put_rows", "CompositeExplicitAutograd")
def _put_rows(part: torch.Tensor, ends: torch.Tensor, dim: int, num_parts: int, index: int, rows: int) -> torch.Tensor:
    first, last = _span(ends, num_parts, index)
    room = part.shape[dim]
    at = torch.arange(rows, device=part.device)
    others = (at < first) | (at >= torch.minimum(last, first + room))
    moved = part.index_select(dim, (at - first).clamp(0, room - 1))
    return moved.masked_fill_(_along(dim, others, moved), 0)  # in place: nothing else as large is there


@torch.library.register_fake("fxzero::put_rows", lib=_LIBRARY)
def _put_rows_fake(
    part: torch.Tensor, ends: torch.Tensor, dim: int, num_parts: int, index: int, rows: int
) -> torch.Tensor:
    return part.new_empty(_with(part, dim, rows))


@torch.library.impl(_LIBRARY, "rows_by_rank", "CompositeExplicitAutograd")
def _rows_by_rank(ends: list[torch.Tensor], num_parts: int) -> torch.Tensor:
    last = torch.stack([each.long().view(num_parts, -1)[:, -1] for each in ends])
    return last.diff(dim=1, prepend=last.new_zeros((len(ends), 1)))


@torch.library.register_fake("fxzero::rows_by_rank", lib=_LIBRARY)
def _rows_by_rank_fake(ends: list[torch.Tensor], num_parts: int) -> torch.Tensor:
    return ends[0].new_empty((len(ends), num_parts), dtype=torch.int64)


@torch.library.impl(_LIBRARY, "check_room", "CompositeExplicitAutograd")
def _check_room(
    rows: torch.Tensor,
    places: list[int],
    rooms: list[int],
    numbers: list[int],
    num_parts: int,
    axis: str,
    names: list[str],
) -> None:
    counts = iter(rows.tolist())
    over = [
        (count * many / number, entry, place, count)
        for entry, (many, room, number) in enumerate(zip(places, rooms, numbers, strict=True))
        for place, count in enumerate(itertools.islice(counts, many))
        if count > room
    ]
    if not over:
        return
    needed, entry, place, count = max(over)
    is_pair, where = places[entry] > num_parts, f"rank {place} of {axis}"
    if is_pair:
        where = f"rank {place // num_parts} to rank {place % num_parts} of {axis}"
    what = "rows that it sends" if is_pair else "rows for its experts"
    raise PlanError.of(
        f"Plan.expert_room, {names[entry]}, {where}",
        expected=f"at most {rooms[entry]} {what}, of {numbers[entry]} rows over {num_parts} ranks",
        got=str(count),
        fix=f"set expert_room to {math.ceil(needed * 100) / 100} or more, or to 'all'; nothing has been updated",
    )


@torch.library.register_fake("fxzero::check_room", lib=_LIBRARY)
def _check_room_fake(
    rows: torch.Tensor,
    places: list[int],
    rooms: list[int],
    numbers: list[int],
    num_parts: int,
    axis: str,
    names: list[str],
) -> None:
    return None


def _with(x: torch.Tensor, dim: int, size: int) -> list[int]:
    return [*x.shape[:dim], size, *x.shape[dim + 1 :]]


own_ends = torch.ops.fxzero.own_ends.default
take_rows = torch.ops.fxzero.take_rows.default
keep_rows = torch.ops.fxzero.keep_rows.default
put_rows = torch.ops.fxzero.put_rows.default
rows_by_rank = torch.ops.fxzero.rows_by_rank.default
check_room = torch.ops.fxzero.check_room.default
OPS = (own_ends, take_rows, keep_rows, put_rows, rows_by_rank, check_room)
