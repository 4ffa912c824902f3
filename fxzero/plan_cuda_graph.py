"""What of a plan's keys goes with a step that is one CUDA graph."""

from __future__ import annotations

from typing import Any

from fxzero.plan_values import check_goes_with

_OFF_DEVICE = "what moves to the host and back is placed by the host, step by step"
# key -> (its value without, why)
_NOT_WITH: dict[str, tuple[Any, str]] = {
    "offload_optimizer": ("none", _OFF_DEVICE),
    "offload_parameters": ("none", _OFF_DEVICE),
    "offload_activations": ("none", _OFF_DEVICE),
    "cross_step": (False, "a gather that is under way from one step to the next would be part of two graphs"),
    "expert_room": ("all", "whether rows have room the host asks the device in the middle of a step"),
    "accumulate": (1, "a sum of gradients that one program hands to the next has no address of its own"),
}


def check_cuda_graph(plan: Any) -> None:
    """No key is set that a step in one CUDA graph cannot have.

    Raises:
        PlanError: naming it.
    """
    if plan.cuda_graph:
        check_goes_with(plan, "cuda_graph", _NOT_WITH)
