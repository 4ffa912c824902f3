"""Predicted beside measured step times, for ten plans on two ranks over gloo.

    fxzero calibrate --out machine.toml
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tests/benchmarks/prediction.py --hardware machine.toml

Three times stand beside each other for each plan: that of the step without recording, that of the recorded step, and
the predicted one. `replay` is the simulator with the measured times of the recorded step's calls: it says how well
the simulator knows how programs run, whatever calls cost. Run it on a machine that does nothing else.
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
    found = step.profile(x_BT, x_BT, path=None, steps=args.steps, hardware=hardware)
    outside_s = found.call_s - found.measured_s
    return {
        "plain_s": statistics.median(plain) - outside_s,
        "recorded_s": found.measured_s,
        "spread": max(plain) / min(plain),
        "predicted_s": found.predicted_s,
        "replay": found.replayed.step_seconds / found.typical.step_seconds,
        "classes": [vars(row) for row in found.by_class()],
    }


def table(rows):
    """As text; ratios are to the step without recording."""
    shown = []
    for name, row in rows.items():
        times = [f"{1e3 * row[key]:.1f}" for key in ("plain_s", "recorded_s", "predicted_s")]
        ratios = [f"{row['predicted_s'] / row['plain_s']:.3f}", f"{row['replay']:.3f}", f"{row['spread']:.2f}"]
        shown.append([name, *times, *ratios])
    headers = ["plan", "measured ms", "recorded ms", "predicted ms", "predicted/measured", "replay", "max/min"]
    return tabulate(shown, headers=headers, disable_numparse=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="cpu", help="a name or a file, such as fxzero calibrate writes")
    parser.add_argument("--job", choices=JOBS, default="demo", help="of tests/benchmarks/job.py")
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
