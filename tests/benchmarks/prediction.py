"""Predicted beside measured step times, for ten plans on two ranks over gloo.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tests/benchmarks/prediction.py

A shared machine is not the same from one minute to the next, so what is compared is measured in turns: in each round
`fxzero calibrate` describes the machine while no rank works, then the plans take turns for some steps each, and for one
with recording. What was predicted is the mean over the descriptions, what was measured the mean over the steps. With
--hardware nothing is calibrated. `replay` is the simulator with the times that the calls of one recorded step took,
over the time of that step: it says how well the simulator knows how programs run, whatever calls cost; `with costs` is
predicted with the mean times of calls of the same signatures. Run it on a machine that does nothing else.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[2]
OF_A_RANK = ("RANK", "LOCAL_", "WORLD_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL")  # variables
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from job import JOBS, Llama  # noqa: E402

import fxzero  # noqa: E402
from fxzero.cost.hardware import Hardware  # noqa: E402
from fxzero.cost.hardware_file import parse  # noqa: E402
from fxzero.cost.recorded import costs_from  # noqa: E402
from fxzero.profile import side_by_side  # noqa: E402
from fxzero.runtime.recording import Recording  # noqa: E402
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


class Case:
    """One plan: its compiled step, and what was seen of it."""

    def __init__(self, plan, size):
        torch.manual_seed(0)
        model = Llama(size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.step = fxzero.compile(model, optimizer, fxzero.Plan(**{"lowering": "eager"} | plan))
        torch.manual_seed(dist.get_rank())
        x_BT = torch.randint(size.vocab, (size.microbatch, size.seq))
        self.batch = (x_BT, x_BT)
        self.plain, self.samples = [], []
        for _ in range(2):  # compiles, and warms up
            self.step(*self.batch)

    def run(self):
        """One step."""
        dist.barrier()
        start = time.perf_counter()
        self.step(*self.batch)
        self.plain.append(time.perf_counter() - start)

    def record(self):
        """One step with recording."""
        self.samples += self.step.record(*self.batch, steps=1).samples

    def row(self, machines):
        """Of the table; times in seconds."""
        recording = Recording(tuple(self.samples))
        found = side_by_side(recording, machines[-1])
        costs = {}
        for program in {id(program): program for program in recording.steps}.values():
            costs |= costs_from(program, recording.seconds_of(program), launch_s=recording.launch_s)
        around_s = statistics.fmean(sample.call_s - sample.step_seconds for sample in self.samples)
        return {
            "plain_s": statistics.fmean(self.plain) - around_s,
            "recorded_s": statistics.fmean(sample.step_seconds for sample in self.samples),
            "spread": max(self.plain) / min(self.plain),
            "predicted_s": statistics.fmean(predict(recording.steps, machine).seconds for machine in machines),
            "with_costs_s": predict(recording.steps, machines[-1], recorded=costs).seconds,
            "replay": found.replayed.step_seconds / found.typical.step_seconds,
            "classes": [vars(row) for row in found.by_class()],
        }


def calibrated(folder):
    """What `fxzero calibrate` says of this machine now; one rank runs it, the others sleep."""
    path = Path(folder) / "machine.toml"
    found = [None]
    if dist.get_rank() == 0:
        env = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_RANK)}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "fxzero.cli", "calibrate", "--quiet", "--threads", "1", "--out", str(path)]
        done = subprocess.run(
            [*command, "--world", str(dist.get_world_size())], env=env, capture_output=True, text=True
        )
        found = [path.read_text() if done.returncode == 0 else done]
    dist.broadcast_object_list(found, 0)
    if not isinstance(found[0], str):
        sys.exit(f"fxzero calibrate: exit code {found[0].returncode}: {found[0].stderr}")
    return parse(found[0], file=str(path))


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
    parser.add_argument("--hardware", help="a name or a file; left out, the machine is calibrated in each round")
    parser.add_argument("--job", choices=JOBS, default="llama", help="of tests/benchmarks/job.py")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="of a plan, in each round")
    parser.add_argument("--plans", type=int, default=len(PLANS), help="only the first so many")
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    torch.set_num_threads(1)
    machines = [Hardware.load(args.hardware)] if args.hardware else []
    cases = {name: Case(plan, JOBS[args.job]) for name, plan in list(PLANS.items())[: args.plans]}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            if not args.hardware:
                machines.append(calibrated(folder))
            for _ in range(args.steps):
                for case in cases.values():
                    case.run()
            for case in cases.values():
                case.record()
            if dist.get_rank() == 0:
                print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        rows = {name: case.row(machines) for name, case in cases.items()}
        print(table(rows), flush=True)
        within = sum(abs(row["predicted_s"] / row["plain_s"] - 1) <= 0.1 for row in rows.values())
        print(f"{within} of {len(rows)} plans within 10%", flush=True)
        if args.out is not None:
            found = {"plans": rows, "machines": [machine.to_toml() for machine in machines]}
            args.out.write_text(json.dumps(found, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
