"""What may be asked of fxzero through torch.compile: a plan's keys, as far as they make sense for one graph's calls."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fxzero.backend.sharded import Sharded
from fxzero.errors import PlanError
from fxzero.graph.axis_placement import SPLIT_AXES
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
    "compress_gathers": ("none", f"tensors are sent as they are here, if at all; {_STATE}"),
    "compress_reductions": ("none", f"tensors are sent as they are here, if at all; {_STATE}"),
    "node_size": (0, f"ranks gather over all of dp here, if at all; {_STATE}"),
    "chunk_loss": (None, f"the gradient of the loss is known when your loop calls backward(); {_STATE}"),
    "kernels": (False, f"this door does not see the optimizer; {_STATE}"),
    "cross_step": (False, f"a call knows of no next step; {_STATE}"),
    "cuda_graph": (False, f"forward, backward and update are launched by your loop; {_STATE}"),
    "schedule": ("fixed", f"forward and backward run when your loop calls them; {_STATE}"),
    "costs": (None, f"no schedule is decided here; {_STATE}"),
    "memory_budget": (None, f"the peak depends on your loop; set recompute='blocks', or {_STATE}"),
    "precision": ("fp32", "call the model under torch.autocast, or cast it: model.to(torch.bfloat16)"),
}


# what has been settled when `fxzero.shard` has run; all else a plan may leave to the options of torch.compile
_SETTLED = ("zero", "mesh", "persist_below")
_NOT_SHARDED: dict[str, Any] = {"zero": 0, "mesh": {"dp": 1}, "regather": None, "bucket_bytes": None}


@dataclass(frozen=True)
class Options:
    """What torch.compile was given, and `fxzero.shard` before it.

    Args:
        plan: with its mesh resolved; of a graph without sharded parameters that of one rank, with nothing sharded.
        dump: a folder for the text of each graph, if any.
        sharded: whose parameters the graph reads, if they are sharded.
    """

    plan: Plan
    dump: Path | None = None
    sharded: Sharded | None = None


def read_options(
    options: Mapping[str, Any] | None,
    *,
    mode: str | None = None,
    sharded: Sharded | None = None,
    reads_parameters: bool = True,
) -> Options:
    """What torch.compile was given, checked.

    Args:
        options: "plan": a Plan, a mapping of its keys, or the path of a file; or keys of a plan themselves; "dump": a
            folder.
        mode: torch.compile's own argument.
        sharded: whose parameters the graph reads, if they are sharded.
        reads_parameters: the graph reads some; else there is nothing in it that a plan could shard.

    Raises:
        PlanError: naming the key that cannot be honoured, or that contradicts what `fxzero.shard` was given.
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
    plan = _plan(keys if plan is None else plan, sharded, reads_parameters=reads_parameters)
    return Options(plan, None if dump is None else Path(dump), sharded)


def check_shard_plan(plan: Plan) -> Plan:
    """A plan for `fxzero.shard`, if it can be honoured.

    Raises:
        PlanError: naming the key that cannot be.
    """
    if plan.zero != 3:
        fix = "set zero=3 (with regather=False what forward has gathered stays for backward, which is ZeRO-2's memory)"
        fix += f"; the optimizer is your loop's; or {_STATE}"
        raise PlanError.of("Plan.zero", expected="3 with fxzero.shard", got=str(plan.zero), fix=fix)
    for axis in SPLIT_AXES:
        if plan.mesh is not None and plan.mesh.get(axis, 1) > 1:
            fix = f"put these ranks on dp, or {_STATE}"
            where = f"Plan.mesh[{axis!r}]"
            raise PlanError.of(where, expected="1 with fxzero.shard", got=str(plan.mesh[axis]), fix=fix)
    if "auto" in (plan.bucket_bytes, plan.regather):
        key = "bucket_bytes" if plan.bucket_bytes == "auto" else "regather"
        fix = f"the cost of a whole step decides that: write a value, or {_STATE}"
        raise PlanError.of(f"Plan.{key}", expected="a value with fxzero.shard", got="'auto'", fix=fix)
    _check(plan)
    return plan


def _plan(source: Any, sharded: Sharded | None, *, reads_parameters: bool) -> Plan:
    if isinstance(source, (str, os.PathLike)):
        source = Plan.load(source)
    plan = source if isinstance(source, Plan) else Plan.from_dict(source)
    if sharded is not None:
        return check_shard_plan(_joined(sharded.plan, plan, {} if isinstance(source, Plan) else source))
    if reads_parameters:
        _check_alone(plan, says_zero=isinstance(source, Plan) or "zero" in source)
    _check(plan)
    return plan.replace(**_NOT_SHARDED)


def _joined(settled: Plan, asked: Plan, said: Mapping[str, Any]) -> Plan:
    """What `fxzero.shard` was given, with what torch.compile was given beside it.

    Args:
        settled: of `fxzero.shard`.
        asked: of torch.compile. Where it is a Plan, a key at its default says nothing.
        said: the keys that were given by themselves.
    """
    changes = {}
    default, ranks = Plan(), math.prod(settled.axes.values())
    asked = asked if asked.mesh is None else asked.resolve(ranks)
    for key in (f.name for f in fields(Plan)):
        before, now = getattr(settled, key), getattr(asked, key)
        if now == before or (key not in said and now == getattr(default, key)):
            continue
        if key in _SETTLED or before != getattr(default, key):
            expected, got = f"{_shown(before)}, as fxzero.shard was given", f"{_shown(now)} from torch.compile"
            fix = "give both the same, or torch.compile none"
            raise PlanError.of(f"Plan.{key}", expected=expected, got=got, fix=fix)
        changes[key] = now
    return settled.replace(**changes)


def _shown(value: Any) -> str:
    return repr(dict(value) if isinstance(value, Mapping) else value)


def _check_alone(plan: Plan, *, says_zero: bool) -> None:
    """A plan for a graph whose parameters nothing has sharded shards nothing."""
    if says_zero and plan.zero != 0:
        fix = "write zero=0 (a Plan that does not say it has 3; plain keys need not), shard the model first: "
        fix += f"fxzero.shard(model, plan), or {_STATE}"
        raise PlanError.of("Plan.zero", expected="0 through torch.compile", got=str(plan.zero), fix=fix)
    ranks = math.prod((plan.mesh or {}).values())
    if ranks > 1:
        fix = "leave it out: each process compiles for itself; shard the model first: fxzero.shard(model, plan); or "
        raise PlanError.of("Plan.mesh", expected="one rank through torch.compile", got=f"{ranks}", fix=f"{fix}{_STATE}")


def _check(plan: Plan) -> None:
    check_lowering(plan)
    for key, (allowed, fix) in _REFUSED.items():
        value = getattr(plan, key)
        if value != allowed:
            expected = f"{allowed!r} through torch.compile"
            raise PlanError.of(f"Plan.{key}", expected=expected, got=repr(value), fix=fix)


def check_lowering(plan: Plan) -> None:
    """Check that this door has a plan's lowering.

    Raises:
        PlanError: for "triton".
    """
    if plan.lowering == "triton":
        fix = f"set lowering='inductor', or {_STATE}"
        raise PlanError.of("Plan.lowering", expected="'eager' or 'inductor' at this door", got="'triton'", fix=fix)
