"""What of a plan's keys about the order of a step fits together."""

from __future__ import annotations

from typing import Any

from fxzero.errors import PlanError
from fxzero.plan_values import check_goes_with

# what the gathers that a step launches for the next one cannot be, yet: key -> (its value without, why)
_NOT_CARRIED = {
    "compress_gathers": ("none", "packed gathers are not carried over the end of a step"),
    "offload_parameters": ("none", "rows that rest off the device have to come in before they are gathered"),
}


def check_schedule(plan: Any) -> None:
    """Raise PlanError where `cross_step` has nothing to carry, or cannot, and where nothing reads recorded costs."""
    if plan.costs is not None and plan.schedule != "cost":
        fix = "set schedule='cost', or leave costs out"
        raise PlanError.of("Plan.costs", expected="schedule='cost' with it", got=repr(plan.schedule), fix=fix)
    if plan.costs_of_any_machine and plan.costs is None:
        fix = "set costs to the path of a file that step.record(.., costs=) has written, or leave it out"
        raise PlanError.of("Plan.costs_of_any_machine", expected="costs with it", got="None", fix=fix)
    if plan.cross_step:
        _check_cross_step(plan)


def _check_cross_step(plan: Any) -> None:
    if plan.zero < plan.parameter_stage:
        below = "; below it, the gathers of updated parameters are the end of the step already" if plan.zero else ""
        raise PlanError.of(
            "Plan.cross_step",
            expected="parameters that forward gathers: zero=3, or from zero=1 on with precision 'bf16' or 'fp16'",
            got=f"True with zero={plan.zero}",
            fix=f"set zero=3, or leave cross_step out{below}",
        )
    check_goes_with(plan, "cross_step", _NOT_CARRIED)
