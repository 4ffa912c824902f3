"""State dicts for torch.distributed.checkpoint: flat, tensors only, readable at any world size and ZeRO stage."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fxzero.capture.inventory import hyperparameters
from fxzero.errors import FxzeroError, PlanError
from fxzero.runtime.state import StepState

log = logging.getLogger("fxzero")

_STEPPED = "optimizer.stepped"
_PREFIXES = {"optimizer": "optimizer.state.", "auxiliary": ""}


def state_dict(state: StepState) -> dict[str, torch.Tensor]:
    """Everything that a resumed run needs, as tensors (DTensors where sharded) that share memory with the step.

    Keys: "model.NAME", "optimizer.state.NAME:KEY", "optimizer.param_groups.0.lr" (numbers, as 0-dim tensors of 64
    bits), and what the plan itself keeps under its own names ("scaler.scale"). Values of other types in parameter
    groups are left to the code that builds the optimizer.
    """
    out = {key: value for key, value, _ in _tensors(state)}
    for key, value in _numbers(state):
        out[key] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    out[_STEPPED] = torch.tensor(int(state.stepped))
    return out


def load_state_dict(state: StepState, values: Mapping[str, Any]) -> None:
    """Take over what a `state_dict()` holds by now; tensors that it shares with the step need no copy.

    What the plan itself keeps may be missing (the checkpoint of another plan has none of it): it stays as it is.

    Raises:
        PlanError: if other keys are missing or unknown.
    """
    expected = state_dict(state)
    kept = [name for name in state.auxiliary if name not in values]
    if kept:
        log.warning("fxzero: not in the checkpoint, stays as it is: %s", ", ".join(kept))
        values = {**{name: expected[name] for name in kept}, **values}
    missing, unknown = sorted(expected.keys() - values.keys()), sorted(values.keys() - expected.keys())
    if missing or unknown:
        raise PlanError.of(
            where="load_state_dict",
            expected=f"the {len(expected)} keys of step.state_dict()",
            got=f"{len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}",
            fix="load the checkpoint into step.state_dict() of the same model and optimizer",
        )
    for key, target, _ in _tensors(state):
        if values[key].shape != target.shape:
            raise FxzeroError.of(
                where=key,
                expected=f"shape {tuple(target.shape)}",
                got=f"{tuple(values[key].shape)}",
                fix="load a checkpoint of the same model; nothing has been changed",
            )
    with torch.no_grad():
        for key, target, _ in _tensors(state):
            if values[key] is not target:
                target.copy_(values[key])
    for key, old in list(_numbers(state)):
        _set_number(state, key, type(old)(values[key].item()))
    state.stepped = bool(values[_STEPPED].item())
    state.awaits_checkpoint = False


def _tensors(state: StepState) -> Iterator[tuple[str, torch.Tensor, str]]:
    persistent = set(state.model.state_dict(keep_vars=True))
    for kind, name, tensor in state.named():
        if not isinstance(tensor, torch.Tensor) or (kind == "buffer" and name not in persistent):
            continue
        yield _PREFIXES.get(kind, "model.") + name, tensor.detach(), kind


def _numbers(state: StepState) -> Iterator[tuple[str, Any]]:
    for index, group in enumerate(state.optimizer.param_groups):
        for path, value in hyperparameters(group):
            if isinstance(value, (bool, int, float)):
                yield f"optimizer.param_groups.{index}.{path}", value
    for kind, name, value in state.named():
        if kind == "optimizer" and isinstance(value, (bool, int, float)):
            yield f"optimizer.state.{name}", value


def _set_number(state: StepState, key: str, value: Any) -> None:
    if key.startswith("optimizer.state."):
        state.write_back("optimizer", key.removeprefix("optimizer.state."), value)
        return
    _, _, index, name, *rest = key.split(".")
    group = state.optimizer.param_groups[int(index)]
    if rest:
        items = list(group[name])
        items[int(rest[0])] = value
        group[name] = type(group[name])(items)
    else:
        group[name] = value
