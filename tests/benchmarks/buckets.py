"""Buckets decided by cost beside fixed sizes: predicted steps of Llama 8B's shapes, and of a GPT on two CPU ranks.

    python -m tests.benchmarks.buckets --layers 4 --json out/buckets.json
    python -m tests.benchmarks.buckets --worlds 1024 --orders fixed

One process, no GPU, no process group. Every column is the same step, rewritten by the whole pipeline and then played by
the simulator with the costs of the machine: buckets of each fixed size, and `bucket_bytes="auto"`, with the order
"fixed" and with schedule "cost" (`regather` as it is by default: with "auto" and schedule "cost", parameters may stay
gathered where no more memory is taken for it). With --budget all of them get that much memory; without it each
schedule by cost gets the peak of its own fixed order.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from fxzero import Plan, StepGraph
from fxzero.cost.hardware import Hardware
from fxzero.cost.memory import memory_timeline
from fxzero.errors import PlanError
from fxzero.recipe import recipe
from fxzero.simulate.prediction import predict
from tests.benchmarks.schedule_bound import GPT, MIB, MODELS, Model, captured

SIZES_MIB = (1, 4, 16, 64, 256)


def small_gpt(layers: int) -> tuple:
    with torch.device("meta"):
        model = GPT(layers=layers, dim=256, heads=4, vocab=2048, seq=128)
        tokens = torch.zeros(4, 128, dtype=torch.int64)
    return model, torch.optim.AdamW(model.parameters()), (tokens, tokens)


@dataclass(frozen=True)
class Row:
    """One model at one world, on one machine, in one order; seconds of a step, bytes of a rank's peak.

    `seconds` and `peak_bytes` are by size in MiB, and "auto"; a size that does not fit is left out.
    """

    model: str
    layers: int
    world: int
    hardware: str
    order: str
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    choose_seconds: float
    remark: str

    @property
    def best_fixed(self) -> str:
        return min((size for size in self.seconds if size != "auto"), key=lambda size: self.seconds[size])

    @property
    def ratio(self) -> float:
        return self.seconds["auto"] / self.seconds[self.best_fixed]


def measure(name: str, layers: int, step: StepGraph, plan: Plan, backend: str) -> Row:
    hardware = Hardware.load(plan.hardware)
    seconds, peaks = {}, {}
    spent, remark = 0.0, ""
    for size in (*map(str, SIZES_MIB), "auto"):
        pipeline = recipe(plan.replace(bucket_bytes=size if size == "auto" else int(size) * MIB), backend=backend)
        try:
            program = pipeline.run(step, check=False)
        except PlanError as error:
            print(f"{size}: {error}", file=sys.stderr)
            continue
        seconds[size] = predict([program], hardware).seconds
        peaks[size] = int(memory_timeline(program).total.max())
        spent = sum(record.seconds for record in pipeline.records if record.name == "choose_buckets")
        remark = program.remarks.get("choose_buckets", "")
    return Row(name, layers, plan.axes["dp"], plan.hardware, plan.schedule, seconds, peaks, spent, remark)


def table(rows: Sequence[Row]) -> str:
    heads = ["model", "world", "machine", "order", *(f"{size} MiB" for size in SIZES_MIB), "auto", "auto / best"]
    heads += ["peak GiB: best, auto"]
    lines = []
    for row in rows:
        times = [f"{row.seconds[s] * 1e3:,.1f}" if s in row.seconds else "-" for s in (*map(str, SIZES_MIB), "auto")]
        peaks = ", ".join(f"{row.peak_bytes[size] / 2**30:.2f}" for size in (row.best_fixed, "auto"))
        where = [f"{row.model} ({row.layers} layers)", row.world, row.hardware, row.order]
        lines.append([*where, *times, f"{row.ratio:.3f}", peaks])
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", type=int, default=[8, 64, 512, 1024])
    parser.add_argument("--hardware", nargs="+", default=["h100", "h100_ethernet"])
    parser.add_argument("--orders", nargs="+", default=["fixed", "cost"])
    parser.add_argument("--layers", type=int, default=4, help="of Llama 8B's 32")
    parser.add_argument("--budget", help="memory_budget of all plans, such as '60 GiB'")
    parser.add_argument("--no-cpu", action="store_true", help="without the GPT on two CPU ranks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []

    def add(*what: object) -> None:
        start = time.process_time()
        rows.append(measure(*what))  # type: ignore[arg-type]
        print(table(rows[-1:]).splitlines()[-1], f"{time.process_time() - start:.1f} s", file=sys.stderr)

    plan = Plan(zero=3, precision="bf16", recompute="blocks", memory_budget=args.budget)
    step = captured(MODELS["llama_8b"], args.layers, plan)
    for world in args.worlds:
        step.mesh = {"dp": world}
        for hardware in args.hardware:
            for order in args.orders:
                resolved = plan.replace(mesh=step.mesh, hardware=hardware, schedule=order)
                add("llama_8b", args.layers, step, resolved, "nccl")
    if not args.no_cpu:
        plan = Plan(zero=3)
        step = captured(Model(small_gpt, 4, 0), 4, plan)
        step.mesh = {"dp": 2}
        for form in ("separate", "coalesced"):
            for order in args.orders:
                resolved = plan.replace(mesh=step.mesh, hardware="cpu", schedule=order, bucket_form=form)
                add(f"gpt, {form}", 4, step, resolved, "gloo")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows], indent=2) + "\n")
    print(table(rows))
    print(f"\n{rows[-1].remark}")


if __name__ == "__main__":
    main()
