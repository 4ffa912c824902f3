"""All-gather and reduce-scatter by point-to-point messages, straight into the buffers that they end in.

gloo's own all-gather copies through flat buffers, and its reduce-scatter sends as much as an all-reduce. Over few
ranks a message to each peer is faster: 8 tensors of 1 MiB on two ranks took 7.2 ms instead of 14.3, at half the
processor time. In the graph the collective stays what it is; `meta["algorithm"]` says that it runs like this.

[Note: launches that fail]
A launch fails where a peer has gone. For a gather that the next program will wait for, that is no error yet: after the
last step there is no next one, and ranks do not leave at the same time. So the wait for it raises what its launch did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fxzero.runtime.pending import Pending, reduced


@dataclass
class Messages(Pending):
    """A collective under way by messages: its parts stay alive, and unchanged, until `finish`.

    Args:
        works: what the backend is doing.
        parts: what must be kept; for a reduce-scatter the rows of each rank, own ones included.
        out: the gathered tensor; None for a reduce-scatter.
        mean: divide the sum by the number of parts.
        own: of a gather, this rank's rows in `out`, which are there from the start.
    """

    works: list[Any]
    parts: list[torch.Tensor]
    out: torch.Tensor | None
    mean: bool = False
    own: torch.Tensor | None = None

    def arrive(self) -> None:
        """As `Pending.arrive`."""
        for work in self.works:
            work.wait()
        self.works = []  # a message can be waited for once

    def finish(self) -> torch.Tensor:
        """As `Pending.finish`; sums in the order of ranks."""
        self.arrive()
        if self.out is not None:
            return self.out
        return reduced(self.parts, mean=self.mean)


def launch_all_gather(shard: torch.Tensor, size: int, group: Any, tag: int) -> Pending:
    """Start gathering equal shards, rows of dim 0, from all ranks of a group.

    Args:
        shard: contiguous, of the same shape everywhere.
        size: ranks of the group.
        group: the process group.
        tag: the same on all ranks, unique among what is under way.
    """
    return _gather(shard, size, group, tag, from_copy=False)


def launch_all_gather_ahead(shard: torch.Tensor, size: int, group: Any, tag: int) -> Pending:
    """The same for a gather that is under way from one program to the next: what is sent is a copy.

    Between two programs `shard` is its owner's, who may write to it at any time. [Note: launches that fail].
    """
    return _gather(shard, size, group, tag, from_copy=True)


def _gather(shard: torch.Tensor, size: int, group: Any, tag: int, *, from_copy: bool) -> Pending:
    rows = shard.shape[0]
    out = shard.new_empty((rows * size, *shard.shape[1:]))
    me = group.rank()
    own = out[me * rows : (me + 1) * rows]
    if from_copy:
        shard = own.copy_(shard)
    works: list[Any] = []
    try:
        for peer in _others(me, size):
            works.append(group.recv([out[peer * rows : (peer + 1) * rows]], peer, tag))
            works.append(group.send([shard], peer, tag))
    except RuntimeError as error:
        if not from_copy:
            raise
        works.insert(0, _Failed(error))
    if not from_copy:
        own.copy_(shard)
    return Messages(works, [shard], out, own=own)


def launch_reduce_scatter(full: torch.Tensor, op: str, size: int, group: Any, tag: int) -> Pending:
    """Start summing (or averaging) rows: rank i ends with rows i of the sum over all ranks.

    Args:
        full: contiguous; dim 0 a multiple of `size`.
        op: "sum" or "avg".
        size, group, tag: as in `launch_all_gather`.
    """
    rows = full.shape[0] // size
    me = group.rank()
    parts = [full[i * rows : (i + 1) * rows] for i in range(size)]
    works = []
    for peer in _others(me, size):
        mine = full.new_empty((rows, *full.shape[1:]))
        works.append(group.recv([mine], peer, tag))
        works.append(group.send([parts[peer]], peer, tag))
        parts.append(mine)
    order = {me: parts[me], **dict(zip(_others(me, size), parts[size:], strict=True))}
    pending = Messages(works, [order[i] for i in range(size)], None, mean=op == "avg")
    pending.works.append(_Keep(full))
    return pending


@dataclass
class _Failed:
    """Stands for messages that could not be sent."""

    error: RuntimeError

    def wait(self) -> None:
        """Raise what their launch has raised."""
        raise self.error


class _Keep:
    """Holds a tensor that is being sent."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def wait(self) -> None:
        """Nothing to wait for."""


def _others(me: int, size: int) -> list[int]:
    """Peers, starting with the next one, so that not all ranks talk to the same one first."""
    return [(me + step) % size for step in range(1, size)]
