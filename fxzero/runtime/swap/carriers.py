"""What carries a transfer out: threads, in chunks; or, between a GPU and pinned host memory, the GPU's own streams."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from fxzero.errors import OffloadError
from fxzero.runtime.swap.device_copies import CpuCopies, CudaCopies
from fxzero.runtime.swap.files import padded
from fxzero.runtime.swap.host_memory import BufferPool
from fxzero.runtime.swap.places import Pending, Place
from fxzero.runtime.swap.traffic import TrafficCount
from fxzero.runtime.swap.workers import Work, Workers, raise_again


class Carrier(Protocol):
    """Carries transfers out, in the order that places ask for."""

    def start(self, place: Place, data: torch.Tensor, *, writes: bool, what: str) -> Any:
        """Start moving `data`, uint8[n] on the device, to its place (`writes`) or from there; note it at the place."""

    def wait(self, pending: Any) -> None:
        """From here the transfer is done, for what follows on this thread and its stream; raises its error."""

    def settle(self, pending: Any) -> None:
        """Block the host until the transfer is done; raises its error."""

    def close(self) -> None:
        """Nothing is under way any more."""


class ThreadCarrier:
    """Worker threads, chunk by chunk; chunks on their way to and from files are in buffers of the pool."""

    def __init__(
        self, workers: Workers, pool: BufferPool, copies: CpuCopies | CudaCopies, traffic: TrafficCount
    ) -> None:
        self.workers = workers
        self.pool = pool
        self.copies = copies
        self.traffic = traffic

    def start(self, place: Place, data: torch.Tensor, *, writes: bool, what: str) -> Work:
        """As `Carrier.start`."""
        source = None if writes else place.last_write
        fences = self.copies.fences()
        move = self._move_by_file if place.file is not None else self._move_in_memory
        starts = range(0, data.numel(), self.pool.buffer_bytes)
        pieces = [partial(move, place, data, start, fences, writes, what, source) for start in starts]
        work = Work(what, pieces)
        before = place.before_write() if writes else place.before_read()
        self.workers.submit(work, after=[other for other in before if isinstance(other, Work)])
        (place.note_write if writes else place.note_read)(work)
        return work

    def wait(self, pending: Work) -> None:
        """As `Carrier.wait`: the host blocks."""
        self.workers.wait(pending)

    def settle(self, pending: Work) -> None:
        """As `Carrier.settle`."""
        self.workers.wait(pending)

    def close(self) -> None:
        """End the threads."""
        self.workers.close()

    def _move_in_memory(
        self, place: Place, data: torch.Tensor, start: int, fences: Any, writes: bool, what: str, source: Pending | None
    ) -> None:
        raise_again(None if source is None else source.error)
        assert place.memory is not None
        device = data[start : start + self.pool.buffer_bytes]
        host = place.memory.bytes[start : start + device.numel()]
        self.copies.copy(*((host, device) if writes else (device, host)), after=fences)
        self.traffic.add(place.tier, device.numel(), writes=writes)

    def _move_by_file(
        self, place: Place, data: torch.Tensor, start: int, fences: Any, writes: bool, what: str, source: Pending | None
    ) -> None:
        raise_again(None if source is None else source.error)
        assert place.file is not None
        device = data[start : start + self.pool.buffer_bytes]
        nbytes = device.numel()
        with self.pool.buffer() as buffer:
            host, block = buffer.bytes[:nbytes], buffer.view[: padded(nbytes)]
            if writes:
                self.copies.copy(host, device, fences)
                ctypes.memset(buffer.bytes.data_ptr() + nbytes, 0, len(block) - nbytes)
                place.file.write(block, start, what)
            else:
                place.file.read(block, start, what)
                self.copies.copy(device, host, fences)
        self.traffic.add(place.tier, len(block), writes=writes)


@dataclass(eq=False)
class StreamCopy:
    """A copy on a stream of the GPU; a CUDA error in it comes up at the device, not here."""

    event: torch.cuda.Event
    error: OffloadError | None = None

    def finished(self) -> bool:
        """Whether the GPU has done it."""
        return self.event.query()


class StreamCarrier:
    """The GPU's copy streams; the host waits for nothing but in `settle`."""

    def __init__(self, copies: CudaCopies, traffic: TrafficCount) -> None:
        self.copies = copies
        self.traffic = traffic

    def start(self, place: Place, data: torch.Tensor, *, writes: bool, what: str) -> StreamCopy:
        """As `Carrier.start`."""
        host = place.memory.bytes[: data.numel()] if place.memory is not None else torch.empty(0, dtype=torch.uint8)
        before = place.before_write() if writes else place.before_read()
        fences = [*self.copies.fences(), *(other.event for other in before if isinstance(other, StreamCopy))]
        destination, source = (host, data) if writes else (data, host)
        copy = StreamCopy(self.copies.launch(destination, source, fences))
        (place.note_write if writes else place.note_read)(copy)
        self.traffic.add(place.tier, data.numel(), writes=writes)
        return copy

    def wait(self, pending: StreamCopy) -> None:
        """As `Carrier.wait`: the current stream follows the copy."""
        self.copies.wait(pending.event)

    def settle(self, pending: StreamCopy) -> None:
        """As `Carrier.settle`."""
        pending.event.synchronize()

    def synchronize(self) -> None:
        """Block the host until both streams have done all that they were given."""
        self.copies.to_host.synchronize()
        self.copies.to_device.synchronize()

    def close(self) -> None:
        """As `synchronize`, unless CUDA itself is gone, as it may be when the process ends."""
        with suppress(RuntimeError):
            self.synchronize()
