"""When what a program has launched is done: seen by a thread on the CPU, by a stream of its own on a GPU.

[Note: how exact a flight is]
- Collectives on the CPU (gloo): a thread for each lane waits for them in the order of their launches, and notes when
  a wait returns, which is late by what it takes to wake a thread (tens of microseconds, more when all cores are busy).
  Of two collectives that a lane has on their way, one that overtakes is seen when the one before it ends.
- Collectives on a GPU (NCCL): a stream for each lane waits for them and records an event: exact, but for the order.
- Swaps: a thread waits for them in both cases, by the host's clock.
- A flight begins when its launch has returned, or the one before it on its lane has ended: what a backend does before
  that, beside others, is not seen.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from fxzero.graph import collectives as c10d
from fxzero.runtime.pending import Pending
from fxzero.runtime.swap import Transfer

JOIN_S = 10.0  # for a thread that watches to end


class Clock(Protocol):
    """Notes moments cheaply, and later says when they were."""

    def mark(self) -> Any:
        """Now, as the lane of compute sees it."""

    def device_s(self, mark: Any) -> float:
        """When the device came to a mark, in seconds since the clock was made."""

    def host_s(self, mark: Any) -> float:
        """When the thread that issues came to it."""


class HostClock:
    """The clock of the host; there, compute and the thread that issues are the same."""

    def __init__(self) -> None:
        self._base = time.perf_counter_ns()
        self.mark = time.perf_counter_ns

    def device_s(self, mark: int) -> float:
        """As `Clock.device_s`."""
        return (mark - self._base) / 1e9

    host_s = device_s


@dataclass(frozen=True)
class _DeviceMark:
    ns: int
    event: torch.cuda.Event


class DeviceClock:
    """Events on the current stream of a GPU, beside the clock of the host; both begin at a synchronisation."""

    def __init__(self) -> None:
        self._start = torch.cuda.Event(enable_timing=True)
        self._start.record()
        torch.cuda.synchronize()
        self._base = time.perf_counter_ns()

    def mark(self) -> _DeviceMark:
        """As `Clock.mark`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return _DeviceMark(time.perf_counter_ns(), event)

    def device_s(self, mark: _DeviceMark | int) -> float:
        """As `Clock.device_s`; a plain number is of the host's clock."""
        if isinstance(mark, int):
            return (mark - self._base) / 1e9
        return self._start.elapsed_time(mark.event) / 1e3

    def host_s(self, mark: _DeviceMark | int) -> float:
        """As `Clock.host_s`."""
        return ((mark if isinstance(mark, int) else mark.ns) - self._base) / 1e9


@dataclass
class Flight:
    """One launch under way.

    Args:
        finish: returns when it is done.
        kept: tensors that must live until then.
        holds: `finish` takes what the program's own wait needs, which must come after it.

    Attributes:
        ended: the mark at which it was done.
        error: of `finish`; the program's wait raises it.
    """

    finish: Callable[[], None]
    kept: Any
    holds: bool
    done: threading.Event = field(default_factory=threading.Event)
    ended: Any = None
    error: BaseException | None = None

    def see(self) -> None:
        """Call `finish`, and let go of all that it holds."""
        finish, self.finish = self.finish, _nothing
        finish()


def _nothing() -> None:
    pass


def flight_of(value: Any, sources: Any) -> Flight | None:
    """The flight of what a launch returned; None where it is done already (what the host uploads).

    Args:
        value: a tensor or tensors of a functional collective, a Pending of messages, or a Transfer.
        sources: what the launch was given.
    """
    if isinstance(value, Pending):
        return Flight(value.arrive, (value, sources), holds=True)
    if isinstance(value, Transfer):
        return Flight(lambda: value.carrier.settle(value.pending), None, holds=False)
    if isinstance(value, torch.Tensor) and sources is None:
        return None
    outputs = [value] if isinstance(value, torch.Tensor) else list(value)
    return Flight(lambda: _finish_collective(outputs), (outputs, sources), holds=True)


def _finish_collective(outputs: Sequence[torch.Tensor]) -> None:
    for output in outputs:
        c10d.wait(output)  # a second wait for it returns at once


class Watcher:
    """A thread that sees the flights of one lane end, in order."""

    def __init__(self, lane: str) -> None:
        self._queue: queue.SimpleQueue[Flight | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name=f"fxzero-record-{lane}", daemon=True)
        self._thread.start()

    def add(self, flight: Flight) -> None:
        """See the end of this one, too."""
        self._queue.put(flight)

    def close(self) -> None:
        """End the thread when it has seen all."""
        self._queue.put(None)
        self._thread.join(JOIN_S)

    def _watch(self) -> None:
        with torch.no_grad():
            while (flight := self._queue.get()) is not None:
                try:
                    flight.see()
                except BaseException as error:
                    flight.error = error
                flight.ended = time.perf_counter_ns()
                flight.kept = None
                flight.done.set()


class LaneStream:
    """A stream of the GPU that follows the collectives of one lane, so that events on it say when they end."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def add(self, flight: Flight, clock: Clock) -> None:
        """Follow this one; nothing blocks."""
        with torch.cuda.stream(self._stream):
            flight.see()
            flight.ended = clock.mark()
        flight.done.set()

    @staticmethod
    def hold(flight: Flight) -> None:
        """The current stream follows it, too."""
        torch.cuda.current_stream().wait_event(flight.ended.event)
        flight.kept = None
