"""Tensors leave the device for host memory or files, and come back, while the step computes.

    transfer = swapper.write(tensor, "blocks.3.gelu", "nvme")   # returns at once
    stored = swapper.written(transfer)                          # waits; the tensor may die
    transfer = swapper.read(stored)                             # returns at once
    swapper.drop(stored)                                        # the slot may be used again, after this read
    tensor = swapper.loaded(transfer)                           # waits

Two transfers of one tensor happen in the order in which they are launched ([Note: ordering] in `places`). One thread
launches, on one stream of the GPU; waits are on the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxzero.errors import OffloadError, PlanError
from fxzero.runtime.swap import layout
from fxzero.runtime.swap.carriers import Carrier, StreamCarrier, ThreadCarrier
from fxzero.runtime.swap.device_copies import CudaCopies, copies_for
from fxzero.runtime.swap.files import BLOCK_BYTES, IO, check_direct_io
from fxzero.runtime.swap.host_memory import BufferPool
from fxzero.runtime.swap.places import TIERS, Places, Stored
from fxzero.runtime.swap.run_directory import RunDirectory
from fxzero.runtime.swap.traffic import Traffic, TrafficCount
from fxzero.runtime.swap.workers import Workers

__all__ = ["Stored", "Swapper", "Traffic", "Transfer"]


@dataclass(eq=False)
class Transfer:
    """A write or a read under way. It holds its tensor; a write lets go of it in `written`."""

    stored: Stored
    writes: bool
    carrier: Carrier
    pending: Any
    tensor: torch.Tensor | None


class Swapper:
    """Moves tensors of one device to the tiers "host" (memory) and "nvme" (files), and back.

    Threads, buffers and slots are made when first needed. Everything goes away at `close`, when the swapper dies, or at
    the end of the process, except home tensors that are still held.

    Args:
        device: "cpu" or a CUDA device; all tensors are on it.
        directory: an existing one on a fast local disk, for the nvme tier; files are in a directory below it that
            belongs to this process.
        io: "direct" (past the page cache) or "buffered" (through it, dropping pages afterwards; works everywhere).
        buffer_bytes: length of a chunk, a multiple of 4096. A tensor on its way to or from a file passes through
            buffers of this size, so they take at most `num_buffers * buffer_bytes`, whatever the size of tensors.
        num_buffers: a thread holds one at a time, so no more than `num_threads` are ever made.
        num_threads: chunks moved at the same time.

    Raises:
        PlanError: a value out of range, or a directory whose file system refuses direct I/O.
        OffloadError: a directory that does not exist or cannot be written to.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        directory: Path | None = None,
        io: str = "direct",
        buffer_bytes: int = 8 * 2**20,
        num_buffers: int = 4,
        num_threads: int = 2,
    ) -> None:
        self.device = _checked_device(device)
        _check_options(io=io, buffer_bytes=buffer_bytes, num_buffers=num_buffers, num_threads=num_threads)
        copies = copies_for(self.device)
        self._traffic = TrafficCount()
        self.buffers = BufferPool(num_buffers, buffer_bytes, pin=copies.pin)
        threads = ThreadCarrier(Workers(num_threads), self.buffers, copies, self._traffic)
        streams = StreamCarrier(copies, self._traffic) if isinstance(copies, CudaCopies) else None
        self._carriers: dict[str, Carrier] = {"host": streams or threads, "nvme": threads}
        self._under_way: set[Transfer] = set()
        self._run_directory = None if directory is None else RunDirectory(Path(directory))
        ends: list[Callable[[], object]] = [carrier.close for carrier in (streams, threads) if carrier is not None]
        if self._run_directory is not None:
            ends.append(self._run_directory.remove)
            if io == "direct":
                _check_direct_io(self._run_directory)
        path = None if self._run_directory is None else self._run_directory.path
        self._places = Places(path, io=io, pin=copies.pin)
        self._end = weakref.finalize(self, _call_all, ends)

    # ---- where tensors rest

    def home(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        tier: str,
        *,
        stride: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """The CPU tensor at which the tensor of this name rests between steps; zeros until it is written to.

        It can be read and written as any tensor while nothing is under way (`settle`). In the host tier it is pinned
        where the device is a GPU; in the nvme tier it is a mapping of its file, which transfers keep in step with.

        Args:
            stride: dense strides; contiguous by default.

        Raises:
            OffloadError: no memory or disk space for it; or the name has a home of another kind.
        """
        self._check(f"home of tensor {name!r}", tier)
        size = tuple(shape)
        stride = layout.contiguous_stride(size) if stride is None else tuple(stride)
        if not layout.is_dense(size, stride):
            raise OffloadError.of(
                f"home of tensor {name!r}",
                expected="dense strides",
                got=f"{list(stride)} for shape {list(size)}",
                fix="give those of its clone",
            )
        return self._places.home(name, size, tuple(stride), dtype, tier).tensor

    def vacate(self, name: str) -> None:
        """The tensor of this name rests elsewhere from now on; nothing of it may be under way (`settle`)."""
        self._places.vacate(name)

    def reserve(self, nbytes: Sequence[int], tier: str) -> None:
        """Make slots for values of these sizes, all at the same time, so that a lack of room shows now, not in a step.

        Raises:
            OffloadError: no memory or disk space.
        """
        self._check(f"{len(nbytes)} slots", tier)
        self._places.make_slots(nbytes, tier)

    # ---- transfers

    def write(self, tensor: torch.Tensor, name: str, tier: str, *, into: torch.Tensor | None = None) -> Transfer:
        """Start moving a tensor to a tier; it must not change before `written`, and its memory is not freed before.

        Args:
            name: for errors, and the name of the home.
            into: the home of that name, whose strides hold. By default the tensor goes to a slot that belongs to it
                until `drop`, and keeps its strides if it is dense, else it gets those of its clone.

        Raises:
            OffloadError: no room for it, not a tensor of this device, not that home.
        """
        what = f"write of tensor {name!r} to {tier}"
        self._check(what, tier)
        layout.check_can_be_moved(tensor, name, self.device)
        if into is not None:
            stored = self._checked_home(tensor, name, tier, into)
            tensor = layout.make_dense(tensor, stored.stride)
        else:
            tensor = layout.make_dense(tensor)
            slot = self._places.take_slot(f"tensor {name!r}", tensor.nbytes, tier)
            shape, stride = tuple(tensor.shape), tuple(tensor.stride())
            stored = Stored(name, shape, stride, tensor.dtype, slot, slot.lease)
        return self._launch(stored, tensor, writes=True, what=what)

    def written(self, transfer: Transfer) -> Stored:
        """Wait for a write; its tensor may die or change then. On a GPU, host tier: the stream waits, not the host.

        Raises:
            OffloadError: the write has failed; the same error each time.
        """
        _check_kind(transfer, writes=True)
        self._wait(transfer)
        return transfer.stored

    def read(self, source: Stored | str) -> Transfer:
        """Start moving what was written to a new tensor on the device.

        Args:
            source: from `written`, or the name of a home.

        Raises:
            OffloadError: there is no such home, or the value was dropped.
        """
        stored = self._home_named(source) if isinstance(source, str) else source
        what = f"read of tensor {stored.name!r} from {stored.tier}"
        self._check(what, stored.tier)
        _check_not_dropped(stored, what)
        tensor = torch.empty_strided(stored.shape, stored.stride, dtype=stored.dtype, device=self.device)
        return self._launch(stored, tensor, writes=False, what=what)

    def loaded(self, transfer: Transfer) -> torch.Tensor:
        """Wait for a read; the tensor. On a GPU, host tier: the stream waits, not the host.

        Raises:
            OffloadError: the read, or the write before it, has failed; the same error each time.
        """
        _check_kind(transfer, writes=False)
        self._wait(transfer)
        assert transfer.tensor is not None
        return transfer.tensor

    def on_host(self, stored: Stored) -> torch.Tensor:
        """The CPU tensor over a value in the host tier, for ops that run there; until `drop`. The host waits for it.

        Raises:
            OffloadError: the value is in a file, was dropped, or its write has failed.
        """
        what = f"use of tensor {stored.name!r} on the host"
        self._check(what, stored.tier)
        _check_not_dropped(stored, what)
        place = stored.place
        if place.file is not None:
            raise OffloadError.of(what, expected="a value in the host tier", got="one in a file", fix="read it")
        if place.last_write is not None:
            self._carriers[stored.tier].settle(place.last_write)
        memory = torch.empty(0, dtype=torch.uint8) if place.memory is None else place.memory.bytes
        return layout.from_bytes(memory, stored.shape, stored.stride, stored.dtype)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device of what an op of the host has computed; the host waits for it."""
        self._traffic.add("host", tensor.nbytes, writes=False)
        return tensor.to(self.device, copy=True)

    def drop(self, stored: Stored) -> None:
        """Give the slot of a value back; reads that have been launched still get the value.

        Raises:
            OffloadError: it was dropped before, or is a home.
        """
        what = f"drop of tensor {stored.name!r}"
        home = self._places.homes.get(stored.name)
        if home is not None and home.stored.place is stored.place:
            raise OffloadError.of(what, expected="a value in a slot", got="a home", fix="keep homes until close")
        _check_not_dropped(stored, what)
        self._places.give_back(stored.place)

    def settle(self) -> None:
        """Block the host until nothing is under way, so that homes hold what was written to them.

        Raises:
            OffloadError: the error of a transfer that has not been waited for.
        """
        errors = [error for error in map(_settle, list(self._under_way)) if error is not None]
        for carrier in self._carriers.values():
            if isinstance(carrier, StreamCarrier):
                carrier.synchronize()
        if errors:
            raise errors[0]

    def abandon(self) -> None:
        """After a failed step: wait for what is under way, forget its errors, drop all values. Homes stay."""
        for transfer in list(self._under_way):
            _settle(transfer)
        self._under_way.clear()
        self._places.give_back_all()

    # ---- figures, end

    def traffic(self) -> Traffic:
        """Bytes moved so far."""
        return self._traffic.now()

    def held(self) -> dict[str, int]:
        """Bytes of homes and slots, by tier, padding included; buffers are not in it."""
        return dict(self._places.held)

    def close(self) -> None:
        """End threads, remove files. What is under way is dropped: `settle` first where homes are to be kept."""
        self._end()
        self._under_way.clear()
        self._places.forget()

    def __enter__(self) -> Swapper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside

    def _launch(self, stored: Stored, tensor: torch.Tensor, *, writes: bool, what: str) -> Transfer:
        carrier = self._carriers[stored.tier]
        pending = carrier.start(stored.place, layout.as_bytes(tensor), writes=writes, what=what)
        transfer = Transfer(stored, writes, carrier, pending, tensor)
        self._under_way.add(transfer)
        return transfer

    def _wait(self, transfer: Transfer) -> None:
        try:
            transfer.carrier.wait(transfer.pending)
        except OffloadError:
            self._let_go(transfer)
            raise
        self._let_go(transfer)  # not when a person interrupts the wait: `abandon` then waits

    def _let_go(self, transfer: Transfer) -> None:
        self._under_way.discard(transfer)
        if transfer.writes:
            transfer.tensor = None

    def _check(self, what: str, tier: str) -> None:
        if tier not in TIERS:
            raise OffloadError.of(what, expected='tier "host" or "nvme"', got=repr(tier), fix="give one of them")
        if not self._end.alive:
            raise OffloadError.of(what, expected="an open swapper", got="a closed one", fix="make a new one")

    def _home_named(self, name: str) -> Stored:
        home = self._places.homes.get(name)
        if home is None:
            raise OffloadError.of(
                f"read of tensor {name!r}", expected="a home of that name", got="none", fix="make it with `home`"
            )
        return home.stored

    def _checked_home(self, tensor: torch.Tensor, name: str, tier: str, into: torch.Tensor) -> Stored:
        home = self._places.homes.get(name)
        if home is not None and home.stored.tier == tier and home.tensor.data_ptr() == into.data_ptr():
            stored = home.stored
            if (stored.shape, stored.dtype) == (tuple(tensor.shape), tensor.dtype):
                return stored
        expected = "none" if home is None else f"{home.tensor.dtype}{list(home.tensor.shape)} in {home.stored.tier}"
        raise OffloadError.of(
            f"write of tensor {name!r} to {tier}",
            expected=f"the home of that name and a tensor like it ({expected})",
            got=f"{tensor.dtype}{list(tensor.shape)}, into {into.dtype}{list(into.shape)}",
            fix="give the tensor that `home` returned for this name",
        )


def _call_all(functions: Sequence[Callable[[], object]]) -> None:
    for function in functions:
        function()


def _settle(transfer: Transfer) -> OffloadError | None:
    try:
        transfer.carrier.settle(transfer.pending)
    except OffloadError as error:
        return error
    return None


def _check_direct_io(run_directory: RunDirectory) -> None:
    try:
        check_direct_io(run_directory.path, run_directory.parent)
    except BaseException:
        run_directory.remove()
        raise


def _check_kind(transfer: Transfer, *, writes: bool) -> None:
    if transfer.writes != writes:
        kinds = ("a write", "a read") if writes else ("a read", "a write")
        fix = "wait for a write with `written`, for a read with `loaded`"
        raise OffloadError.of(f"tensor {transfer.stored.name!r}", expected=kinds[0], got=kinds[1], fix=fix)


def _check_not_dropped(stored: Stored, what: str) -> None:
    if stored.place.lease != stored.lease:
        raise OffloadError.of(
            what, expected="a value that is still stored", got="one that was dropped", fix="drop it after its last read"
        )


def _checked_device(device: torch.device) -> torch.device:
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise PlanError.of("offload", expected="a CPU or CUDA device", got=repr(str(device)), fix="leave offload out")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_options(*, io: str, buffer_bytes: int, num_buffers: int, num_threads: int) -> None:
    if io not in IO:
        raise PlanError.of("offload io", expected='"direct" or "buffered"', got=repr(io), fix="give one of them")
    if buffer_bytes < BLOCK_BYTES or buffer_bytes % BLOCK_BYTES:
        raise PlanError.of(
            "offload buffer_bytes",
            expected=f"a multiple of {BLOCK_BYTES} above 0",
            got=str(buffer_bytes),
            fix=f"give {max(buffer_bytes // BLOCK_BYTES, 1) * BLOCK_BYTES}",
        )
    for name, number in (("num_buffers", num_buffers), ("num_threads", num_threads)):
        if number < 1:
            raise PlanError.of(f"offload {name}", expected="1 or more", got=str(number), fix="give at least 1")
