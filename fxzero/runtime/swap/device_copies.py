"""Copies between the device and host memory, for a device that is a GPU and for one that is the CPU.

A copy is given "fences": what must have happened on the device before it. On the CPU nothing runs asynchronously, so
there are none. On a GPU they are events; copies to the host and back have a stream each, so that both directions and
computation run at the same time.

[Note: memory under a copy]
torch gives the memory of a dead tensor to the next one on the stream that it came from, whether a copy on another
stream still reads it or not. A transfer therefore holds its tensor until it is waited for, and the wait makes the
stream that waits follow the copy. Launch and wait must be on the same stream, as all of a step is; then
`record_stream` is not needed, which would keep memory for longer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch


class DeviceCopies(Protocol):
    """What a Swapper needs of a device. Tensors are uint8[n], one of them in host memory."""

    pin: bool

    def fences(self) -> Sequence[Any]:
        """What the current stream has been given so far."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor, after: Iterable[Any]) -> None:
        """Copy, and return when it is done; called from worker threads, releases the interpreter lock."""


class CpuCopies:
    """The device is the CPU: one memory copy."""

    pin = False

    def fences(self) -> Sequence[Any]:
        """Nothing: what a tensor holds has been computed by now."""
        return ()

    def copy(self, destination: torch.Tensor, source: torch.Tensor, after: Iterable[Any]) -> None:
        """As `DeviceCopies.copy`. Not by `Tensor.copy_`, which would start OpenMP threads for each of ours."""
        ctypes.memmove(destination.data_ptr(), source.data_ptr(), source.numel())


class CudaCopies:
    """The device is a GPU: copies on two streams beside the one that computes; host memory must be pinned."""

    pin = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.to_host = torch.cuda.Stream(device)
        self.to_device = torch.cuda.Stream(device)

    def fences(self) -> Sequence[Any]:
        """An event that the current stream reaches after all that it was given so far."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return (event,)

    def launch(self, destination: torch.Tensor, source: torch.Tensor, after: Iterable[Any]) -> torch.cuda.Event:
        """Start a copy that follows the events `after`; the event that it reaches when it is done."""
        stream = self.to_host if source.is_cuda else self.to_device
        event = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(stream), torch.no_grad():
            for fence in after:
                stream.wait_event(fence)
            destination.copy_(source, non_blocking=True)
            event.record(stream)
        return event

    def copy(self, destination: torch.Tensor, source: torch.Tensor, after: Iterable[Any]) -> None:
        """As `DeviceCopies.copy`."""
        self.launch(destination, source, after).synchronize()

    def wait(self, event: torch.cuda.Event) -> None:
        """Make the current stream follow a copy; the host does not wait."""
        torch.cuda.current_stream(self.device).wait_event(event)


def copies_for(device: torch.device) -> CpuCopies | CudaCopies:
    """How to copy between `device` and host memory."""
    return CudaCopies(device) if device.type == "cuda" else CpuCopies()
