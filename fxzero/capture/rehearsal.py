"""A stand-in for the optimizer with its state in place, so that a step can be captured before anything changes."""

from __future__ import annotations

from typing import Any

import torch

from fxzero.capture.inventory import Inventory, dense_strides
from fxzero.capture.priming import first_step_is_special, initial_state
from fxzero.capture.twin import clone_optimizer


def rehearse(inventory: Inventory) -> tuple[Inventory, bool]:
    """An inventory whose optimizer has the state that the real one will have; nothing real is touched.

    Tensors of the state are on the meta device (only host scalars keep their values), so that this costs no memory.

    Returns:
        The inventory, and whether the optimizer's first step is unlike later ones (see `first_step_is_special`).
    """
    optimizer = inventory.optimizer
    twin = clone_optimizer(optimizer)
    twin.state = {}  # type: ignore[assignment]
    started = False
    for name in inventory.optimized:
        parameter = inventory.parameters[name]
        existing = optimizer.state.get(parameter)
        group = optimizer.param_groups[inventory.group_of(name)]
        started |= existing is not None and bool(existing) and _has_stepped(existing)
        twin.state[parameter] = dict(existing) if existing else _initial(optimizer, group, parameter)
    special = not started and any(
        first_step_is_special(optimizer, group) for group in optimizer.param_groups if group["params"]
    )
    return Inventory.of(inventory.model, twin), special


def _initial(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
    shape, strides = parameter.shape, dense_strides(parameter)
    try:
        like = torch.empty_strided(shape, strides, dtype=parameter.dtype, device="meta")
        return initial_state(optimizer, group, like)
    except Exception:  # an optimizer whose step reads values: let it have some
        state = initial_state(optimizer, group, torch.empty_strided(shape, strides, dtype=parameter.dtype).zero_())
    return {k: v.to("meta") if isinstance(v, torch.Tensor) and v.dim() else v for k, v in state.items()}


def _has_stepped(state: dict[str, Any]) -> bool:
    return "step" not in state or float(state["step"]) > 0
