"""What of a plan's keys about dtypes fits together."""

from __future__ import annotations

from typing import Any

from fxzero.errors import PlanError


def check_precision(plan: Any) -> None:
    """Raise PlanError where a key is for another precision, or fp16 has no loss scale."""
    low = plan.reduce_dtype if plan.reduce_dtype != "fp32" else plan.precision
    wanted = low if low in ("bf16", "fp16") else "bf16"
    for key in ("reduce_dtype", "keep_fp32"):
        if plan.precision != wanted and getattr(plan, key) not in ("fp32", ()):
            fix = f"set precision={wanted!r}, or leave {key} out"
            raise PlanError.of(
                f"Plan.{key}", expected=f"precision {wanted!r} with it", got=repr(plan.precision), fix=fix
            )
    if plan.precision.endswith("fp16") and plan.loss_scale is None:
        fix = "set loss_scale='dynamic', or a number (1.0 to go without, gradients below 6e-8 are then 0)"
        raise PlanError.of("Plan.loss_scale", expected="one, with precision in fp16", got="None", fix=fix)
