"""Host memory outside torch's allocators: page-aligned, private, pinned where a GPU is to read and write it.

Where the "device" is the CPU, what torch's CPU allocator counts stands for device memory; what is swapped out must
not be in it. Page alignment is what direct file I/O asks for.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from queue import LifoQueue

import torch

from fxzero.errors import OffloadError

PORTABLE = 1  # cudaHostRegisterPortable: pinned for every CUDA context of the process


class HostMemory:
    """`nbytes` of zeros, as `bytes` (uint8 tensor) and as `view` (for file I/O). Freed with the last tensor over it.

    Args:
        nbytes: more than 0.
        pin: lock the pages and register them with CUDA, so that copies run beside the host.
        what: what it is for, for the error.

    Raises:
        OffloadError: the memory cannot be had, or not be pinned.
    """

    def __init__(self, nbytes: int, *, pin: bool, what: str) -> None:
        try:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise _no_memory(nbytes, what, str(error)) from error
        self.view = memoryview(memory)
        self.bytes = torch.frombuffer(self.view, dtype=torch.uint8)
        if pin:
            address = self.bytes.data_ptr()
            status = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, PORTABLE))  # type: ignore[attr-defined]
            if status != 0:
                raise _no_memory(nbytes, what, f"cudaHostRegister gave error {status}")
            # The tensor's storage holds the view, so the view dies last; the mapping must outlive the call.
            weakref.finalize(self.view, _unpin, memory, address).atexit = False


def _unpin(memory: mmap.mmap, address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[attr-defined]
    del memory


def _no_memory(nbytes: int, what: str, got: str) -> OffloadError:
    return OffloadError.of(
        what,
        expected=f"{nbytes:,} bytes of host memory",
        got=got,
        fix="offload less to the host, or to files; the last checkpoint is untouched",
    )


class BufferPool:
    """At most `num_buffers` buffers of `buffer_bytes`, made when first needed; taking waits until one is free."""

    def __init__(self, num_buffers: int, buffer_bytes: int, *, pin: bool) -> None:
        self.buffer_bytes = buffer_bytes
        self.num_made = 0
        self._pin = pin
        self._lock = threading.Lock()
        self._free: LifoQueue[HostMemory | None] = LifoQueue()  # so that one made is taken before one not made
        for _ in range(num_buffers):
            self._free.put(None)

    @contextmanager
    def buffer(self) -> Iterator[HostMemory]:
        """A buffer of one's own until the context ends."""
        buffer = self._free.get()
        try:
            if buffer is None:
                buffer = HostMemory(self.buffer_bytes, pin=self._pin, what="a buffer between device and files")
                with self._lock:
                    self.num_made += 1
            yield buffer
        finally:
            self._free.put(buffer)
