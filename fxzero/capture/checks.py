"""What capture refuses, and how it says so."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import nn

from fxzero import compat
from fxzero.capture.draws import host_random_state
from fxzero.capture.inventory import hyperparameters
from fxzero.capture.precision import CAST_MORE
from fxzero.errors import CaptureError


def check_loss(loss: Any) -> None:
    """Raise CaptureError unless `loss` is a scalar that can be differentiated."""

    def refuse(got: str, fix: str) -> None:
        raise CaptureError.of(where="loss", expected="a differentiable scalar tensor", got=got, fix=fix)

    if not isinstance(loss, torch.Tensor):
        refuse(
            type(loss).__name__,
            "pass loss=fn with fn(model, *args, **kwargs) -> scalar, or let the model return .loss",
        )
    if loss.numel() != 1:
        refuse(f"a tensor of shape {tuple(loss.shape)}", "reduce it, e.g. with .mean()")
    if not loss.dtype.is_floating_point:
        refuse(f"dtype {loss.dtype}", "return a floating-point loss")
    if not loss.requires_grad:
        refuse(
            "a tensor that needs no gradient",
            "check that the loss depends on trainable parameters, outside no_grad",
        )


def check_host_random(before: tuple[Any, ...], *, where: str) -> None:
    """Raise CaptureError if the generators of Python or NumPy have moved since `before` was taken."""
    if host_random_state() != before:
        raise CaptureError.of(
            where=where,
            expected="random numbers drawn by torch",
            got="a draw from `random` or `numpy.random`, which would be the same at every step",
            fix="draw with torch, or before the step and pass it as part of the batch",
        )


def check_hyperparameters_unchanged(optimizer: torch.optim.Optimizer, before: list[dict[str, Any]]) -> None:
    """Raise CaptureError if a traced step() changed its parameter groups."""
    for index, group in enumerate(optimizer.param_groups):
        for path, value in hyperparameters(group):
            if value is not before[index].get(path, value) and not isinstance(value, (bool, str)):
                raise CaptureError.of(
                    where=f"{type(optimizer).__name__}.param_groups[{index}][{path!r}]",
                    expected="hyperparameters that step() only reads",
                    got="one that step() changes",
                    fix="keep what changes each step in optimizer.state[parameter]",
                )


def capture_error(
    error: Exception,
    *,
    phase: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    path: str,
    op: object,
    batch: list[tuple[str, Any]],
    cast_to: torch.dtype | None = None,
) -> CaptureError:
    """What went wrong in a trace, with the module, op and source line of the user's that it went wrong at.

    Args:
        error: what the trace raised.
        phase: where it was.
        model, optimizer: the user's.
        path: the module whose forward was running.
        op: the last op that was traced.
        batch: (path, leaf) of the arguments.
        cast_to: the dtype that parameters are cast to, if any.
    """
    frames = traceback.extract_tb(error.__traceback__)
    inside = ("/torch/", "/fxzero/capture/", "/fxzero/compat.py", "/sympy/")
    own = [frame for frame in frames if not any(part in frame.filename for part in inside)]
    in_optimizer = [frame for frame in frames if "/torch/optim/" in frame.filename]
    frame = (own or in_optimizer or list(frames))[-1]
    where = f"module {path!r} of {type(model).__name__}" if phase == "forward" else phase
    if phase == "update":
        where = f"{type(optimizer).__name__}.step"
    expected, fix = _advice(error, phase, batch, cast_to)
    return CaptureError.of(
        where=f"{where}, op {op}, {frame.filename}:{frame.lineno} ({(frame.line or '').strip()})",
        expected=expected,
        got=f"{type(error).__name__}: {(str(error).strip() or repr(error)).splitlines()[0]}",
        fix=fix,
    )


def _advice(error: Exception, phase: str, batch: list[tuple[str, Any]], cast_to: torch.dtype | None) -> tuple[str, str]:
    """What was expected, and what to do, by the kind of an error."""
    if compat.is_data_dependent(error):
        return (
            "code whose control flow and shapes do not depend on tensor values",
            "replace the branch by torch.where, or move it out of the step",
        )
    if compat.lacks_fake_kernel(error):
        return ("ops that have a fake kernel", "register one: torch.library.register_fake")
    if phase == "forward" and cast_to is not None and "dtype" in str(error):
        return (
            f"a model that computes in {cast_to} when its parameters and floating inputs are cast to that",
            CAST_MORE,
        )
    if phase == "forward":
        given = ", ".join(f"{path} {_describe(leaf)}" for path, leaf in batch) or "nothing"
        return (
            "a forward pass that runs on this batch",
            f"call loss or model with the same batch outside of fxzero; the step was given {given}",
        )
    return ("a step that runs without fxzero, and can be traced", "try the same step in a plain training loop first")


def _describe(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    text = repr(leaf)
    return text if len(text) <= 40 else f"{text[:37]}..."
