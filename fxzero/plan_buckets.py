"""What a plan says of buckets and of second gathers, and what it leaves to cost."""

from __future__ import annotations

from typing import Any

from fxzero.errors import PlanError

AUTO = "auto"
FIXED_BYTES = 4 * 2**20  # of a bucket, where a plan says nothing and its order is fixed


def check_regather(plan: Any) -> None:
    """Check that parameters are gathered twice where a plan says whether they are.

    Raises:
        PlanError: if they are not.
    """
    if plan.regather is None or plan.zero == 3:
        return
    fix = "set zero=3, or leave regather out"
    raise PlanError.of("Plan.regather", expected="zero=3 with it", got=f"zero={plan.zero}", fix=fix)


def cuts_by_cost(plan: Any) -> bool:
    """Whether buckets are decided by cost: said so, or left open where the order is found by cost."""
    return plan.bucket_bytes == AUTO or (plan.bucket_bytes is None and plan.schedule == "cost")


def bucket_bytes(plan: Any) -> int:
    """Bytes of a bucket as a number: the plan's, or what it has where it says none."""
    return plan.bucket_bytes if isinstance(plan.bucket_bytes, int) else FIXED_BYTES


def regathers(plan: Any) -> bool | str:
    """Whether backward gathers again; "auto": of each parameter, what takes less time within the bound on memory."""
    if plan.regather is not None:
        return plan.regather  # type: ignore[no-any-return]
    return AUTO if cuts_by_cost(plan) and plan.schedule == "cost" and plan.zero == 3 else True
