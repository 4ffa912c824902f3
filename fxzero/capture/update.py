"""The update of a traced step: the optimizer's own code, on traced gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from fxzero import compat
from fxzero.capture.checks import check_hyperparameters_unchanged
from fxzero.capture.equal_calls import EqualCalls
from fxzero.capture.equal_updates import can_step_alone, step_alone
from fxzero.capture.inputs import is_tensor_or_number
from fxzero.capture.inventory import Inventory, hyperparameters, state_name, with_hyperparameters
from fxzero.capture.loss_scaling import METRICS, SCALE, Overflow, check_can_be_skipped
from fxzero.capture.options import CaptureOptions
from fxzero.capture.twin import clone_optimizer, for_loop_form, is_capturable
from fxzero.graph import StateEntry

GRADIENT_NORM = "grad_norm"  # the metric under which a clipped step reports the norm before clipping

Table = dict[tuple[str, str], Any]


def update(
    inventory: Inventory,
    table: Table,
    gradients: dict[str, torch.Tensor],
    *,
    options: CaptureOptions,
    fresh: bool,
    calls: EqualCalls,
) -> Table:
    """Clip and unscale gradients and step the optimizer; returns what the step returns for it, by key.

    Args:
        inventory: the live objects; the optimizer is not changed.
        table: key of an entry -> its traced value; parameters among them are updated in place.
        gradients: traced, by name.
        options: clipping and loss scaling.
        fresh: the optimizer's first step, with no state.
        calls: of the trace.
    """
    parameters = {name: table[("parameter", name)] for name in inventory.parameters}
    optimizer = _traced_optimizer(inventory, table, parameters, fresh=fresh)
    overflow = options.scaling.overflow(gradients, calls)
    before: Table = {}
    if overflow is not None:
        _check_can_skip(inventory, parameters)
        now = _state_of(optimizer, parameters)
        before = calls.each(torch.clone, {key: (v,) for key, v in now.items() if isinstance(v, torch.Tensor)})
    gradients = options.scaling.unscaled(gradients, table, calls)
    gradients, norm = options.clipping.apply(gradients, calls)
    for name, gradient in gradients.items():
        parameters[name].grad = gradient
    unchanged = [dict(hyperparameters(group)) for group in optimizer.param_groups]
    with compat.compiling(any(map(is_capturable, optimizer.param_groups))):
        stepped = _stepped(optimizer, inventory.optimizer, calls, last=overflow is None)
    check_hyperparameters_unchanged(optimizer, unchanged)
    for parameter in parameters.values():
        parameter.grad = None
    out = _state_of(optimizer, parameters, stepped)
    if norm is not None:
        out[("metric", GRADIENT_NORM)] = norm
    if overflow is not None:
        out |= _skipping(overflow, before, out, updated=set(gradients), calls=calls)
        out |= options.scaling.next(table, overflow)
        values = (table[("auxiliary", SCALE)].clone(), overflow.found.float())
        out |= {("metric", name): value for name, value in zip(METRICS, values, strict=True)}
    return out


def reported(options: CaptureOptions) -> tuple[str, ...]:
    """The names of the metrics that an update reports by itself."""
    return (GRADIENT_NORM,) * (options.clipping.norm is not None) + METRICS * bool(options.scaling.initial)


def _traced_optimizer(
    inventory: Inventory, table: Table, parameters: Mapping[str, torch.Tensor], *, fresh: bool
) -> torch.optim.Optimizer:
    optimizer = clone_optimizer(inventory.optimizer)
    optimizer.param_groups = []
    for index, group in enumerate(inventory.optimizer.param_groups):
        names = {path: ("hyperparameter", f"groups.{index}.{path}") for path, _ in hyperparameters(group)}
        traced = {path: table[key] for path, key in names.items() if key in table}
        held = [parameters[name] for name in inventory.groups[index]]
        optimizer.param_groups.append({**with_hyperparameters(group, traced), "params": held})
    for_loop_form(optimizer)
    optimizer.state = defaultdict(dict)
    for param, key, value in inventory.optimizer_state():
        entry = ("optimizer", state_name(param, key))
        if not fresh and (entry in table or not is_tensor_or_number(value)):
            optimizer.state[parameters[param]][key] = table.get(entry, value)
    return optimizer


def _stepped(
    optimizer: torch.optim.Optimizer, original: torch.optim.Optimizer, calls: EqualCalls, *, last: bool
) -> dict[torch.Tensor, torch.Tensor]:
    """Step; returns the next values of parameters that were not written in place."""
    if calls.copies and can_step_alone(optimizer, original, last=last):
        return step_alone(optimizer, calls)
    type(optimizer).step(optimizer)  # type: ignore[call-arg]
    return {}


def _state_of(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.Tensor],
    stepped: Mapping[torch.Tensor, torch.Tensor] = MappingProxyType({}),
) -> Table:
    """Parameters (or their next values, where `stepped` has some) and optimizer state at this point of the trace."""
    out: Table = {("parameter", name): stepped.get(value, value) for name, value in parameters.items()}
    for name, value in parameters.items():
        for key, item in optimizer.state.get(value, {}).items():
            if is_tensor_or_number(item):
                out[("optimizer", state_name(name, key))] = item
    return out


def _skipping(overflow: Overflow, before: Table, after: Table, *, updated: set[str], calls: EqualCalls) -> Table:
    """What an update has changed, or what was before it where a gradient has overflowed.

    State that a first step makes is kept as it comes: after a skipped one, the next is a first step again.
    """
    changed = {
        (kind, name): value
        for (kind, name), value in after.items()
        if (kind == "parameter" and name in updated) or (kind == "optimizer" and name.rpartition(":")[0] in updated)
    }
    return overflow.select(before, {key: value for key, value in changed.items() if key in before}, calls)


def _check_can_skip(inventory: Inventory, parameters: Mapping[str, torch.Tensor]) -> None:
    for param, key, value in inventory.optimizer_state():
        if is_tensor_or_number(value):
            entry = StateEntry("optimizer", state_name(param, key), (), param)
            check_can_be_skipped(entry, value, parameters[param].device.type)
