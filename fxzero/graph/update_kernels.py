"""Updates of many parameters by the kernels of `fxzero.kernels`, in place, as `update_ops` calls them.

A kernel takes one count of steps for all of its parameters; counts are tensors on the host, and parameters that have
made as many steps share a launch. What gradients are multiplied by goes in as tensors: the device knows it, the host
need not. Where a dtype is given, the new parameters are written a second time, rounded to it, in the same pass.

Shapes: any, contiguous, equal for what belongs to one parameter; scale and clip of one element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxzero.kernels.adamw import adamw_ as launch_adamw
from fxzero.kernels.lion import lion_ as launch_lion
from fxzero.kernels.sgd import sgd_ as launch_sgd

Tensors = Sequence[torch.Tensor]


def adamw_(*lists: Tensors, beta1: float, beta2: float, **given: Any) -> list[torch.Tensor]:
    """Parameters and state are written over; returns them as the op does. `lists` are the op's, in order."""
    params, grads, averages, squares, greatest, steps = lists
    numbers, copies = _split(params, given)
    for step, members in _by_step(steps).items():
        of_step = [[tensors[i] for i in members] for tensors in (params, grads, averages, squares)]
        launch_adamw(
            *of_step,
            max_exp_avg_sqs=[greatest[i] for i in members] if greatest else (),
            copies=[copies[i] for i in members] if copies else (),
            correction1=1 - beta1**step,
            correction2=1 - beta2**step,
            beta1=beta1,
            beta2=beta2,
            **numbers,
        )
    return [*params, *averages, *squares, *greatest, *copies]


def sgd_(*lists: Tensors, **given: Any) -> list[torch.Tensor]:
    """Parameters and momentum are written over; returns them as the op does. `lists` are the op's, in order."""
    params, grads, momenta = lists
    numbers, copies = _split(params, given)
    launch_sgd(params, grads, momenta, copies=copies, **numbers)
    return [*params, *momenta, *copies]


def lion_(*lists: Tensors, **given: Any) -> list[torch.Tensor]:
    """Parameters and averages are written over; returns them as the op does. `lists` are the op's, in order."""
    params, grads, averages = lists
    numbers, copies = _split(params, given)
    launch_lion(params, grads, averages, copies=copies, **numbers)
    return [*params, *averages, *copies]


def copies_of(params: Tensors, dtype: torch.dtype | None) -> list[torch.Tensor]:
    """Memory for the parameters in another dtype; none without one."""
    return [] if dtype is None else [torch.empty_like(param, dtype=dtype) for param in params]


def _split(params: Tensors, given: dict[str, Any]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The arguments of a kernel but for its copies, and these."""
    numbers = dict(given)
    copies = copies_of(params, numbers.pop("copy_dtype", None))
    for name in ("inverse_scale", "clip"):
        factor = numbers.pop(name, None)
        numbers[name] = 1.0 if factor is None else factor
    return numbers, copies


def _by_step(steps: Tensors) -> dict[float, list[int]]:
    """Count of steps -> the places of the parameters that have made as many."""
    found: dict[float, list[int]] = {}
    for place, step in enumerate(steps):
        found.setdefault(step.item(), []).append(place)
    return found
