"""A stand-in for the user's optimizer, to step without touching it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxzero.errors import CaptureError


def clone_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A shallow twin that steps in the for-loop form, per parameter, whatever the original's `foreach` / `fused`."""
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.__dict__.pop("step", None)  # LR schedulers put a wrapper there that is bound to the original
    twin.param_groups = [dict(group) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            raise CaptureError.of(
                where=f"{type(optimizer).__name__}.param_groups",
                expected="differentiable=False",
                got="differentiable=True",
                fix="fxzero does not differentiate through updates",
            )
    return twin


def is_capturable(group: Mapping[str, Any]) -> bool:
    """Whether a group asks for updates without reads by the host; torch grants that on the CPU to compilers only."""
    return bool(group.get("capturable"))


def for_loop_form(optimizer: torch.optim.Optimizer) -> None:
    """Let a twin update one parameter at a time: the form that can run bucket by bucket."""
    for group in optimizer.param_groups:
        group.update({key: False for key in ("foreach", "fused") if key in group})
