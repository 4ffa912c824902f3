"""fxzero simulate: how long a training step takes on a machine, what waits for what, and what would make it shorter."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate

from fxzero.cli.advice import Tried, try_changes
from fxzero.cli.dump import check_out, write
from fxzero.cli.options import add_target_options, allocator_of, plan_of
from fxzero.cli.rewriting import capture_microbatches, progress_of, run_decided
from fxzero.cost.allocator import Allocator
from fxzero.cost.compute import matrix_flops
from fxzero.cost.hardware import Hardware, hardware_of
from fxzero.cost.memory import MemoryProfile, highest_profile
from fxzero.cost.recorded import Machine, RecordedCosts
from fxzero.graph import StepGraph
from fxzero.graph.text import size_text
from fxzero.plan import Plan
from fxzero.simulate.memory_picture import check_can_draw
from fxzero.simulate.prediction import Prediction, predict
from fxzero.simulate.summary import exposed_by_place, time_text, timeline_tables
from fxzero.simulate.timeline_picture import draw_timeline
from fxzero.simulate.trace import write_trace

DESCRIPTION = """\
Predict the timeline of a training step on one rank of --world, in this process, on fake tensors: the time of the step,
how busy each lane is, what compute stands still for, the peak of memory, tokens a second.

example:
  fxzero simulate examples/llama_meta.py:llama_8b --world 1024 --hardware h100 --precision bf16 --png timeline.png
"""


@dataclass(frozen=True)
class Throughput:
    """What a step does in its time.

    Args:
        tokens: of all ranks together; 0 where the batch has none that can be told.
        tokens_s: of all ranks together, a second.
        mfu: the time that the matrix products of the captured step take at peak, as part of the step's; what is
            computed twice counts once.
    """

    tokens: int
    tokens_s: float
    mfu: float


@dataclass(frozen=True)
class Found:
    """What `fxzero simulate` found."""

    what: str
    prediction: Prediction
    profile: MemoryProfile
    throughput: Throughput
    tried: list[Tried]


def add_command(commands: Any) -> None:
    """Add the command to the parser."""
    about = "predict how long a step takes, and what it waits for"
    parser = commands.add_parser("simulate", help=about, description=DESCRIPTION)
    add_target_options(parser)
    about = "h100, h200, a100, h100_ethernet, cpu, or a TOML file; default: the plan's, or what --backend stands for"
    parser.add_argument("--hardware", metavar="NAME|FILE", help=about)
    about = "costs that step.record(..., costs=FILE) measured, by op, instead of estimates"
    parser.add_argument("--recorded", metavar="FILE", help=about)
    parser.add_argument("--force-recorded", action="store_true", help="take them from another machine, too")
    parser.add_argument("--png", metavar="FILE", help="draw the timeline (.svg and .pdf too)")
    parser.add_argument("--trace", metavar="FILE", help="write it for ui.perfetto.dev and chrome://tracing")
    parser.add_argument("--advise", action="store_true", help="try some changes of the plan, and say what each gains")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do it.

    Raises:
        FxzeroError: if target, plan, step, hardware or file are not as they must be.
    """
    plan = plan_of(args)
    for path in filter(None, (args.out, args.png, args.trace)):
        check_out(path)
    if args.png is not None:
        check_can_draw(args.png)
    hardware = None if args.hardware is None else Hardware.load(args.hardware)
    recorded = _recorded(args)
    progress = progress_of(args)
    captured = capture_microbatches(args.target, plan, progress)
    if hardware is None:
        hardware = hardware_of(captured[-1], backend=args.backend, named=plan.hardware)
    steps = run_decided(captured, plan, progress, backend=args.backend, check=not args.no_verify)
    with progress.stage("simulate", f"simulate {sum(len(step.graph.nodes) for step in steps):,} nodes"):
        prediction = predict(steps, hardware, recorded=recorded)
    allocator = allocator_of(args)
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.axes.items())
    several = f", {len(steps)} microbatches" if len(steps) > 1 else ""
    what = f"zero {plan.zero} on {mesh}{several}"
    tried: list[Tried] = []
    if args.advise:
        with progress.stage("advise", "try changes of the plan"):
            tried = try_changes(captured, plan, hardware, backend=args.backend, allocator=allocator, recorded=recorded)
    _, profile = highest_profile(steps, allocator=allocator)
    found = Found(what, prediction, profile, throughput_of(captured, plan, prediction), tried)
    _draw(args, found, allocator, progress)
    write(_as_json(found) if args.json else _as_text(found), args.out)


def _recorded(args: argparse.Namespace) -> dict[str, float] | None:
    if args.recorded is None:
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return RecordedCosts.load(args.recorded, machine=Machine.of(device), force=args.force_recorded).seconds


def throughput_of(captured: list[StepGraph], plan: Plan, prediction: Prediction) -> Throughput:
    """Tokens and matrix products of a step, by its time.

    Tokens are the elements of the first batch input of whole numbers with two dims.

    Args:
        captured: its programs before any pass, one a microbatch.
        plan: resolved.
        prediction: of the same.
    """
    ranks = math.prod(plan.axes.values())
    tokens, at_peak = 0, 0.0
    known: dict[int, tuple[int, float]] = {}
    for step in captured:
        if id(step) not in known:
            known[id(step)] = _tokens(step), _seconds_at_peak(step, prediction.hardware)
        tokens += known[id(step)][0] * ranks
        at_peak += known[id(step)][1]
    seconds = max(prediction.seconds, 1e-12)
    return Throughput(tokens, tokens / seconds, at_peak / seconds)


def _tokens(step: StepGraph) -> int:
    for node in step.inputs("batch"):
        val = node.meta["val"]
        if isinstance(val, torch.Tensor) and val.dim() == 2 and val.dtype in (torch.int64, torch.int32):
            return val.numel()
    return 0


def _seconds_at_peak(step: StepGraph, hardware: Hardware) -> float:
    products = ((node, flops) for node in step.calls() if (flops := matrix_flops(node)))
    return sum(flops / hardware.matrix_rate(_dtype(node.meta["val"])) for node, flops in products)


def _dtype(val: Any) -> torch.dtype:
    """Of what a matrix product yields: the first of several."""
    return val.dtype if isinstance(val, torch.Tensor) else val[0].dtype


def _draw(args: argparse.Namespace, found: Found, allocator: Allocator, progress: Any) -> None:
    if args.png is not None:
        with progress.stage("draw", f"draw {args.png}"):
            title = f"{args.target}, {found.what}, {found.prediction.hardware.name}"
            draw_timeline(found.prediction.timeline, args.png, title=title, allocator=allocator)
    if args.trace is not None:
        about = {"target": args.target, "plan": found.what, "hardware": found.prediction.hardware.name}
        with progress.stage("trace", f"write {args.trace}"):
            write_trace({"predicted": found.prediction.timeline}, args.trace, about=about, allocator=allocator)


def _as_text(found: Found) -> str:
    through = found.throughput
    line = f"predicted peak {size_text(found.profile.peak_bytes)} of tensors on this rank"
    capacity = found.prediction.hardware.memory_bytes
    if math.isfinite(capacity):
        line += f", which has {size_text(int(capacity))}"
        line += "" if found.profile.peak_bytes <= capacity else ": too much"
    speed = f"matrix products at peak would take {through.mfu:.1%} of the step (MFU)"
    if through.tokens:
        speed = f"{through.tokens_s:,.0f} tokens a second on all ranks ({through.tokens:,} a step); {speed}"
    parts = [found.what, timeline_tables(found.prediction), f"{line}\n{speed}"]
    if found.tried:
        parts.append(_tried_table(found))
    return "\n\n".join(parts) + "\n"


def _tried_table(found: Found) -> str:
    rows = []
    capacity = found.prediction.hardware.memory_bytes
    for item in found.tried:
        words = ", ".join(f"{key}={value}" for key, value in item.changes.items())
        if item.refused:
            rows.append([words, "", "", "", f"not possible: {item.refused}"])
            continue
        gain = found.prediction.seconds - item.seconds
        more = item.peak_bytes - found.profile.peak_bytes
        note = "" if item.peak_bytes <= capacity else "more than the device has"
        rows.append([words, time_text(item.seconds), f"{gain / found.prediction.seconds:+.1%}", _gib(more), note])
    headers = ["with", "step", "shorter by", "peak GiB", ""]
    align = ("left", "right", "right", "right", "left")
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=align, maxcolwidths=[None] * 4 + [60])


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:+,.2f}"


def _as_json(found: Found) -> str:
    prediction, timeline = found.prediction, found.prediction.timeline
    answer = {
        "step_seconds": prediction.seconds,
        "bound_seconds": prediction.bound_s,
        "hardware": prediction.hardware.name,
        "lanes": {
            lane: {"busy_seconds": timeline.busy_s[lane], "idle_seconds": timeline.idle_s[lane]}
            for lane in timeline.lanes
        },
        "exposed_seconds": timeline.exposed_s,
        "exposed": [vars(item) for item in exposed_by_place(timeline)],
        "gains_seconds": prediction.gains_s,
        "peak_bytes": found.profile.peak_bytes,
        "tokens": found.throughput.tokens,
        "tokens_per_second": found.throughput.tokens_s,
        "mfu": found.throughput.mfu,
        "tried": [
            {"changes": dict(item.changes), "step_seconds": item.seconds, "peak_bytes": item.peak_bytes}
            | ({"refused": item.refused} if item.refused else {})
            for item in found.tried
        ],
    }
    return json.dumps(answer, indent=1) + "\n"
