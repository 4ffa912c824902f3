"""Predicted beside measured step times, for ten plans on two ranks over gloo.

    fxzero calibrate --out machine.toml
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tests/benchmarks/prediction.py --hardware machine.toml

Times of each plan's programs: measured without recording and with it, predicted from the machine's description, and
predicted with the costs that were just recorded, by signature of the calls. `replay` is the simulator with the times
that the calls of one recorded step took, over the time of that step: it says how well the simulator knows how programs
run, whatever calls cost. Run it on a machine that does nothing else.
"""

import argparse
import json
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from job import JOBS, Llama  # noqa: E402

import fxzero  # noqa: E402
from fxzero.cost.hardware import Hardware  # noqa: E402
from fxzero.cost.recorded import costs_from  # noqa: E402
from fxzero.profile import side_by_side  # noqa: E402
from fxzero.simulate.prediction import predict  # noqa: E402

PLANS = {
    "zero 3": {"zero": 3},
    "zero 3, prefetch 2": {"zero": 3, "prefetch": 2},
    "zero 3, no buckets": {"zero": 3, "bucket_bytes": 0},
    "zero 3, small buckets": {"zero": 3, "bucket_bytes": "256 KiB"},
    "zero 3, native": {"zero": 3, "all_gather": "native", "reduce_scatter": "native"},
    "zero 3, recompute blocks": {"zero": 3, "recompute": "blocks"},
    "zero 3, two microbatches": {"zero": 3, "accumulate": 2},
    "zero 2": {"zero": 2},
    "zero 1": {"zero": 1},
    "zero 0": {"zero": 0},
}


def measure(plan, args, size, hardware):
    """One row: times in seconds."""
    torch.manual_seed(0)
    model = Llama(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = fxzero.compile(model, optimizer, fxzero.Plan(**plan))
    torch.manual_seed(dist.get_rank())
    x_BT = torch.randint(size.vocab, (size.microbatch, size.seq))
    plain = []
    for index in range(args.steps + 2):
        dist.barrier()
        start = time.perf_counter()
        step(x_BT, x_BT)
        if index >= 2:  # the first compiles, the second warms up
            plain.append(time.perf_counter() - start)
    recording = step.record(x_BT, x_BT, steps=args.steps)
    found = side_by_side(recording, hardware)
    costs = {}
    for program in recording.steps:
        costs |= costs_from(program, recording.seconds_of(program), launch_s=recording.launch_s)
    return {
        "plain_s": statistics.median(plain) - (recording.call_s - recording.step_seconds),
        "recorded_s": recording.step_seconds,
        "spread": max(plain) / min(plain),
        "predicted_s": found.predicted_s,
        "with_costs_s": predict(recording.steps, hardware, recorded=costs).seconds,
        "replay": found.replayed.step_seconds / found.typical.step_seconds,
        "classes": [vars(row) for row in found.by_class()],
    }


def table(rows):
    """As text; ratios are to the step without recording."""
    shown = []
    for name, row in rows.items():
        times = [f"{1e3 * row[key]:.1f}" for key in ("plain_s", "recorded_s", "predicted_s", "with_costs_s")]
        ratios = [row[key] / row["plain_s"] for key in ("predicted_s", "with_costs_s")]
        shown.append([name, *times, *(f"{ratio:.3f}" for ratio in (*ratios, row["replay"], row["spread"]))])
    headers = ["plan", "measured ms", "recorded ms", "predicted ms", "with costs ms", "predicted/measured"]
    headers += ["with costs/measured", "replay", "max/min"]
    return tabulate(shown, headers=headers, disable_numparse=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="cpu", help="a name or a file, such as fxzero calibrate writes")
    parser.add_argument("--job", choices=JOBS, default="llama", help="of tests/benchmarks/job.py")
    parser.add_argument("--steps", type=int, default=10, help="measured with and without recording, each")
    parser.add_argument("--plans", type=int, default=len(PLANS), help="only the first so many")
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    hardware = Hardware.load(args.hardware)
    rows = {}
    for name, plan in list(PLANS.items())[: args.plans]:
        rows[name] = measure(plan, args, JOBS[args.job], hardware)
    if dist.get_rank() == 0:
        print(table(rows), flush=True)
        within = sum(abs(row["predicted_s"] / row["plain_s"] - 1) <= 0.1 for row in rows.values())
        print(f"{within} of {len(rows)} plans within 10%", flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps({"hardware": hardware.name, "plans": rows}, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
