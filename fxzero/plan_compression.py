"""Which of a plan's keys about compression fit together: what would be ignored, or cannot be honoured, is an error."""

from __future__ import annotations

from typing import Any

from fxzero.errors import PlanError

QUANTIZED = ("int8", "fp8")
WITH_FEEDBACK = ("powersgd", "topk")

# key -> (its default, whether a plan reads it, what must be set for that)
_READ_WITH: dict[str, tuple[Any, Any, str]] = {
    "compress_block": (
        256,
        lambda plan: plan.compress_gathers in QUANTIZED or plan.compress_reductions in QUANTIZED,
        "compress_gathers or compress_reductions 'int8' or 'fp8'",
    ),
    "compress_below": (
        4096,
        lambda plan: plan.compress_gathers != "none" or plan.compress_reductions != "none",
        "compress_gathers or compress_reductions",
    ),
    "powersgd_rank": (4, lambda plan: plan.compress_reductions == "powersgd", "compress_reductions 'powersgd'"),
    "topk_fraction": (0.01, lambda plan: plan.compress_reductions == "topk", "compress_reductions 'topk'"),
}


def check_compression(plan: Any) -> None:
    """The plan's keys about compression fit together and to its stage and mesh.

    Raises:
        PlanError: a key that nothing reads, or a compression that this stage or mesh has no message for.
    """
    for key, (default, is_read, expected) in _READ_WITH.items():
        if getattr(plan, key) != default and not is_read(plan):
            fix = f"set that, or leave {key} out"
            raise PlanError.of(f"Plan.{key}", expected=f"{expected} with it", got="none of that", fix=fix)
    if plan.compress_gathers != "none" and plan.zero < plan.parameter_stage:
        raise PlanError.of(
            "Plan.compress_gathers",
            expected="a plan that gathers parameters: zero=3, or precision 'bf16' or 'fp16' from zero=1 on",
            got=f"zero={plan.zero}, precision={plan.precision!r}",
            fix="set zero=3 or leave compress_gathers out: what lower stages gather are the updated parameters "
            "themselves, which would lose digits at every step",
        )
    if plan.compress_reductions in QUANTIZED and plan.zero < 2:
        raise PlanError.of(
            "Plan.compress_reductions",
            expected=f"zero=2 or 3 with {plan.compress_reductions!r}, which sends each rank its rows",
            got=f"zero={plan.zero}",
            fix="set zero=2: it keeps no more than gradients do, and sends less",
        )
    if plan.compress_reductions in WITH_FEEDBACK and plan.loss_scale is not None:
        raise PlanError.of(
            "Plan.compress_reductions",
            expected=f"no loss_scale with {plan.compress_reductions!r}, which keeps what it does not send",
            got=f"loss_scale={plan.loss_scale!r}",
            fix="train in bf16, or set compress_reductions='int8': what is kept would be in units of another scale, "
            "and hold an overflow for good",
        )
    _check_node_size(plan)
    for axis in ("tp", "sp", "ep"):
        size = 1 if plan.mesh is None else plan.mesh.get(axis, 1)
        if plan.compress_reductions in WITH_FEEDBACK and size > 1:
            kept = f"what it keeps is not split over {axis} yet"
            raise PlanError.of(
                "Plan.compress_reductions",
                expected=f"a mesh without {axis} with {plan.compress_reductions!r}: {kept}",
                got=f"{axis}={size}",
                fix=f"set compress_reductions='int8' or 'fp8', or leave it or {axis} out",
            )
    replicas = 1 if plan.mesh is None else plan.mesh.get("dp_replicate", 1)
    if plan.compress_reductions != "none" and replicas > 1:
        raise PlanError.of(
            "Plan.compress_reductions",
            expected="a mesh without dp_replicate: only the reduction over dp is compressed",
            got=f"dp_replicate={replicas}",
            fix="put all ranks on dp, or leave compress_reductions out",
        )


def _check_node_size(plan: Any) -> None:
    if plan.node_size and plan.zero != 3:
        raise PlanError.of(
            "Plan.node_size",
            expected="zero=3, which gathers again in backward",
            got=f"zero={plan.zero}",
            fix="leave node_size out",
        )
    size = 1 if plan.mesh is None else plan.mesh.get("dp", 1)
    alone = size == 1  # or not known yet
    if plan.node_size and not alone and (size % plan.node_size or not 1 < plan.node_size < size):
        raise PlanError.of(
            "Plan.node_size",
            expected=f"0, or a divisor of dp={size} above 1 and below it",
            got=str(plan.node_size),
            fix="write how many neighbouring ranks of dp share a node, or leave node_size out",
        )
