"""The ops of experts over ranks: which rows of a tensor that is sorted by expert are a rank's, and where they lie.

own_ends(ends, num_parts, index, room) -> ends          where the rows of each of a rank's experts end, counted from
                                                        the first of them, and at most `room`
take_rows(x, ends, dim, num_parts, index, room) -> part the rows of rank `index`'s experts, and what follows them
keep_rows(part, ends, dim, num_parts, index) -> part    zeros behind these rows
put_rows(part, ends, dim, num_parts, index, rows) -> x  zeros, but for these rows, where they stood

[Note: rows of experts]
The rows of a tensor are sorted by expert along a dim, and `ends` says behind which row each expert's end. Rank i of n
has the i-th of n equal parts of the experts, and their rows at the front of a buffer with room for a fixed number of
them: sizes are the same on every rank and at each step, and nobody asks the device how many there are. Behind its own
rows a rank holds rows of others (`take_rows` goes on where they end, and over the end to the begin), so an index among
them is one that occurs, or what an op has made of such rows; none of it may reach a sum. Rows that a buffer has no
room for are left out; that this does not happen is somebody else's to see to.
"""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("fxzero", "FRAGMENT")
_LIBRARY.define("own_ends(Tensor ends, int num_parts, SymInt index, int room) -> Tensor")
_LIBRARY.define("take_rows(Tensor x, Tensor ends, int dim, int num_parts, SymInt index, int room) -> Tensor")
_LIBRARY.define("keep_rows(Tensor part, Tensor ends, int dim, int num_parts, SymInt index) -> Tensor")
_LIBRARY.define("put_rows(Tensor part, Tensor ends, int dim, int num_parts, SymInt index, int rows) -> Tensor")


def _span(ends: torch.Tensor, num_parts: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a rank's rows begin and end; 0-dim, so that the host need not wait for them."""
    experts = ends.shape[0] // num_parts
    first = ends[index * experts - 1] if index else ends.new_zeros(())
    return first.long(), ends[(index + 1) * experts - 1].long()


def _along(dim: int, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A mask of rows in the form that `where` takes beside a tensor that has them along a dim."""
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
    own = torch.arange(part.shape[dim], device=part.device) < last - first
    return torch.where(_along(dim, own, part), part, part.new_zeros(())).contiguous()


@torch.library.register_fake("fxzero::keep_rows", lib=_LIBRARY)
def _keep_rows_fake(part: torch.Tensor, ends: torch.Tensor, dim: int, num_parts: int, index: int) -> torch.Tensor:
    return part.new_empty(part.shape)


@torch.library.impl(_LIBRARY, "put_rows", "CompositeExplicitAutograd")
def _put_rows(part: torch.Tensor, ends: torch.Tensor, dim: int, num_parts: int, index: int, rows: int) -> torch.Tensor:
    first, last = _span(ends, num_parts, index)
    room = part.shape[dim]
    at = torch.arange(rows, device=part.device)
    own = (at >= first) & (at < torch.minimum(last, first + room))
    moved = part.index_select(dim, (at - first).clamp(0, room - 1))
    return torch.where(_along(dim, own, moved), moved, part.new_zeros(())).contiguous()


@torch.library.register_fake("fxzero::put_rows", lib=_LIBRARY)
def _put_rows_fake(
    part: torch.Tensor, ends: torch.Tensor, dim: int, num_parts: int, index: int, rows: int
) -> torch.Tensor:
    return part.new_empty(_with(part, dim, rows))


def _with(x: torch.Tensor, dim: int, size: int) -> list[int]:
    return [*x.shape[:dim], size, *x.shape[dim + 1 :]]


own_ends = torch.ops.fxzero.own_ends.default
take_rows = torch.ops.fxzero.take_rows.default
keep_rows = torch.ops.fxzero.keep_rows.default
put_rows = torch.ops.fxzero.put_rows.default
OPS = (own_ends, take_rows, keep_rows, put_rows)
