"""All-gather and reduce-scatter between ranks of one host, through memory that all of them map.

[Note: messages in shared memory]
A rank copies what it sends into a segment of its own and says so; at the wait every rank copies, or sums, straight from
the segments of all. Nothing goes through a socket, no thread works beside the program, a launch never waits, and what
was sent may be written or freed as soon as the launch has returned. Results are those of point-to-point messages
(`send_recv.py`), bit for bit: sums are in the order of ranks.

Each rank has a head, which it alone writes and all read: how many messages it has sent; for each of the last SLOTS ones
its tag and where it lies; which segments it has; and which messages of each rank it has read. Messages are counted in
the order of their launches, which is the same on all ranks, as programs are ([Note: what must agree]); the tag is
compared, so that ranks that are at different calls find out. Memory of a message is free when all have read it; where
none is free a further segment is made, so that no rank ever waits to send.

[Note: order of writes]
A message is written before the count that announces it. Processors of the x86 family show writes of one core to others
in that order; others need a barrier that Python does not have. So this is offered on x86-64 alone.
"""

from __future__ import annotations

import os
import platform
import select
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from fxzero.runtime.pending import Pending, reduced
from fxzero.runtime.shared_segments import Room, Segment

if TYPE_CHECKING:
    from fxzero.runtime.shared_rows import SharedRows

SLOTS = 1024  # messages of a rank that may be under way
_MOST_SEGMENTS = 63
_COUNT, _FILES, _MESSAGES = 0, 1, 1 + _MOST_SEGMENTS  # words of a head
_TAG, _SEGMENT, _OFFSET, _BYTES = range(4)  # words of a message
_READ = _MESSAGES + 4 * SLOTS
_LOOKS = 200  # at a count before the thread sleeps
_PAUSE_S = 2e-5
_CHECK_S = 0.05  # between looks whether a rank that is waited for lives


def is_offered() -> bool:
    """Whether this machine can do it at all ([Note: order of writes])."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and hasattr(os, "pidfd_open")


class Card(NamedTuple):
    """Where a rank's head is.

    Args:
        rank: global.
        process: its id.
        file: the head's descriptor there.
    """

    rank: int
    process: int
    file: int


class _Sent(NamedTuple):
    """A message of this rank that not all have read."""

    number: int
    segment: int
    offset: int
    num_bytes: int


class Channel:
    """What carries the collectives of one group on this rank; made on every rank, then connected.

    Args:
        me: this rank's index in the group.
        size: ranks of the group.
        timeout_s: how long a wait for a rank that lives may take.

    Attributes:
        room: this rank's segments.
        rows: parameters that rest in memory of all ranks, once there are any.
    """

    def __init__(self, me: int, size: int, *, timeout_s: float) -> None:
        self.me, self.size, self.timeout_s = me, size, timeout_s
        self.room = Room()
        self.rows: SharedRows | None = None
        own = Segment.new(8 * (_READ + size * SLOTS))
        self._own = own
        self._heads: list[memoryview] = []
        self._cards: list[Card] = []
        self._segments: list[list[Segment]] = []  # of each rank, as far as they have been read
        self._alive: dict[int, int] = {}  # index of another rank -> descriptor of its process
        self._sent: list[_Sent] = []
        self._number = 0

    def card(self, rank: int) -> Card:
        """What other ranks need to connect to this one.

        Args:
            rank: this one's global rank.
        """
        return Card(rank, os.getpid(), self._own.file)

    def connect(self, cards: Sequence[Card]) -> None:
        """Map the heads of all ranks.

        Args:
            cards: of all ranks of the group, in its order.

        Raises:
            OSError: where a process may not be looked into.
        """
        self._cards = list(cards)
        for index, card in enumerate(cards):
            if index != self.me:
                self._alive[index] = os.pidfd_open(card.process)
        heads = [self._own if i == self.me else Segment.of_process(c.process, c.file) for i, c in enumerate(cards)]
        self._heads = [memoryview(head.memory).cast("q") for head in heads]
        self._segments = [self.room.segments if i == self.me else [] for i in range(self.size)]

    def __del__(self) -> None:
        for file in getattr(self, "_alive", {}).values():
            os.close(file)

    def process_of(self, index: int) -> int:
        """The process of a rank, by its index in the group."""
        return self._cards[index].process

    def send(self, tensor: torch.Tensor, tag: int) -> tuple[int, torch.Tensor]:
        """Copy a tensor to where all can read it; returns the number of the message, and the copy."""
        size = tensor.numel() * tensor.element_size()
        place = self._reserve(size)
        copy = self.room.segments[place[0]].view(place[1], tensor)
        copy.copy_(tensor)
        return self._announce(tag, place, size), copy

    def announce(self, tag: int) -> int:
        """Send a message without content; returns its number."""
        return self._announce(tag, None, 0)

    def _announce(self, tag: int, place: tuple[int, int] | None, size: int) -> int:
        number, head = self._number, self._heads[self.me]
        before = _READ + self.me * SLOTS + number % SLOTS
        if number >= SLOTS and not all(other[before] > number - SLOTS for other in self._heads):
            raise RuntimeError(f"expected at most {SLOTS} collectives under way; let all ranks call the same steps")
        self._number += 1
        slot = _MESSAGES + 4 * (number % SLOTS)
        segment, offset = place or (0, 0)
        head[slot + _TAG], head[slot + _SEGMENT], head[slot + _OFFSET], head[slot + _BYTES] = tag, segment, offset, size
        if place is not None:
            self._sent.append(_Sent(number, *place, size))
        head[_COUNT] = self._number  # last: [Note: order of writes]
        return number

    def arrive(self, number: int) -> None:
        """Return when all ranks have sent this message.

        Raises:
            RuntimeError: where a rank has ended, or does not send within the timeout.
        """
        for step in range(1, self.size):
            peer = (self.me + step) % self.size
            head = self._heads[peer]
            for _ in range(_LOOKS):
                if head[_COUNT] > number:
                    break
            else:
                self._sleep_until(peer, number)

    def read(self, peer: int, number: int, tag: int, like: torch.Tensor) -> torch.Tensor:
        """A message of a rank, where it lies.

        Args:
            peer: index of the rank in the group.
            number: of the message, which has arrived.
            tag: which it must have.
            like: of its shape and dtype.

        Raises:
            RuntimeError: if that rank has sent something else.
        """
        head, slot = self._heads[peer], _MESSAGES + 4 * (number % SLOTS)
        self.check(peer, number, tag, like.numel() * like.element_size())
        return self._segment(peer, head[slot + _SEGMENT]).view(head[slot + _OFFSET], like)

    def check(self, peer: int, number: int, tag: int, size: int) -> None:
        """A message that has arrived is the expected one.

        Args:
            peer: index of the rank that has sent it.
            number: of the message.
            tag: which it must have.
            size: its bytes.

        Raises:
            RuntimeError: if that rank has sent something else.
        """
        head, slot = self._heads[peer], _MESSAGES + 4 * (number % SLOTS)
        if head[slot + _TAG] != tag or head[slot + _BYTES] != size:
            raise RuntimeError(
                f"message {number} of rank {self._cards[peer].rank}: expected {size} bytes of collective {tag}, "
                f"got {head[slot + _BYTES]} bytes of collective {head[slot + _TAG]}; let all ranks call the same steps"
            )

    def done(self, number: int) -> None:
        """Say that this rank has read this message of all ranks."""
        own = self._heads[self.me]
        for rank in range(self.size):
            own[_READ + rank * SLOTS + number % SLOTS] = number + 1

    def _reserve(self, size: int) -> tuple[int, int]:
        self._let_go()
        place = self.room.take(size)
        if place is None:
            self.room.grow(size)
            head, number = self._heads[self.me], len(self.room.segments)
            if number > _MOST_SEGMENTS:
                raise RuntimeError(f"{self.room.num_bytes} bytes of messages under way; let all ranks wait for theirs")
            head[_FILES + number - 1] = self.room.segments[-1].file
            place = self.room.take(size)
        assert place is not None
        return place

    def _let_go(self) -> None:
        """Free the messages that all ranks have read."""
        rest = []
        for sent in self._sent:
            slot = _READ + self.me * SLOTS + sent.number % SLOTS
            if all(head[slot] > sent.number for head in self._heads):
                self.room.give_back(sent.segment, sent.offset, sent.num_bytes)
            else:
                rest.append(sent)
        self._sent = rest

    def _segment(self, peer: int, index: int) -> Segment:
        known = self._segments[peer]
        while len(known) <= index:
            known.append(Segment.of_process(self._cards[peer].process, self._heads[peer][_FILES + len(known)]))
        return known[index]

    def _sleep_until(self, peer: int, number: int) -> None:
        head, began = self._heads[peer], time.monotonic()
        check = began + _CHECK_S
        while head[_COUNT] <= number:
            time.sleep(_PAUSE_S)
            if (now := time.monotonic()) < check:
                continue
            check = now + _CHECK_S
            if self._has_ended(peer) and head[_COUNT] <= number:
                raise RuntimeError(f"rank {self._cards[peer].rank} has ended: it was to send message {number}")
            if now - began > self.timeout_s:
                raise RuntimeError(
                    f"rank {self._cards[peer].rank} has not sent message {number} in {self.timeout_s:.0f} s, "
                    "the timeout of the process group"
                )

    def _has_ended(self, peer: int) -> bool:
        """Whether a process is over; its descriptor can be read from then on."""
        poll = select.poll()
        poll.register(self._alive[peer], select.POLLIN)
        return bool(poll.poll(0))


@dataclass
class _Gather(Pending):
    """An all-gather under way: rows of all ranks, in their order."""

    channel: Channel
    number: int
    tag: int
    own: torch.Tensor | None = field(repr=False)

    def arrive(self) -> None:
        """As `Pending.arrive`."""
        self.channel.arrive(self.number)

    def finish(self) -> torch.Tensor:
        """As `Pending.finish`."""
        own, self.own = self.own, None
        assert own is not None
        self.arrive()
        rows, channel = own.shape[0], self.channel
        out = own.new_empty((rows * channel.size, *own.shape[1:]))
        for rank in range(channel.size):
            out[rank * rows : (rank + 1) * rows].copy_(channel.read(rank, self.number, self.tag, own))
        channel.done(self.number)
        return out


@dataclass
class _Reduction(Pending):
    """A reduce-scatter under way: this rank's rows of the sum over all."""

    channel: Channel
    number: int
    tag: int
    full: torch.Tensor = field(repr=False)  # this rank's, in shared memory
    mean: bool = False

    def arrive(self) -> None:
        """As `Pending.arrive`."""
        self.channel.arrive(self.number)

    def finish(self) -> torch.Tensor:
        """As `Pending.finish`."""
        self.arrive()
        channel, rows = self.channel, self.full.shape[0] // self.channel.size
        begin, end = channel.me * rows, (channel.me + 1) * rows
        whole = (channel.read(rank, self.number, self.tag, self.full) for rank in range(channel.size))
        total = reduced((each[begin:end] for each in whole), mean=self.mean)
        channel.done(self.number)
        return total


def launch_all_gather(shard: torch.Tensor, size: int, channel: Channel, tag: int) -> Pending:
    """Start gathering equal shards, rows of dim 0, from all ranks of a group.

    Args:
        shard: of the same shape everywhere; may be written as soon as this has returned.
        size: ranks of the group.
        channel: of the group.
        tag: the same on all ranks.
    """
    return _Gather(channel, *_numbered(channel, shard, tag))


def launch_reduce_scatter(full: torch.Tensor, op: str, size: int, channel: Channel, tag: int) -> Pending:
    """Start summing (or averaging) rows: rank i ends with rows i of the sum over all ranks.

    Args:
        full: dim 0 a multiple of `size`; may be written as soon as this has returned.
        op: "sum" or "avg".
        size, channel, tag: as in `launch_all_gather`.
    """
    return _Reduction(channel, *_numbered(channel, full, tag), mean=op == "avg")


def _numbered(channel: Channel, tensor: torch.Tensor, tag: int) -> tuple[int, int, torch.Tensor]:
    number, copy = channel.send(tensor, tag)
    return number, tag, copy
