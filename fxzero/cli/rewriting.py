"""From FILE.py:FUNCTION and a plan to the graph that a rank would run: one process, fake tensors, no process group."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from fxzero.capture import Inventory, capture_step
from fxzero.capture.rehearsal import rehearse
from fxzero.cli.progress import Progress
from fxzero.cli.target import load_target
from fxzero.decide import Decision, decided_recipe, leaves_open
from fxzero.graph import StepGraph
from fxzero.graph.placement import Placement
from fxzero.pass_manager import Pipeline
from fxzero.plan import Plan
from fxzero.programs import carried
from fxzero.recipe import captured_as, recipe
from fxzero.sharding.hints import pin, pinned_by

CAPTURE = "capture"

Snapshot = Callable[[str, StepGraph], None]


def progress_of(args: argparse.Namespace) -> Progress:
    """Progress on stderr, unless --quiet."""
    return Progress(None if args.quiet else sys.stderr)


def capture_target(text: str, plan: Plan, progress: Progress, *, microbatch: int = -1) -> StepGraph:
    """The step of FILE.py:FUNCTION before any pass.

    Nothing is allocated for parameters, gradients or optimizer state, wherever the model lives.

    Args:
        text: "FILE.py:FUNCTION".
        plan: resolved; its mesh becomes that of the graph.
        progress: what to tell.
        microbatch: which of the step's, where the plan accumulates; the last one updates.
    """
    capture, number = _captures(text, plan, progress), range(plan.accumulate)[microbatch]
    step = capture(0)
    return capture(number, carried(step)) if number else step


def capture_microbatches(text: str, plan: Plan, progress: Progress) -> list[StepGraph]:
    """The step's programs before any pass, one a microbatch; equal ones are the same object. See `capture_target`."""
    capture = _captures(text, plan, progress)
    steps = [capture(0)]
    for index in range(1, plan.accumulate):
        alike = 1 < index < plan.accumulate - 1
        steps.append(steps[-1] if alike else capture(index, carried(steps[-1])))
    return steps


def _captures(text: str, plan: Plan, progress: Progress) -> Callable[..., StepGraph]:
    """`capture(index, carried)` is the program of a microbatch."""
    start = time.perf_counter()
    target = load_target(text)
    inventory = Inventory.of(target.model, target.optimizer)
    progress.done(f"load {text}", time.perf_counter() - start)
    count = sum(p.numel() for p in inventory.parameters.values())
    with progress.stage("rehearse", f"optimizer state of {count:,} parameters"):
        inventory, fresh = rehearse(inventory)
    lies = pinned_by(plan, target.model)
    options = captured_as(plan)
    batch = target.args, target.kwargs

    def capture(index: int, carried: Iterable[str] = ()) -> StepGraph:
        place = options.accumulation.at(index, carried=carried)
        with progress.stage(CAPTURE, f"capture forward, backward, {'update' if place.updates else 'accumulation'}"):
            how = replace(options, accumulation=place)
            step = capture_step(inventory, target.loss, *batch, fresh=fresh, options=how).step
        step.mesh = dict(plan.axes)
        pin(step, lies)
        return step

    return capture


def decided_passes(
    step: StepGraph,
    plan: Plan,
    progress: Progress,
    *,
    backend: str,
    until: str,
    beside: Sequence[StepGraph] = (),
    placed: Placement | None = None,
) -> tuple[Pipeline, Decision | None]:
    """The plan's pipeline for a step, what it leaves open decided.

    Args:
        step: as captured.
        plan: resolved.
        progress: what to tell.
        backend: what carries collectives.
        until: the last pass that will run; before "capture" nothing needs to be decided.
        beside: the step's other microbatches: finished programs of later ones, earlier ones as captured.
        placed: where state rests, if that is decided.
    """
    if not leaves_open(plan) or until == CAPTURE:
        return recipe(plan, backend=backend), None
    with progress.stage("decide", "decide what is kept"):
        return decided_recipe(step, plan=plan, backend=backend, beside=beside, placed=placed)


def rewritten_microbatches(
    captured: Sequence[StepGraph], plan: Plan, progress: Progress, *, backend: str, check: bool
) -> tuple[list[StepGraph], Decision | None]:
    """The programs of a step, one a microbatch, and what was decided for the last; equal ones are the same object.

    Args:
        captured: its microbatches' programs before any pass.
        plan: resolved.
        progress: what to tell.
        backend: what carries collectives.
        check: verify after each pass.
    """
    last = recipe(plan, backend=backend).passes[-1].name
    steps = list(captured)
    done: dict[int, StepGraph] = {}
    decision: Decision | None = None
    for index, step in reversed(list(enumerate(captured))):  # the last one, which updates, decides where state rests
        if id(step) not in done:
            placed = None if decision is None else decision.decided.placed
            beside = [*steps[:index], *steps[index + 1 :]]
            pipeline, found = decided_passes(
                step, plan, progress, backend=backend, until=last, beside=beside, placed=placed
            )
            done[id(step)] = run_passes(step, pipeline, progress, until=last, check=check)
            decision = decision or found
        steps[index] = done[id(step)]
    return steps, decision


def run_passes(
    step: StepGraph,
    pipeline: Pipeline,
    progress: Progress,
    *,
    until: str,
    check: bool,
    snapshot: Snapshot | None = None,
) -> StepGraph:
    """The graph after the pass `until`.

    Args:
        step: as captured.
        pipeline: the plan's; keeps a record of each pass.
        progress: what to tell.
        until: the last pass to run; "capture": none.
        check: verify after each pass.
        snapshot: called with (pass name, graph) after each pass, and with "capture" first.
    """

    def tell(name: str, graph: StepGraph) -> None:
        if snapshot is not None:
            snapshot(name, graph)
        if name != CAPTURE:
            record = pipeline.records[-1]
            progress.done(f"pass {name} ({record.edits:,} edits)", record.seconds + record.verify_seconds)

    if until == CAPTURE:
        tell(CAPTURE, step)
        return step
    start = time.perf_counter()
    rewritten = pipeline.run(step, until=until, check=check, snapshot=tell)
    progress.seconds["passes"] = time.perf_counter() - start
    return rewritten


def run_decided(
    captured: Sequence[StepGraph], plan: Plan, progress: Progress, *, backend: str, check: bool
) -> list[StepGraph]:
    """The programs of a step after all passes, what the plan leaves open decided for each.

    Args:
        captured: before any pass, one a microbatch; equal ones are the same object, and stay so.
        plan: resolved; its mesh becomes that of the graphs.
        progress: what to tell.
        backend: what carries collectives.
        check: verify after each pass.
    """
    done: dict[int, StepGraph] = {}
    for step in captured:
        if id(step) not in done:
            step.mesh = dict(plan.axes)
            pipeline, _ = decided_passes(step, plan, progress, backend=backend, until="")
            done[id(step)] = run_passes(step, pipeline, progress, until=pipeline.passes[-1].name, check=check)
    return [done[id(step)] for step in captured]
