"""What of a plan's keys goes with a step that is one CUDA graph."""

from __future__ import annotations

from typing import Any

from fxzero.errors import PlanError

_OFF_DEVICE = "what moves to the host and back is placed by the host, step by step"
# key -> (its value without, why)
_NOT_WITH: dict[str, tuple[Any, str]] = {
    "offload_optimizer": ("none", _OFF_DEVICE),
    "offload_parameters": ("none", _OFF_DEVICE),
    "offload_activations": ("none", _OFF_DEVICE),
    "cross_step": (False, "a gather that is under way from one step to the next would be part of two graphs"),
    "accumulate": (1, "a sum of gradients that one program hands to the next has no address of its own"),
}


def check_cuda_graph(plan: Any) -> None:
    """No key is set that a step in one CUDA graph cannot have.

    Raises:
        PlanError: naming it.
    """
    if not plan.cuda_graph:
        return
    for key, (value, why) in _NOT_WITH.items():
        if getattr(plan, key) != value:
            raise PlanError.of(
                "Plan.cuda_graph",
                expected=f"{key}={value!r} with it: {why}",
                got=repr(getattr(plan, key)),
                fix=f"leave out cuda_graph or {key}",
            )
