"""Where state rests off the device: host memory or files, and the values that are put there."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from fxzero.graph import StateEntry
from fxzero.graph.swap_ops import DEVICE, resting_tier
from fxzero.plan import Plan
from fxzero.plan_offload import state_tiers, uses
from fxzero.runtime.swap import Swapper

_NUM_BUFFERS = 4


class Homes:
    """The homes of one step's state on this rank.

    Args:
        plan: says what rests where.
        device: where the step runs.

    Attributes:
        swapper: what moves tensors; None where the plan keeps all on the device.

    Raises:
        PlanError, OffloadError: if the plan's directory cannot hold files.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._tiers = state_tiers(plan)
        self._below = plan.offload_below
        self._known: dict[tuple[str, str], torch.Tensor] = {}
        self.swapper: Swapper | None = None
        if uses(plan, "host", "nvme"):
            self.swapper = Swapper(
                device,
                directory=_directory(plan) if uses(plan, "nvme") else None,
                io=plan.offload_io,
                buffer_bytes=max(4096, plan.offload_buffer_bytes // _NUM_BUFFERS),
                num_buffers=_NUM_BUFFERS,
            )

    def tier(self, kind: str, shape: Sequence[int]) -> str:
        """Where an entry of the state rests, by its kind and single-device shape."""
        return resting_tier(kind, shape, self._tiers, self._below)

    def settle(self, key: tuple[str, str], memory: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The memory in which an entry rests, with these values.

        Args:
            key: of the entry.
            memory: its values, this rank's part; on the device, or its home already.
            shape: single-device shape of the entry.

        Returns:
            `memory` itself where the entry stays on the device; else its home, a tensor of the CPU of the same shape
            and strides, into which the values have been moved.
        """
        tier = self.tier(key[0], shape)
        if tier == DEVICE:
            return memory
        assert self.swapper is not None
        home = self._known.get(key)
        if home is not None and home.data_ptr() == memory.data_ptr():
            return home
        label = StateEntry(*key).label
        if home is None or (home.shape, home.stride(), home.dtype) != (memory.shape, memory.stride(), memory.dtype):
            home = self.swapper.home(label, memory.shape, memory.dtype, tier, stride=memory.stride())
            self._known[key] = home
        self.swapper.written(self.swapper.write(memory.detach().to(self.swapper.device), label, tier, into=home))
        return home

    def settle_moves(self) -> None:
        """Wait until the homes hold what was sent to them, before anyone but a program reads them."""
        if self.swapper is not None:
            self.swapper.settle()

    def abandon(self) -> None:
        """After a step that failed: wait for what is under way, and take all room back but the homes."""
        if self.swapper is not None:
            self.swapper.abandon()


def _directory(plan: Plan) -> Path:
    return Path(tempfile.gettempdir() if plan.offload_dir is None else plan.offload_dir)
