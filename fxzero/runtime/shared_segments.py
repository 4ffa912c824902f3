"""Memory of one process that others of its host read: anonymous files, and where in them a message finds room.

A segment is a file without a name (memfd) which other processes open by process and descriptor number. It is there as
long as a process maps it, so nothing is left behind by one that is killed, and no limit of /dev/shm applies.
"""

from __future__ import annotations

import math
import mmap
import os
from bisect import insort

import torch

ALIGNMENT = 64  # bytes; a line of the cache, and more than any dtype asks for
LEAST_BYTES = 2**22  # of a segment; pages that are never written take no memory


class Segment:
    """Some shared memory, mapped here.

    Args:
        file: descriptor of the file; this object owns it.
        size: of the file, in bytes.

    Attributes:
        bytes: all of it, as a tensor.
    """

    def __init__(self, file: int, size: int) -> None:
        self.file = file
        self.size = size
        self.memory = mmap.mmap(file, size)
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)

    @classmethod
    def new(cls, size: int) -> Segment:
        """A segment of zeros."""
        file = os.memfd_create("fxzero", os.MFD_CLOEXEC)
        os.ftruncate(file, size)
        return cls(file, size)

    @classmethod
    def of_process(cls, process: int, file: int) -> Segment:
        """A segment that another process has made.

        Args:
            process: its id.
            file: its descriptor there.

        Raises:
            OSError: if this process may not open it.
        """
        opened = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
        return cls(opened, os.fstat(opened).st_size)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A part as a contiguous tensor whose storage is that part alone, as what saves tensors looks at storages."""
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=offset).view(shape)

    def view(self, offset: int, like: torch.Tensor) -> torch.Tensor:
        """Shared memory as a contiguous tensor of a shape and dtype."""
        part = self.bytes[offset : offset + like.numel() * like.element_size()]
        return part.view(like.dtype).view(like.shape)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)  # what is mapped stays mapped until the last tensor of it goes


class Room:
    """Which parts of a process's own segments are free; the first that is large enough is taken.

    Attributes:
        segments: in the order in which they were needed.
    """

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self._free: list[tuple[int, int, int]] = []  # (segment, offset, bytes), ascending, never two that touch

    @property
    def num_bytes(self) -> int:
        """Of all segments."""
        return sum(segment.size for segment in self.segments)

    def take(self, size: int) -> tuple[int, int] | None:
        """Reserve memory: its segment and offset; None if no part is large enough."""
        size = rounded(size)
        for place, (segment, offset, free) in enumerate(self._free):
            if free >= size:
                rest = [(segment, offset + size, free - size)] if free > size else []
                self._free[place : place + 1] = rest
                return segment, offset
        return None

    def grow(self, size: int) -> None:
        """Add a segment that has room for `size` bytes, and doubles what there is."""
        least = max(LEAST_BYTES, self.num_bytes, rounded(size))
        self.segments.append(Segment.new(1 << (least - 1).bit_length()))
        self._free.append((len(self.segments) - 1, 0, self.segments[-1].size))

    def give_back(self, segment: int, offset: int, size: int) -> None:
        """Free what was taken."""
        part = (segment, offset, rounded(size))
        insort(self._free, part)
        place = self._free.index(part)
        for left in (place, place - 1):  # join with the next one, then with the one before
            if 0 <= left < len(self._free) - 1 and _touch(self._free[left], self._free[left + 1]):
                of, begin, length = self._free[left]
                self._free[left : left + 2] = [(of, begin, length + self._free[left + 1][2])]


def _touch(part: tuple[int, int, int], after: tuple[int, int, int]) -> bool:
    return part[0] == after[0] and part[1] + part[2] == after[1]


def rounded(size: int) -> int:
    """Bytes that a part of this size takes."""
    return max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
