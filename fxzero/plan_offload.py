"""What of a plan's keys about offload fits together, and what they come to."""

from __future__ import annotations

from typing import Any

from fxzero.errors import PlanError

AUTO = "auto"
WHERE = ("none", "host", "nvme", AUTO)
_PARTS = ("offload_optimizer", "offload_parameters", "offload_activations")
_KINDS = {"optimizer": "offload_optimizer", "parameter": "offload_parameters"}

# key -> (its default, whether a plan reads it, what must be set for that)
_READ_WITH: dict[str, tuple[Any, Any, str]] = {
    "offload_below": (4096, lambda plan: uses(plan, *WHERE[1:]), "offload_optimizer, _parameters or _activations"),
    "offload_dir": (None, lambda plan: uses(plan, "nvme", AUTO), "one of them 'nvme' or 'auto'"),
    "offload_io": ("direct", lambda plan: may_use(plan, "nvme"), "one of them 'nvme', or 'auto' and offload_dir"),
    "offload_buffer_bytes": (
        32 * 2**20,
        lambda plan: may_use(plan, "nvme"),
        "one of them 'nvme', or 'auto' and offload_dir",
    ),
    "update_on_host": (
        0.0,
        lambda plan: plan.offload_optimizer == "host" or (plan.offload_optimizer, plan.update_on_host) == (AUTO, AUTO),
        "offload_optimizer='host' (or 'auto' for both)",
    ),
    "host_budget": (None, lambda plan: may_use(plan, "host"), "one of them 'host' or 'auto'"),
}


def uses(plan: Any, *where: str) -> bool:
    """Whether one of a plan's keys says so."""
    return any(getattr(plan, key) in where for key in _PARTS)


def may_use(plan: Any, *tiers: str) -> bool:
    """Whether a plan lets anything rest there, perhaps as decided."""
    return uses(plan, *tiers) or (uses(plan, AUTO) and not set(tiers).isdisjoint(tiers_to_choose(plan)))


def tiers_to_choose(plan: Any) -> tuple[str, ...]:
    """Where a key at "auto" may let something rest: files only where the plan says in which directory."""
    return ("host",) if plan.offload_dir is None else ("host", "nvme")


def leaves_state_open(plan: Any) -> bool:
    """Whether it is to be decided where state rests, or where it is updated."""
    return AUTO in (plan.offload_optimizer, plan.offload_parameters, plan.update_on_host)


def activation_tiers(plan: Any) -> tuple[str, ...]:
    """Where activations may wait."""
    where = plan.offload_activations
    return tiers_to_choose(plan) if where == AUTO else () if where == "none" else (where,)


def state_tiers(plan: Any) -> dict[str, str]:
    """Kind of state -> the tier that it rests on ("auto": as decided), for what leaves the device."""
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
    for key in _PARTS:
        if getattr(plan, key) == AUTO and plan.memory_budget is None:
            fix = "say how much memory there is, such as '20 GiB', or where to offload to: 'host'"
            raise PlanError.of("Plan.memory_budget", expected=f"one, with {key}='auto'", got="None", fix=fix)
    if plan.offload_activations == AUTO and plan.recompute != AUTO:
        fix = "set recompute='auto', or offload_activations='host'"
        expected = "'auto', with offload_activations='auto'"
        raise PlanError.of("Plan.recompute", expected=expected, got=repr(plan.recompute), fix=fix)
