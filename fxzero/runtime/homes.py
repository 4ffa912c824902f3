"""Where state rests off the device: host memory or files, and the values that are put there."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from fxzero.graph import StateEntry
from fxzero.graph.placement import AUTO, NOTHING_PLACED, Placement, resting_tier
from fxzero.graph.swap_ops import DEVICE
from fxzero.plan import Plan
from fxzero.plan_offload import may_use, state_tiers
from fxzero.runtime.swap import Swapper

_NUM_BUFFERS = 4


class Homes:
    """The homes of one step's state on this rank.

    Args:
        plan: says what rests where.
        device: where the step runs.

    Attributes:
        placed: what was decided where the plan leaves it open; None: nothing yet, and it rests on the host.
        swapper: what moves tensors; None where the plan keeps all on the device.

    Raises:
        PlanError, OffloadError: if the plan's directory cannot hold files.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._tiers = state_tiers(plan)
        self._below = plan.offload_below
        self.placed: Placement | None = None
        self._known: dict[tuple[str, str], torch.Tensor] = {}
        self.swapper: Swapper | None = None
        if may_use(plan, "host", "nvme"):
            self.swapper = Swapper(
                device,
                directory=_directory(plan) if may_use(plan, "nvme") else None,
                io=plan.offload_io,
                buffer_bytes=max(4096, plan.offload_buffer_bytes // _NUM_BUFFERS),
                num_buffers=_NUM_BUFFERS,
            )

    def tier(self, key: tuple[str, str], shape: Sequence[int]) -> str:
        """Where an entry of the state with this single-device shape rests."""
        rule = self._tiers
        if self.placed is None:
            rule = {kind: "host" if tier == AUTO else tier for kind, tier in rule.items()}
        return resting_tier(key, shape, rule, self._below, self.placed or NOTHING_PLACED)

    def vacate(self, key: tuple[str, str]) -> None:
        """An entry rests elsewhere from now on."""
        if self._known.pop(key, None) is not None:
            assert self.swapper is not None
            self.swapper.vacate(StateEntry(*key).label)

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
        tier = self.tier(key, shape)
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
