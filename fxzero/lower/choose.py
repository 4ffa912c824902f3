"""What runs the compute of a step whose plan leaves that open."""

from __future__ import annotations

import os

import torch

from fxzero.errors import PlanError
from fxzero.lower.inductor import check_compiler
from fxzero.plan import Plan

VARIABLE = "FXZERO_LOWERING"
LOWERINGS = ("eager", "inductor", "triton")


def with_lowering(plan: Plan, device: torch.device, *, is_here: bool = True) -> Plan:
    """The plan, with its lowering chosen where that is "auto".

    What $FXZERO_LOWERING says; else "eager" for a schedule by costs, which are those of single calls; else "inductor"
    where its compiler is found.

    Args:
        plan: of a step.
        device: that the step runs on.
        is_here: it is this machine's; another one is taken to have what Inductor needs.

    Raises:
        PlanError: if the variable names no lowering.
    """
    return plan.replace(lowering=_chosen(plan, device, is_here=is_here)) if plan.lowering == "auto" else plan


def _chosen(plan: Plan, device: torch.device, *, is_here: bool) -> str:
    if asked := os.environ.get(VARIABLE):
        if asked not in LOWERINGS:
            fix = "unset it, or correct it"
            raise PlanError.of(f"${VARIABLE}", expected=" or ".join(map(repr, LOWERINGS)), got=repr(asked), fix=fix)
        return asked
    if plan.schedule == "cost":
        return "eager"
    try:
        if is_here:
            check_compiler(device)
    except PlanError:
        return "eager"
    return "inductor"
