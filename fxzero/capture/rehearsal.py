"""A stand-in for the optimizer with its state in place, so that a step can be captured before anything changes."""

from __future__ import annotations

from typing import Any

import torch

from fxzero.capture.inventory import Inventory, dense_strides
from fxzero.capture.priming import InitialStates, first_step_is_special
from fxzero.capture.twin import clone_optimizer


def rehearse(inventory: Inventory, states: InitialStates | None = None) -> tuple[Inventory, bool]:
    """An inventory whose optimizer has the state that the real one will have; nothing real is touched.

    Tensors of the state are on the meta device (only host scalars keep their values), so that this costs no memory.

    Args:
        inventory: of the real optimizer.
        states: that it would start with, where the caller asks for some too.

    Returns:
        The inventory, and whether the optimizer's first step is unlike later ones (see `starts_unlike_later`).
    """
    optimizer = inventory.optimizer
    states = states or InitialStates(optimizer)
    twin = clone_optimizer(optimizer)
    twin.state = {}  # type: ignore[assignment]
    for name in inventory.optimized:
        parameter = inventory.parameters[name]
        existing = optimizer.state.get(parameter)
        twin.state[parameter] = (
            dict(existing) if existing else initial_forms(states, inventory.group_of(name), parameter)
        )
    return Inventory.of(inventory.model, twin), starts_unlike_later(inventory, states)


def starts_unlike_later(inventory: Inventory, states: InitialStates) -> bool:
    """Whether the optimizer has not stepped yet, and its first step is unlike later ones (`first_step_is_special`).

    Args:
        inventory: of the optimizer.
        states: that it would start with.
    """
    optimizer = inventory.optimizer
    existing = (optimizer.state.get(inventory.parameters[name]) for name in inventory.optimized)
    if any(state and _has_stepped(state) for state in existing):
        return False
    return any(first_step_is_special(states, i) for i, group in enumerate(optimizer.param_groups) if group["params"])


def initial_forms(states: InitialStates, group: int, parameter: torch.Tensor) -> dict[str, Any]:
    """The state that the optimizer would start with, its tensors on the meta device, all but those of no dims.

    Args:
        states: of the optimizer.
        group: index of the parameter's group.
        parameter: of which its single-device shape and strides, and its dtype, are looked at.
    """
    shape, strides = parameter.shape, dense_strides(parameter)
    try:
        return states.of(group, torch.empty_strided(shape, strides, dtype=parameter.dtype, device="meta"))
    except Exception:  # an optimizer whose step reads values: let it have some
        state = states.of(group, torch.empty_strided(shape, strides, dtype=parameter.dtype).zero_())
    return {k: v.to("meta") if isinstance(v, torch.Tensor) and v.dim() else v for k, v in state.items()}


def _has_stepped(state: dict[str, Any]) -> bool:
    return "step" not in state or float(state["step"]) > 0
