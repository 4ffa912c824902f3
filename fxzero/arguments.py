"""What compile() can be given: each check raises CaptureError, with what to give instead."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from fxzero.errors import CaptureError

owned: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose parameters are a step's


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are; where they would be, if they are on the meta device."""
    devices = (p.device for p in model.parameters() if p.device.type != "meta")
    return next(devices, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def check_types(model: Any, optimizer: Any) -> None:
    """Model and optimizer are what they are called."""
    for where, value, kind in (("model", model, nn.Module), ("optimizer", optimizer, torch.optim.Optimizer)):
        if not isinstance(value, kind):
            raise CaptureError.of(
                where=f"compile(model, optimizer, plan), {where}",
                expected=f"a torch {kind.__name__}",
                got=type(value).__name__,
                fix="call fxzero.compile(model, optimizer, plan, loss=loss)",
            )


def check_model(model: nn.Module) -> None:
    """The model is a plain module that nothing has sharded or wrapped."""
    from torch.distributed.tensor import DTensor

    where = f"model {type(model).__name__}"
    if model in owned:
        raise CaptureError.of(
            where,
            expected="a model that no step owns",
            got="one that has a compiled step already",
            fix="use that step; for another plan, save its state_dict() and load it into a new model's step",
        )
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        raise CaptureError.of(
            where, expected="a plain module", got="one from torch.compile", fix="pass the module that was compiled"
        )
    wrapped = [
        type(m).__name__
        for m in model.modules()
        if type(m).__module__.startswith(("torch.nn.parallel", "torch.distributed"))
    ]
    if wrapped:
        raise CaptureError.of(
            where, expected="a plain module", got=f"one wrapped by {wrapped[0]}", fix="pass the module inside"
        )
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    if sharded:
        raise CaptureError.of(
            where,
            expected="plain parameters",
            got=f"{sharded[0]} is a DTensor already",
            fix="compile a model once, before anything shards it",
        )
