"""fxzero dump: the program of a training step, at any point of its way, for people and for tools."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from fxzero.cli.options import add_target_options, allocator_of, plan_of
from fxzero.cli.progress import Progress
from fxzero.cli.rewriting import CAPTURE, capture_target, decided_passes, progress_of, run_passes
from fxzero.cli.usage import UsageError, check_pass
from fxzero.cost.hardware import hardware_of
from fxzero.decide import Decision, check_budget
from fxzero.errors import LoweringError
from fxzero.graph import PHASES, StepGraph
from fxzero.graph.export import to_dot, to_json
from fxzero.graph.text import to_text
from fxzero.lower.inductor import check_compiler
from fxzero.lower.lower_regions import lower_regions
from fxzero.lower.shared_functions import region_lines
from fxzero.pass_manager import Pipeline
from fxzero.plan import Plan
from fxzero.plan_offload import leaves_state_open
from fxzero.recipe import ALL_PASSES, recipe
from fxzero.report import report
from fxzero.step_source import PROGRAM, ProgramSource, check_folder, unbound_text, write_source

FORMATS = ("text", "json", "dot", "report")

DESCRIPTION = """\
Print the graph of one training step, captured and rewritten for one rank of --world on fake tensors: in this process,
without a device, a process group or memory for parameters.

example:
  fxzero dump examples/llama_meta.py:llama_8b --world 64 --zero 3 --after shard_parameters --phase backward
"""


def add_command(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("dump", help="print the program of a training step", description=DESCRIPTION)
    add_target_options(parser)
    parser.add_argument("--after", metavar="PASS", help=f"the graph after this pass; '{CAPTURE}': before any")
    about = "with --accumulate, the program of this one: 0 for the first; default: the last, which updates"
    parser.add_argument("--microbatch", type=int, default=-1, metavar="INDEX", help=about)
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: text")
    parser.add_argument("--phase", choices=PHASES, action="append", help="only this phase (text; may be repeated)")
    about = (
        "write there the program and what each distinct region was compiled to, with an index; a new or empty folder"
    )
    parser.add_argument("--regions", metavar="DIR", help=about)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do it.

    Raises:
        FxzeroError: if target, plan or step are not as they must be.
    """
    if args.phase and args.format != "text":
        fix = "leave --phase out: nodes carry their phase"
        raise UsageError.of("--phase", expected="--format text", got=args.format, fix=fix)
    if args.regions is not None and args.after is not None:
        fix = "leave one of them out: regions are those of the whole recipe"
        raise UsageError.of("--regions", expected="no --after with it", got=f"--after {args.after}", fix=fix)
    plan = plan_of(args, default_world=1 if args.after == CAPTURE else None)
    names = [CAPTURE, *(p.name for p in recipe(plan, backend=args.backend).passes)]
    until = names[-1] if args.after is None else args.after
    check_pass("--after", until, known=names, all_names=[p.name for p in ALL_PASSES])
    check_out(args.out)
    if args.regions is not None:
        check_regions(args.regions, plan)
    progress = progress_of(args)
    step = capture_target(args.target, plan, progress, microbatch=_microbatch(args, plan))
    pipeline, decision = decided_passes(step, plan, progress, backend=args.backend, until=until)
    step = run_passes(step, pipeline, progress, until=until, check=not args.no_verify)
    if until == names[-1]:
        check_budget([step], plan=plan)
    with progress.stage("write", f"write {args.format}"):
        text = _render(step, args, plan=plan, pipeline=pipeline, seconds=progress.seconds, decision=decision)
    if args.regions is not None:
        _write_regions(step, plan, progress, Path(args.regions))
    write(text, args.out)


def check_regions(folder: str, plan: Plan) -> None:
    """Raise an error if --regions cannot be done: before a long capture, not after it."""
    try:
        check_folder(Path(folder), where="--regions")
    except LoweringError as error:
        raise UsageError(str(error)) from error
    if plan.lowering == "inductor":
        check_compiler(torch.device("cpu"))


def _write_regions(step: StepGraph, plan: Plan, progress: Progress, folder: Path) -> None:
    """Compile the regions for the device that the step was traced on, the CPU, and write what came of it."""
    lowered = None
    if plan.lowering != "eager":
        with progress.stage("lower", "compile regions"):
            lowered = lower_regions(step, lowering=plan.lowering, fallback=plan.eager_fallback, measure=False)
    program = ProgramSource(step, unbound_text(step, lowered), lowered, plan.lowering)
    what = "regions" if lowered else f"{PROGRAM}: lowering {plan.lowering} has no regions"
    with progress.stage("regions", f"write {what}"):
        write_source(folder, [program], where="--regions")


def _microbatch(args: argparse.Namespace, plan: Plan) -> int:
    index = int(args.microbatch)
    if not -plan.accumulate <= index < plan.accumulate:
        fix = f"choose from 0 to {plan.accumulate - 1}" if plan.accumulate > 1 else "add --accumulate, or leave it out"
        expected = f"one of the step's {plan.accumulate} microbatches"
        raise UsageError.of("--microbatch", expected=expected, got=str(index), fix=fix)
    if leaves_state_open(plan) and index not in (-1, plan.accumulate - 1):
        expected = "the last one, which decides where state rests"
        raise UsageError.of("--microbatch", expected=expected, got=str(index), fix="leave it out")
    return index


def _render(
    step: StepGraph,
    args: argparse.Namespace,
    *,
    plan: Plan,
    pipeline: Pipeline,
    seconds: dict[str, float],
    decision: Decision | None,
) -> str:
    if args.format == "json":
        return json.dumps(to_json(step), indent=1, ensure_ascii=False) + "\n"
    if args.format == "dot":
        return to_dot(step)
    if args.format == "report":
        rules = allocator_of(args)
        hardware = hardware_of(step, backend=args.backend, named=plan.hardware)
        shown = report([step], plan, pipeline.records, seconds, allocator=rules, decision=decision, hardware=hardware)
        return shown + "\n"
    header, _, rest = to_text(step, phases=args.phase, color=wants_color(args.out)).partition("\n")
    decided = [f"# {line}" for line in str(decision or "").splitlines()]
    regions = [f"# {line}" for line in region_lines(step)]
    return "\n".join([header, *decided, *regions, rest])


def wants_color(out: str | None) -> bool:
    """Whether text goes to a terminal (and NO_COLOR does not forbid it)."""
    return out is None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def check_out(out: str | None) -> None:
    """Raise UsageError if --out cannot be written to: before a long capture, not after it."""
    if out is None:
        return
    path = Path(out)
    if path.is_dir() or not path.parent.is_dir():
        got = f"the folder {out}" if path.is_dir() else f"{out}, in a folder that there is not"
        raise UsageError.of("--out", expected="a file to write", got=got, fix="correct the path or make the folder")


def write(text: str, out: str | None) -> None:
    """Write the result to a file, or to stdout."""
    if out is None:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        Path(out).write_text(text, encoding="utf-8")
