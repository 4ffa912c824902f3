"""Places: where the bytes of one tensor rest in a tier. Homes belong to a name for good, slots to one value at a time.

[Note: ordering]
Each place knows its last write and the reads launched since. A read runs after the last write of its place; a write
runs after the last write and all reads since. So a read sees what the last write launched before it wrote, whole, and
never a part of a later one; reads of one place run side by side. It holds because transfers are launched from one
thread, in the order of the program, and because whoever carries them out (threads, or streams of a GPU) starts none
before those that it must follow are done. If the last write has failed, the reads that follow it fail with its error,
until a later write succeeds. A slot keeps this history when it goes from one value to the next; so it may be dropped
as soon as its last read is launched.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from fxzero.errors import OffloadError
from fxzero.runtime.swap.files import BlockFile, padded
from fxzero.runtime.swap.host_memory import HostMemory
from fxzero.runtime.swap.layout import Size, from_bytes, num_bytes

TIERS = ("host", "nvme")


class Pending(Protocol):
    """A transfer under way, as places see it."""

    error: OffloadError | None

    def finished(self) -> bool:
        """Whether nothing of it runs or will run."""


@dataclass(eq=False)
class Place:
    """Room for `capacity` bytes, in host memory or in a file; neither where capacity is 0.

    Args:
        lease: counts the values that a slot has held; what is stored under an earlier one is gone.
    """

    tier: str
    capacity: int
    memory: HostMemory | None = None
    file: BlockFile | None = None
    lease: int = 0
    last_write: Pending | None = None
    reads: list[Pending] = field(default_factory=list)

    def before_read(self) -> list[Pending]:
        """The transfers that a read launched now must follow ([Note: ordering])."""
        return [] if self.last_write is None else [self.last_write]

    def before_write(self) -> list[Pending]:
        """The transfers that a write launched now must follow ([Note: ordering])."""
        return [*self.before_read(), *self.reads]

    def note_read(self, transfer: Pending) -> None:
        """A read has been launched."""
        self.reads = [*(read for read in self.reads if not read.finished()), transfer]

    def note_write(self, transfer: Pending) -> None:
        """A write has been launched."""
        self.last_write, self.reads = transfer, []


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that has been written: what `read` takes.

    Args:
        shape, stride, dtype: of the tensor that comes back; dense strides, the written tensor's own where it was dense.
    """

    name: str
    shape: Size
    stride: Size
    dtype: torch.dtype
    place: Place = field(repr=False)
    lease: int

    @property
    def tier(self) -> str:
        """The tier that it is in, one of TIERS."""
        return self.place.tier

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor; a file is padded beyond that."""
        return num_bytes(self.shape, self.dtype)


@dataclass(frozen=True)
class Home:
    """A place for good, and the CPU tensor over it that users see."""

    stored: Stored
    tensor: torch.Tensor


class Places:
    """Makes homes and slots, and keeps the slots that are free.

    Args:
        directory: where files are made; None where there is no nvme tier.
        io: "direct" or "buffered".
        pin: pin host memory for CUDA.
    """

    def __init__(self, directory: Path | None, *, io: str, pin: bool) -> None:
        self.directory = directory
        self.io = io
        self.pin = pin
        self.homes: dict[str, Home] = {}
        self.held = dict.fromkeys(TIERS, 0)
        self._free: dict[tuple[str, int], list[Place]] = defaultdict(list)
        self._leased: set[Place] = set()
        self._num_files = 0

    def home(self, name: str, shape: Size, stride: Size, dtype: torch.dtype, tier: str) -> Home:
        """The home of that name, made of zeros if there is none yet.

        Raises:
            OffloadError: no room; or there is one of another shape, dtype or tier.
        """
        known = self.homes.get(name)
        if known is not None:
            stored = known.stored
            if (stored.shape, stored.stride, stored.dtype, stored.tier) == (shape, stride, dtype, tier):
                return known
            raise OffloadError.of(
                f"home of tensor {name!r}",
                expected=f"what it was made as, {stored.dtype}{list(stored.shape)} in {stored.tier}",
                got=f"{dtype}{list(shape)} in {tier}, or other strides",
                fix="give it another name",
            )
        nbytes = num_bytes(shape, dtype)
        place = self._make(tier, padded(nbytes), f"home of tensor {name!r}", label=name)
        if place.memory is not None:
            memory = place.memory.bytes
        elif place.file is not None:
            memory = place.file.map(f"home of tensor {name!r}")
        else:
            memory = torch.empty(0, dtype=torch.uint8)
        tensor = from_bytes(memory, shape, stride, dtype)
        home = Home(Stored(name, shape, stride, dtype, place, place.lease), tensor)
        self.homes[name] = home
        return home

    def vacate(self, name: str) -> None:
        """Let go of the home of that name, if there is one; its memory lives as long as a tensor over it."""
        home = self.homes.pop(name, None)
        if home is not None:
            self.held[home.stored.tier] -= home.stored.place.capacity

    def take_slot(self, what: str, nbytes: int, tier: str) -> Place:
        """A slot with room for `nbytes`, one that is free if there is one; `what` is for errors."""
        capacity = slot_bytes(nbytes)
        free = self._free[tier, capacity]
        slot = free.pop() if free else self._make(tier, capacity, what, label="slot")
        self._leased.add(slot)
        return slot

    def make_slots(self, nbytes: Sequence[int], tier: str) -> None:
        """Have free slots for values of these sizes, all at the same time."""
        slots = [self.take_slot(f"{len(nbytes)} slots in {tier}", each, tier) for each in nbytes]
        for slot in slots:
            self.give_back(slot)

    def give_back(self, slot: Place) -> None:
        """What is stored in a slot is gone; it is free for the next value."""
        slot.lease += 1
        self._leased.remove(slot)
        self._free[slot.tier, slot.capacity].append(slot)

    def give_back_all(self) -> None:
        """Free every slot."""
        for slot in list(self._leased):
            self.give_back(slot)

    def forget(self) -> None:
        """Let go of all memory; tensors that users hold keep theirs."""
        self.homes.clear()
        self._free.clear()
        self._leased.clear()
        self.held = dict.fromkeys(TIERS, 0)

    def _make(self, tier: str, capacity: int, what: str, *, label: str) -> Place:
        place = Place(tier, capacity)
        if tier == "nvme" and self.directory is None:
            raise OffloadError.of(
                what,
                expected="a directory for the nvme tier",
                got="none",
                fix="name one on a fast local disk in the plan",
            )
        if capacity and tier == "host":
            place.memory = HostMemory(capacity, pin=self.pin, what=what)
        elif capacity:
            assert self.directory is not None
            name = f"{self._num_files:06d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', label)[:80]}"
            place.file = BlockFile(self.directory / name, capacity, self.io)
            self._num_files += 1
            place.file.create(what)
        self.held[tier] += capacity
        return place


def slot_bytes(nbytes: int) -> int:
    """The capacity of a slot for `nbytes`: up to an eighth more, so that values of many sizes share slots."""
    step = max(1 << max(nbytes.bit_length() - 4, 0), 1)
    return padded(-(-nbytes // step) * step)
