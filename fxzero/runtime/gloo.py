"""What torch's gloo backend needs special care with.

[Note: gathers over gloo]
`_c10d_functional.all_gather_into_tensor`, and its coalesced form, corrupt the heap when a few of them are under way
(torch 2.13): twenty gathers of 34 numbers a round on two ranks end within a minute, mostly in seconds, with "malloc():
unaligned tcache chunk detected" or a segmentation fault, in a script of torch alone. Both go through
`allgather_into_tensor_coalesced` of the backend. `all_gather_into_tensor_out`, which goes through `_allgather_base`,
ran for as long without, and moves the same bytes; so programs launch that one, tensor by tensor.

[Note: leaving while gloo works]
A worker thread of gloo lets go of the tensors of its last collective after the wait for it has returned. Where Python
holds them too, it takes the GIL for that; a thread that asks for the GIL while the interpreter shuts down is ended in
the middle of a destructor: "terminate called without an active exception" and exit code -6 of a run that did all its
work (pytorch/pytorch#190489, open). So the process rests for a moment at exit, when threads may still have the GIL.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fxzero.graph import collectives as c10d

LAST_RELEASE_S = 0.1  # for worker threads to be woken, on a busy machine


def carries(group: Any, device: str) -> bool:
    """Whether gloo carries the collectives of a process group for tensors of a type of device."""
    return backend_of(group, device) == "gloo"


def backend_of(group: Any, device: str) -> str:
    """The backend of a process group for a type of device: a group may have one for each, "cpu:gloo,cuda:nccl"."""
    parts = (part.split(":") for part in str(dist.get_backend_config(group)).split(","))
    named = {part[0]: part[1] for part in parts if len(part) == 2}
    return named.get(device) or str(dist.get_backend(group))


def launcher_of(target: Any) -> Callable[..., Any]:
    """What launches a collective over gloo, with the op's own arguments ([Note: gathers over gloo])."""
    return _LAUNCHES.get(target, target)


def rest_at_exit() -> None:
    """Rest for a moment when the process ends, once ([Note: leaving while gloo works])."""
    atexit.unregister(_rest)
    atexit.register(_rest)


def _rest() -> None:
    time.sleep(LAST_RELEASE_S)


def _all_gather(shard: torch.Tensor, size: int, group_name: str) -> torch.Tensor:
    out = shard.new_empty((shard.shape[0] * size, *shard.shape[1:]))
    return c10d.all_gather_into(shard, size, group_name, out=out)  # type: ignore[no-any-return]


def _all_gather_coalesced(shards: list[torch.Tensor], size: int, group_name: str) -> list[torch.Tensor]:
    return [_all_gather(shard, size, group_name) for shard in shards]


_LAUNCHES = {c10d.all_gather: _all_gather, c10d.all_gather_coalesced: _all_gather_coalesced}
