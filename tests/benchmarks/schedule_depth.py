"""Time and memory of compiling a step of Llama 3 405B's shapes at world 1,024, by depth: capture, passes, schedule.

    python -m tests.benchmarks.schedule_depth --depths 16 32 64 126 --json out/depth.json --png out/depth.png

Each depth runs in a process of its own. Seconds are processor time: a shared machine's clock tells about others too.
With --from-json nothing is measured: the picture is drawn of a file that was written before.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxzero import Plan
from fxzero.recipe import recipe
from tests.benchmarks.schedule_bound import MIB, MODELS, captured

WORLD = 1024


def measure(layers: int) -> dict[str, Any]:
    """Processor seconds and the most memory of this process, for one depth."""
    model = MODELS["llama_405b"]
    keys = {"precision": "bf16", "recompute": "blocks", "bucket_bytes": model.bucket_bytes}
    plan = Plan(zero=3, schedule="cost", hardware="h100", **keys).resolve(WORLD)
    start = time.process_time()
    step = captured(model, layers, plan)
    capture_s = time.process_time() - start
    step.mesh = dict(plan.axes)
    pipeline = recipe(plan, backend="nccl")
    start = time.process_time()
    program = pipeline.run(step)
    return {
        "layers": layers,
        "nodes": len(program.graph.nodes),
        "capture_s": capture_s,
        "passes_s": time.process_time() - start,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // MIB,
    }


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds and memory over depth, with the straight line through the first depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    depths = [row["layers"] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    whole = [row["capture_s"] + row["passes_s"] for row in rows]
    left.plot(depths, whole, "o-", label="capture, passes, schedule, verifier")
    left.plot(depths, [row["capture_s"] for row in rows], "s-", label="of it capture")
    left.plot([0, depths[-1]], [0, whole[0] / depths[0] * depths[-1]], ":", color="gray", label="proportional")
    left.set(xlabel="layers", ylabel="processor seconds", title=f"Llama 3 405B's shapes, world {WORLD:,}", ylim=0)
    left.legend()
    right.plot(depths, [row["peak_mib"] / 1024 for row in rows], "o-")
    right.set(xlabel="layers", ylabel="GiB of the compiling process", ylim=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", nargs="+", type=int, default=[16, 32, 64, 126])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--from-json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    rows = json.loads(args.from_json.read_text()) if args.from_json else []
    for depth in () if args.from_json else args.depths:
        command = [sys.executable, "-m", "tests.benchmarks.schedule_depth", "--one", str(depth)]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    if args.png:
        draw(rows, args.png)
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1f"))


if __name__ == "__main__":
    main()
