"""What may be asked of fxzero through torch.compile: a plan's keys, as far as they make sense for one graph's calls."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxzero.errors import PlanError
from fxzero.plan import Plan

_WHERE = "torch.compile(backend='fxzero', options=..)"
_STATE = "compile model and optimizer together: fxzero.compile(model, optimizer, plan)"
_OWN_LOOP = "your loop does that: "

# key -> (what it must be here, what to do instead); memory_budget comes with whatever is decided by it
_REFUSED: dict[str, tuple[Any, str]] = {
    "accumulate": (1, f"{_OWN_LOOP}call backward() for each microbatch, then optimizer.step()"),
    "clip_grad_norm": (None, f"{_OWN_LOOP}call torch.nn.utils.clip_grad_norm_ before optimizer.step()"),
    "clip_grad_value": (None, f"{_OWN_LOOP}call torch.nn.utils.clip_grad_value_ before optimizer.step()"),
    "loss_scale": (None, f"{_OWN_LOOP}use torch.amp.GradScaler"),
    "offload_optimizer": ("none", f"this door does not see the optimizer; {_STATE}"),
    "offload_parameters": ("none", f"parameters stay the model's own here; {_STATE}"),
    "update_on_host": (0.0, f"this door does not see the optimizer; {_STATE}"),
    "compress_gathers": ("none", f"nothing is sent here; {_STATE}"),
    "compress_reductions": ("none", f"nothing is sent here; {_STATE}"),
    "node_size": (0, f"nothing is sent here; {_STATE}"),
    "chunk_loss": (None, f"the gradient of the loss is known when your loop calls backward(); {_STATE}"),
    "kernels": (False, f"this door does not see the optimizer; {_STATE}"),
    "cross_step": (False, f"a call knows of no next step; {_STATE}"),
    "schedule": ("fixed", f"forward and backward run when your loop calls them; {_STATE}"),
    "costs": (None, f"no schedule is decided here; {_STATE}"),
    "memory_budget": (None, f"the peak depends on your loop; set recompute='blocks', or {_STATE}"),
    "precision": ("fp32", "call the model under torch.autocast, or cast it: model.to(torch.bfloat16)"),
}


@dataclass(frozen=True)
class Options:
    """What torch.compile was given.

    Args:
        plan: of one rank, with nothing sharded.
        dump: a folder for the text of each graph, if any.
    """

    plan: Plan
    dump: Path | None = None


def read_options(options: Mapping[str, Any] | None, *, mode: str | None = None) -> Options:
    """What torch.compile was given, checked.

    Args:
        options: "plan": a Plan, a mapping of its keys, or the path of a file; or keys of a plan themselves; "dump": a
            folder.
        mode: torch.compile's own argument.

    Raises:
        PlanError: naming the key that cannot be honoured.
    """
    if mode not in (None, "default"):
        fix = "say what you want in options: {'lowering': 'inductor'}"
        raise PlanError.of("torch.compile(mode=..)", expected="none with backend 'fxzero'", got=repr(mode), fix=fix)
    keys = dict(options or {})
    dump = keys.pop("dump", None)
    if dump is not None and not isinstance(dump, (str, os.PathLike)):
        raise PlanError.of(
            f"{_WHERE}, 'dump'", expected="a folder", got=repr(dump), fix="pass its path, or leave it out"
        )
    plan = keys.pop("plan", None)
    if plan is not None and keys:
        fix = "put these keys into the plan, or leave 'plan' out"
        raise PlanError.of(_WHERE, expected="'plan' or keys of a plan", got=f"'plan' and {sorted(keys)}", fix=fix)
    return Options(_plan(keys if plan is None else plan), None if dump is None else Path(dump))


def _plan(source: Any) -> Plan:
    if isinstance(source, (str, os.PathLike)):
        source = Plan.load(source)
    plan = source if isinstance(source, Plan) else Plan.from_dict(source)
    _check(plan, says_zero=isinstance(source, Plan) or "zero" in source)
    return plan.replace(zero=0, mesh={"dp": 1})


def _check(plan: Plan, *, says_zero: bool) -> None:
    if says_zero and plan.zero != 0:
        fix = f"write zero=0 (a Plan that does not say it has 3; plain keys need not), or {_STATE}"
        raise PlanError.of("Plan.zero", expected="0 through torch.compile", got=str(plan.zero), fix=fix)
    ranks = math.prod((plan.mesh or {}).values())
    if ranks > 1:
        fix = f"leave it out: each process compiles for itself; or {_STATE}"
        raise PlanError.of("Plan.mesh", expected="one rank through torch.compile", got=f"{ranks}", fix=fix)
    if plan.lowering == "triton":
        fix = f"set lowering='inductor', or {_STATE}"
        raise PlanError.of("Plan.lowering", expected="'eager' or 'inductor' at this door", got="'triton'", fix=fix)
    for key, (allowed, fix) in _REFUSED.items():
        value = getattr(plan, key)
        if value != allowed:
            expected = f"{allowed!r} through torch.compile"
            raise PlanError.of(f"Plan.{key}", expected=expected, got=repr(value), fix=fix)
