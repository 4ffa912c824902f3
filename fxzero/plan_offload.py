"""What of a plan's keys about offload fits together, and what they come to."""

from __future__ import annotations

from typing import Any

from fxzero.errors import PlanError

WHERE = ("none", "host", "nvme")
_PARTS = ("offload_optimizer", "offload_parameters", "offload_activations")
_KINDS = {"optimizer": "offload_optimizer", "parameter": "offload_parameters"}

# key -> (its default, whether a plan reads it, what must be set for that)
_READ_WITH: dict[str, tuple[Any, Any, str]] = {
    "offload_below": (4096, lambda plan: uses(plan, "host", "nvme"), "offload_optimizer, _parameters or _activations"),
    "offload_dir": (None, lambda plan: uses(plan, "nvme"), "one of them 'nvme'"),
    "offload_io": ("direct", lambda plan: uses(plan, "nvme"), "one of them 'nvme'"),
    "offload_buffer_bytes": (32 * 2**20, lambda plan: uses(plan, "nvme"), "one of them 'nvme'"),
    "update_on_host": (0.0, lambda plan: plan.offload_optimizer == "host", "offload_optimizer='host'"),
}


def uses(plan: Any, *where: str) -> bool:
    """Whether a plan lets anything rest there."""
    return any(getattr(plan, key) in where for key in _PARTS)


def state_tiers(plan: Any) -> dict[str, str]:
    """Kind of state -> the tier that it rests on, for what leaves the device."""
    return {kind: where for kind, key in _KINDS.items() if (where := getattr(plan, key)) != "none"}


def check_offload(plan: Any) -> None:
    """No key is set that nothing would read.

    Raises:
        PlanError: naming it.
    """
    for key, (default, is_read, expected) in _READ_WITH.items():
        if getattr(plan, key) != default and not is_read(plan):
            fix = f"set that, or leave {key} out"
            raise PlanError.of(f"Plan.{key}", expected=f"{expected} with it", got="none of that", fix=fix)
