"""What an allocator makes of a request: bytes that it counts as allocated, and memory that it takes from the device.

Two are described. CPU memory is counted as requested; malloc sets it aside in lines of 64 bytes. CUDA's caching
allocator counts blocks of 512 bytes and cuts them out of segments, which it keeps: requests up to 1 MiB out of
segments of 2 MiB, larger ones out of segments of 20 MiB, from 10 MiB on out of one of their own, a multiple of 2 MiB.
Source: "Memory management" in PyTorch's CUDA semantics; c10/cuda/CUDACachingAllocator.cpp (round_size,
get_allocation_size, should_split).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Allocator:
    """The rules of one device's allocator.

    Args:
        device: type of the device that it serves; decides which ops take workspace, too.
        counted: bytes that a request's size is rounded up to where allocated bytes are counted.
        block: bytes that it is rounded up to where memory is set aside.
        segmented: blocks are cut out of segments that are kept.
    """

    device: str
    counted: int = 1
    block: int = 64
    segmented: bool = False

    def allocated(self, num_bytes: int) -> int:
        """What a request counts for: on CUDA in `torch.cuda.max_memory_allocated`."""
        return -(-num_bytes // self.counted) * self.counted

    def reserved(self, events: Iterable[tuple[int, int]]) -> int:
        """The most memory that is taken from the device while these events happen in order.

        It is an estimate. It assumes an allocator that is empty at first, best fit, one stream, no limit that makes
        it give segments back, and that nothing but these tensors is allocated.

        Args:
            events: (a storage's number, bytes); 0 bytes end its life.
        """
        if self.segmented:
            return _Segments().follow(events)
        live: dict[int, int] = {}
        total = most = 0
        for key, num_bytes in events:
            total += (size := -(-num_bytes // self.block) * self.block) - live.pop(key, 0)
            if size:
                live[key] = size
            most = max(most, total)
        return most


CPU = Allocator("cpu")
CUDA = Allocator("cuda", counted=512, block=512, segmented=True)
ALLOCATORS = {allocator.device: allocator for allocator in (CPU, CUDA)}


def allocator_of(device_type: str) -> Allocator:
    """The allocator of a type of device; an accelerator that is not known is taken to have CUDA's."""
    return ALLOCATORS.get(device_type, CUDA)


@dataclass
class _Block:
    """Bytes from `start` on within a segment, between neighbours there."""

    segment: int
    start: int
    size: int
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        """Its place among free blocks: best fit is the first that is large enough."""
        return (self.size, self.segment, self.start)


class _Segments:
    """The two pools of the caching allocator."""

    def __init__(self) -> None:
        self.reserved = 0
        self.segments = 0
        self.free: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}
        self.blocks: dict[tuple[int, int], _Block] = {}

    def follow(self, events: Iterable[tuple[int, int]]) -> int:
        """Bytes of all segments at the end: none is given back."""
        live: dict[int, tuple[_Block, bool]] = {}
        for key, num_bytes in events:
            if num_bytes == 0:
                if key in live:
                    self._release(*live.pop(key))
                continue
            size = CUDA.allocated(num_bytes)
            small = size <= MIB
            live[key] = (self._take(size, small), small)
        return self.reserved

    def _take(self, size: int, small: bool) -> _Block:
        pool = self.free[small]
        index = bisect.bisect_left(pool, (size, -1, -1))
        block = self._remove(pool, index) if index < len(pool) else self._new_segment(size, small)
        rest = block.size - size
        if rest >= 512 if small else rest > MIB:
            behind = _Block(block.segment, block.start + size, rest, before=block, after=block.after)
            if block.after is not None:
                block.after.before = behind
            block.after, block.size = behind, size
            self._add(pool, behind)
        block.free = False
        return block

    def _release(self, block: _Block, small: bool) -> None:
        pool = self.free[small]
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                del pool[bisect.bisect_left(pool, neighbour.key)]
                del self.blocks[neighbour.segment, neighbour.start]
                block = self._joined(*sorted((block, neighbour), key=lambda b: b.start))
        block.free = True
        self._add(pool, block)

    @staticmethod
    def _joined(left: _Block, right: _Block) -> _Block:
        left.size += right.size
        left.after = right.after
        if right.after is not None:
            right.after.before = left
        return left

    def _new_segment(self, size: int, small: bool) -> _Block:
        whole = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        self.reserved += whole
        self.segments += 1
        return _Block(self.segments, 0, whole)

    def _add(self, pool: list[tuple[int, int, int]], block: _Block) -> None:
        bisect.insort(pool, block.key)
        self.blocks[block.segment, block.start] = block

    def _remove(self, pool: list[tuple[int, int, int]], index: int) -> _Block:
        _, segment, start = pool.pop(index)
        return self.blocks.pop((segment, start))
