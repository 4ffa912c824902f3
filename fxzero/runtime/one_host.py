"""Channels between ranks that share the memory of one host, where they do; found out through the store.

[Note: who shares memory]
Ranks may stand on one host and yet not see each other's processes: in containers of their own, or under a policy that
forbids to look into a process. So each rank says where it runs, tries to open the memory of the others, and says
whether it could. Only where all could, do all use it.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fxzero import compat_distributed
from fxzero.errors import RankMismatchError
from fxzero.runtime.shared_memory import Card, Channel, is_offered

_meetings = itertools.count()


def channel_key(axis: str) -> str:
    """Under which name a program finds the channel of an axis, among its process groups."""
    return f"{axis} shared memory"


def open_channels(groups: Mapping[str, Any], *, timeout_s: float) -> dict[str, Channel]:
    """A channel for each group of more than one rank; none where not all ranks share memory.

    See [Note: who shares memory].

    Args:
        groups: mesh axis -> process group; all ranks of the world must call this.
        timeout_s: how long it waits for ranks that do not come.

    Raises:
        RankMismatchError: naming a rank that did not come.
    """
    meeting = _Meeting(next(_meetings), timeout_s)
    channels = {axis: _channel(group) for axis, group in groups.items() if group.size() > 1} if is_offered() else {}
    meeting.put("card", {"host": _host(), "cards": {a: channel.card(meeting.rank) for a, channel in channels.items()}})
    there = meeting.collect("card")
    reason = "" if all(card["host"] == there[0]["host"] for card in there) else "another host"
    try:
        for axis, channel in channels.items() if not reason else ():
            channel.connect([Card(*there[rank]["cards"][axis]) for rank in dist.get_process_group_ranks(groups[axis])])
    except OSError as error:
        reason = str(error)
    meeting.put("outcome", reason)
    return {} if any(meeting.collect("outcome")) else channels


def _channel(group: Any) -> Channel:
    return Channel(group.rank(), group.size(), timeout_s=compat_distributed.timeout_of(group).total_seconds())


def _host() -> list[Any]:
    """What is equal for two processes that can find each other by their ids: boot, namespace of processes, user."""
    if not is_offered():
        return []
    return [
        Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        os.stat("/proc/self/ns/pid").st_ino,
        os.getuid(),
    ]


class _Meeting:
    """What ranks tell each other once, through the store."""

    def __init__(self, number: int, timeout_s: float) -> None:
        self.number, self.timeout_s = number, timeout_s
        self.store = compat_distributed.default_store()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def put(self, what: str, value: Any) -> None:
        """Say something of this rank."""
        self.store.set(self._key(what, self.rank), json.dumps(value))

    def collect(self, what: str) -> list[Any]:
        """What all ranks have said, in their order."""
        return [json.loads(self._wait_for(what, rank)) for rank in range(self.world_size)]

    def _wait_for(self, what: str, rank: int) -> bytes:
        key = self._key(what, rank)
        try:
            self.store.wait([key], timedelta(seconds=self.timeout_s))
        except Exception as error:
            raise RankMismatchError.of(
                where=f"rank {rank}",
                expected=f"all ranks to call fxzero.compile within {self.timeout_s:.0f} s",
                got="no word from it",
                fix="let every rank compile the same steps, or raise the plan's timeout_s",
            ) from error
        return bytes(self.store.get(key))

    def _key(self, what: str, rank: int) -> str:
        return f"fxzero/shared_memory/{self.number}/{what}/{rank}"
