"""Values for a model on the meta device: one module's tensors at a time, each sharded before the next one exists."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxzero.capture.inventory import Inventory, dense_strides
from fxzero.errors import CaptureError

if TYPE_CHECKING:
    from fxzero.runtime.state import StepState

Init = Callable[[nn.Module], Any]


def materialize(state: StepState, inventory: Inventory) -> None:
    """Fill the meta model of a step's state, by its `init`.

    Without `init` there are only rows, full of NaN, for a checkpoint to be loaded into.

    Args:
        state: not bound yet.
        inventory: of the model on the meta device.

    Raises:
        CaptureError: if `init` leaves a tensor as it was.
    """
    names = {id(p): n for n, p in inventory.parameters.items()}
    paths = {module: path for path, module in state.model.named_modules()}

    def blank(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        fill = math.nan if dtype.is_floating_point else 0
        return torch.full(tuple(shape), fill, dtype=dtype, device=state.device)

    def fill(module: nn.Module) -> None:
        own = {k: p for k, p in module.named_parameters(recurse=False) if p.is_meta}
        buffers = {k: b for k, b in module.named_buffers(recurse=False) if b.is_meta}
        for key, buffer in buffers.items():
            setattr(module, key, blank(buffer.shape, buffer.dtype))
        if state.init is None:
            for old in own.values():
                name, dtype = names[id(old)], old.dtype
                new = state.blank_parameter(name, old.shape, dense_strides(old), lambda s, d=dtype: blank(s, d))  # type: ignore[misc]
                state.replace(old, new, name=name)
            return
        for key, old in own.items():
            module.register_parameter(key, nn.Parameter(blank(old.shape, old.dtype), requires_grad=old.requires_grad))
        if own or buffers:
            state.init(module)
        for key in (*own, *buffers):
            value = getattr(module, key)
            _check_filled(value, f"{paths[module]}.{key}".lstrip("."))
            state.send_from_first_rank(value)
        for key, old in own.items():
            name, full = names[id(old)], getattr(module, key)
            state.replace(old, state.adopt_parameter(name, full.detach()), name=name, also=full)

    state.model.apply(fill)
    state.awaits_checkpoint = state.init is None


def _check_filled(value: torch.Tensor, name: str) -> None:
    if value.dtype.is_floating_point and value.isnan().any():
        raise CaptureError.of(
            where=f"init(module) for {name}",
            expected="every parameter and buffer that the module owns itself to be filled",
            got="one that was left as it was",
            fix="let init fill it, or give it a value when the module is built",
        )
