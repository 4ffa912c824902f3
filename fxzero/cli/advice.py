"""What some changes of a plan would do to the time of a step: each is run through the recipe and simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxzero.cli.progress import Progress
from fxzero.cli.rewriting import run_decided
from fxzero.cost.allocator import Allocator
from fxzero.cost.hardware import Hardware
from fxzero.cost.memory import highest_profile
from fxzero.errors import FxzeroError
from fxzero.graph import StepGraph
from fxzero.plan import Plan
from fxzero.plan_buckets import bucket_bytes, cuts_by_cost
from fxzero.simulate.prediction import predict


@dataclass(frozen=True)
class Tried:
    """A change that was tried.

    Args:
        changes: keys of the plan, with their other values.
        seconds: of the step; 0 where it was refused.
        peak_bytes: predicted.
        refused: why it is not possible; "" where it is.
    """

    changes: Mapping[str, Any]
    seconds: float = 0.0
    peak_bytes: int = 0
    refused: str = ""


def changes_of(plan: Plan) -> list[dict[str, Any]]:
    """The changes that are worth a try: they need no other capture."""
    found: list[dict[str, Any]] = [{"prefetch": plan.prefetch + 1}]
    if size := bucket_bytes(plan):
        found += [{"bucket_bytes": 4 * size}, {"bucket_bytes": size // 4}]
    if not cuts_by_cost(plan):
        found.append({"bucket_bytes": "auto"})
    found += [{"zero": stage} for stage in (2, 3) if stage != plan.zero and "dp" in plan.axes]
    found.append({"recompute": "none" if plan.recompute != "none" else "blocks"})
    if plan.offload_activations != "none":
        found.append({"offload_activations": "none"})
    return found


def try_changes(
    captured: Sequence[StepGraph],
    plan: Plan,
    hardware: Hardware,
    *,
    backend: str,
    allocator: Allocator,
    recorded: Mapping[str, float] | None = None,
) -> list[Tried]:
    """Each change by itself, the shortest step first; what is not possible comes last.

    Args:
        captured: the step's programs before any pass, one a microbatch.
        plan: resolved.
        hardware: the machine.
        backend: what carries collectives.
        allocator: whose rules the peak follows.
        recorded: signature of an op -> measured seconds.
    """
    found = []
    for keys in changes_of(plan):
        try:
            other = plan.replace(**keys)
            steps = run_decided(captured, other, Progress(None), backend=backend, check=False)
            _, profile = highest_profile(steps, allocator=allocator)
            found.append(Tried(keys, predict(steps, hardware, recorded=recorded).seconds, profile.peak_bytes))
        except FxzeroError as error:
            found.append(Tried(keys, refused=str(error)))
    return sorted(found, key=lambda item: (bool(item.refused), item.seconds))
