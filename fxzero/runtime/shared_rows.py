"""Parameters whose rows, of all ranks of a host, rest side by side in memory that all of them map.

Why a gather needs no copy then, and nobody writes what others read: [Note: rows side by side] in
`graph/shared_rows.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fxzero.errors import PlanError
from fxzero.runtime.pending import Pending
from fxzero.runtime.shared_memory import Channel
from fxzero.runtime.shared_segments import Segment, rounded


@dataclass(frozen=True)
class RowsForm:
    """The rows that each rank has of a parameter.

    Args:
        shape: of one rank's, padding included.
        dtype: of the parameter.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of one rank's rows."""
        return math.prod(self.shape) * self.dtype.itemsize


class SharedRows:
    """The parameters of one step, on the ranks of one group.

    Args:
        segment: the same memory on every rank.
        forms: name -> rows of each rank; equal on all ranks, in the same order.
        me: this rank's index in the group.
        size: ranks of the group.

    Attributes:
        num_bytes: of the rows of all ranks.
    """

    def __init__(self, segment: Segment, forms: Mapping[str, RowsForm], *, me: int, size: int) -> None:
        self._segment = segment  # other ranks may open its file later
        self.own: dict[str, torch.Tensor] = {}
        self.whole: dict[str, torch.Tensor] = {}
        offset = 0
        for name, form in forms.items():
            rows, *columns = form.shape
            self.whole[name] = segment.tensor(offset, (size * rows, *columns), form.dtype)
            self.own[name] = segment.tensor(offset + me * form.num_bytes, form.shape, form.dtype)
            offset += rounded(size * form.num_bytes)
        self.num_bytes = offset

    @classmethod
    def between(cls, group: Any, channel: Channel, forms: Mapping[str, RowsForm]) -> SharedRows:
        """New memory between all ranks of a group, each of which must call this.

        Args:
            group: process group.
            channel: connected, between the same ranks.
            forms: as above; at least one.

        Raises:
            PlanError: on all ranks, if one of them cannot map that much.
        """
        total = sum(rounded(channel.size * form.num_bytes) for form in forms.values())
        segment, reason = _tried(lambda: Segment.new(total)) if channel.me == 0 else (None, "")
        file = torch.tensor([-1 if segment is None else segment.file])
        dist.broadcast(file, group=group, group_src=0)
        if channel.me and file >= 0:
            segment, reason = _tried(lambda: Segment.of_process(channel.process_of(0), int(file)))
        there = torch.tensor([segment is not None], dtype=torch.int32)
        dist.all_reduce(there, dist.ReduceOp.MIN, group=group)
        if segment is None or not there:
            raise PlanError.of(
                where="all_gather='auto': parameters in memory that the ranks of this host share",
                expected=f"{total} bytes of it that every rank can map",
                got=reason or "another rank that cannot",
                fix="raise the host's limits (ulimit -n, memory), or set all_gather='shared_memory'",
            )
        return cls(segment, forms, me=channel.me, size=channel.size)

    def settle(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """This rank's rows in shared memory, with these values; `rows` itself if they are there."""
        own = self.own[name]
        if rows.data_ptr() != own.data_ptr():
            own.copy_(rows)
        return own


def _tried(make: Callable[[], Segment]) -> tuple[Segment | None, str]:
    """A segment, or why there is none."""
    try:
        return make(), ""
    except OSError as error:
        return None, str(error)


@dataclass
class _Gather(Pending):
    """The rows of all ranks, when all have said that theirs are ready."""

    channel: Channel
    number: int
    tag: int
    name: str

    def arrive(self) -> None:
        """As `Pending.arrive`."""
        self.channel.arrive(self.number)

    def finish(self) -> torch.Tensor:
        """As `Pending.finish`."""
        self.arrive()
        channel = self.channel
        for rank in range(channel.size):
            channel.check(rank, self.number, self.tag, 0)
        channel.done(self.number)
        assert channel.rows is not None
        return channel.rows.whole[self.name]


def launch_gather(shard: torch.Tensor, size: int, channel: Channel, tag: int, name: str) -> Pending:
    """Say that this rank's rows of a parameter may be read until it releases the whole.

    Args:
        shard: the rows; where they rest elsewhere, since the user has put them there, they are copied first.
        size: ranks of the group.
        channel: of the group.
        tag: the same on all ranks.
        name: of the parameter.
    """
    assert channel.rows is not None
    channel.rows.settle(name, shard)
    return _Gather(channel, channel.announce(tag), tag, name)
