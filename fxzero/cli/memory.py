"""fxzero memory: the peak of a training step on one rank, before it runs, and what stands there."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fxzero.cli.dump import check_out, write
from fxzero.cli.options import add_target_options, allocator_of, plan_of
from fxzero.cli.rewriting import capture_microbatches, progress_of, rewritten_microbatches
from fxzero.cost.memory import MemoryProfile, highest_profile, memory_timeline
from fxzero.decide import Decision
from fxzero.plan_values import number_of_bytes
from fxzero.report import memory_tables, swap_table, swapped_in_step
from fxzero.simulate.memory_picture import areas_of_timeline, check_can_draw, draw_memory

Swapped = dict[tuple[str, str], int]  # (tier, "out" or "in") -> bytes of a step

DESCRIPTION = """\
Print the peak of tensor memory of one rank of --world, by kind, and the largest of what stands there: in this process,
on fake tensors. With --accumulate, of the microbatch that peaks highest.

example:
  fxzero memory examples/llama_meta.py:llama_8b --world 64 --zero 3 --budget "80 GiB" --png memory.png
"""


def add_command(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("memory", help="predict the peak, and say what stands there", description=DESCRIPTION)
    add_target_options(parser)
    parser.add_argument("--budget", metavar="BYTES", help="of a device, such as '80 GiB': what is left of it")
    parser.add_argument("--png", metavar="FILE", help="draw memory over the program (.svg and .pdf too)")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Do it.

    Raises:
        FxzeroError: if target, plan, step or file are not as they must be.
    """
    plan = plan_of(args)
    budget = None if args.budget is None else number_of_bytes("--budget", args.budget)
    for path in filter(None, (args.out, args.png)):
        check_out(path)
    if args.png is not None:
        check_can_draw(args.png)
    progress = progress_of(args)
    captured = capture_microbatches(args.target, plan, progress)
    steps, decision = rewritten_microbatches(captured, plan, progress, backend=args.backend, check=not args.no_verify)
    allocator = allocator_of(args)
    index, profile = highest_profile(steps, allocator=allocator)
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.axes.items())
    what = f"zero {plan.zero} on {mesh}" + (f", microbatch {index} of {len(steps)}" if len(steps) > 1 else "")
    if args.png is not None:
        with progress.stage("draw", f"draw {args.png}"):
            timeline = memory_timeline(steps[index], beside=[*steps[:index], *steps[index + 1 :]], allocator=allocator)
            title = f"{args.target}, {what}"
            draw_memory(areas_of_timeline(timeline), args.png, title=title, budget_bytes=budget)
    swapped = swapped_in_step(steps)
    words = _as_json if args.json else _as_text
    write(words(profile, swapped, budget, what=what, index=index, decision=decision), args.out)


def _as_text(
    profile: MemoryProfile, swapped: Swapped, budget: int | None, *, what: str, index: int, decision: Decision | None
) -> str:
    del index  # it is in what
    lines = [what, "", memory_tables(profile)]
    lines += ["", str(decision)] if decision is not None else []
    lines += ["", swap_table(swapped)] if swapped else []
    if budget is not None:
        left = budget - profile.peak_bytes
        words = "left" if left >= 0 else "missing"
        lines += ["", f"budget {budget / 2**20:,.2f} MiB: {abs(left) / 2**20:,.2f} MiB {words}"]
    return "\n".join(lines) + "\n"


def _as_json(
    profile: MemoryProfile, swapped: Swapped, budget: int | None, *, what: str, index: int, decision: Decision | None
) -> str:
    node = profile.peak_node
    found = {
        "peak_bytes": profile.peak_bytes,
        "state_bytes": profile.state_bytes,
        "reserved_bytes": profile.reserved_bytes,
        "host_bytes": profile.host_bytes,
        "nvme_bytes": profile.nvme_bytes,
        "swapped_bytes": {" ".join(key): size for key, size in swapped.items()},
        "budget_bytes": budget,
        "what": what,
        "decision": None if decision is None else str(decision),
        "allocator": profile.allocator.device,
        "microbatch": index,
        "peak": {"node": node.name, "phase": node.meta.get("phase", ""), "module": node.meta.get("module", "")},
        "by_kind": profile.by_kind,
        "standing": [vars(item) for item in profile.grouped()],
    }
    return json.dumps(found, indent=1) + "\n"
