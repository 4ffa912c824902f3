"""Activations that wait off the device between a forward and its backward.

[Note: tickets]
Autograd keeps tensors, and lets them go when backward has run or will not come. So what forward has put into a slot is
handed to it as a ticket: an empty tensor that holds the slot. When the last reference to it is gone, the slot is given
back at the next call; a garbage collector may be anywhere in this program, so it only leaves a note. With
`retain_graph=True` the ticket stays, and backward may read the slot again.
"""

from __future__ import annotations

import collections
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

import torch

from fxzero.errors import OffloadError
from fxzero.plan import Plan
from fxzero.plan_offload import may_use
from fxzero.runtime.swap import Stored, Swapper

_NUM_BUFFERS = 4
_SLOT = "fxzero_slot"


class _Slot:
    """A value off the device, and the note that is left when nobody needs it any more."""

    def __init__(self, stored: Stored, free: collections.deque[Stored]) -> None:
        self.stored = stored
        weakref.finalize(self, free.append, stored)


class Slots:
    """The slots of one graph's calls.

    Args:
        plan: where activations wait.
        device: where they are computed.

    Attributes:
        swapper: what moves them.
        lock: held while a program runs, since the swapper is one for all threads.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        folder = Path(tempfile.gettempdir() if plan.offload_dir is None else plan.offload_dir)
        self.swapper = Swapper(
            device,
            directory=folder if may_use(plan, "nvme") else None,
            io=plan.offload_io,
            buffer_bytes=max(4096, plan.offload_buffer_bytes // _NUM_BUFFERS),
            num_buffers=_NUM_BUFFERS,
        )
        self.lock = threading.RLock()
        self._free: collections.deque[Stored] = collections.deque()

    def tidy(self) -> None:
        """Give back the slots that nobody needs any more."""
        while self._free:
            self.swapper.drop(self._free.popleft())

    def ticket(self, value: Any) -> Any:
        """What autograd keeps for a value of a program: itself, or the ticket of a slot."""
        if not isinstance(value, Stored):
            return value
        ticket = torch.empty(0)
        setattr(ticket, _SLOT, _Slot(value, self._free))
        return ticket

    def stored(self, ticket: torch.Tensor, name: str) -> Stored:
        """The slot of a ticket.

        Raises:
            OffloadError: if a hook on saved tensors has put another tensor in its place.
        """
        slot = getattr(ticket, _SLOT, None)
        if slot is None:
            got = f"another tensor of shape {tuple(ticket.shape)}"
            fix = "leave out torch.autograd.graph.saved_tensors_hooks around the model, or offload_activations"
            raise OffloadError.of(f"saved tensor {name!r}", expected="the ticket of its slot", got=got, fix=fix)
        return slot.stored
